"""The local folder keeps the contract of a place, and what only a folder promises."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from faults.layer import Operation, layer
from hypothesis import given, settings
from hypothesis import strategies as st
from places_contract import PlaceContract
from strategies import files_below

from tensortape.stores.errors import DamagedError
from tensortape.stores.places import LocalPlace
from tensortape.stores.places.local import _write_all


@pytest.fixture(params=["fsync", "rename"])
def place(tmp_path, request):
    return LocalPlace(tmp_path, request.param)


class TestContract(PlaceContract):
    """For both durabilities."""


def test_replace_never_touches_the_old_bytes(place):
    """Who has opened or mapped the old object keeps it: a new file takes its name."""
    place.replace("a", [b"first"])
    mapped = place.view("a", expected=5, stays=True)
    before = (place.root / "a").stat().st_ino
    place.replace("a", [b"SECOND, and longer"])
    assert mapped.content.tobytes() == b"first"
    assert (place.root / "a").stat().st_ino != before
    assert place.read("a") == b"SECOND, and longer"


def test_a_refused_create_leaves_no_unfinished_file(place):
    place.create("a", [b"first"])
    with pytest.raises(FileExistsError):
        place.create("a", [b"second"])
    assert [entry.name for entry in place.root.iterdir()] == ["a"]


def test_a_folder_in_the_way_of_an_object_is_an_error_without_rest(place):
    place.create("a/b", [b"x"])
    with pytest.raises(OSError, match="a"):
        place.replace("a", [b"y"])
    assert files_below(place.root) == {"a/b": b"x"}


@pytest.mark.parametrize("count", [1023, 1024, 1025, 5000])
def test_more_buffers_than_one_call_takes_are_all_written(place, count):
    """The system writes at most 1,024 buffers at once."""
    buffers = [number.to_bytes(4, "little") for number in range(count)]
    place.create("a", buffers)
    assert place.read("a") == np.arange(count, dtype="<u4").tobytes()


def test_more_bytes_than_one_call_takes_are_all_written(tmp_path):
    """A pipe takes 64 KiB at a time, so that every call writes a part of what it was given."""
    buffers = [np.full(size, number, np.uint8) for number, size in enumerate([100_000, 1, 0, 70_000, 3])]
    reading, writing = os.pipe()
    with ThreadPoolExecutor(1) as pool, os.fdopen(reading, "rb") as pipe:
        found = pool.submit(pipe.read)
        _write_all(writing, [buffer.data for buffer in buffers if len(buffer)])
        os.close(writing)
        assert found.result() == b"".join(map(bytes, buffers))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.one_of(st.binary(max_size=50), st.lists(st.integers(0, 255), max_size=20)), max_size=20))
def test_buffers_are_written_one_after_another(tmp_path_factory, drawn):
    place = LocalPlace(tmp_path_factory.mktemp("place"), "rename")
    buffers = [part if isinstance(part, bytes) else np.array(part, "<i4") for part in drawn]
    place.create("a", buffers)
    assert place.read("a") == b"".join(bytes(part) if isinstance(part, bytes) else part.tobytes() for part in buffers)


def test_long_names_do_not_make_temporary_names_too_long(place):
    place.replace("x" * 200, [b"1"])
    assert place.names("") == ["x" * 200]


def test_what_is_created_is_synced_at_once_and_what_was_written_before_it_is_synced_before(tmp_path):
    """After a power loss no claim or record vouches for what is gone, and nothing is built on a claim that is gone."""
    place, done = LocalPlace(tmp_path / "run"), []

    def meet(operation: Operation) -> object:
        done.append((operation.name, operation.paths[-1].name))
        return operation.make()

    with layer(tmp_path, meet):
        place.replace("before/x", [b"1"])
        place.create("claim/y", [b"2"])
    created = done.index(("link", "y"))
    assert {("fsync", "before"), ("fsync", "run")} <= set(done[:created])
    assert {("fsync", "claim"), ("fsync", "run")} <= set(done[created:])


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "/outside", ".."])
def test_a_path_that_leads_out_of_the_root_is_refused(place, path):
    """Paths come from documents, which anybody may have written (P13)."""
    for use in (
        place.read,
        place.size,
        place.names,
        lambda path: place.view(path, expected=0, stays=True),
        lambda path: place.replace(path, [b""]),
    ):
        with pytest.raises(DamagedError, match="leads out of the run"):
            use(path)


def test_an_unknown_durability_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="'fsync' or 'rename', not 'none'"):
        LocalPlace(tmp_path, "none")
