"""The local folder keeps the contract of a place, and what only a folder promises."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places_contract import PlaceContract
from strategies import files_below

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


def test_an_unknown_durability_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="'fsync' or 'rename', not 'none'"):
        LocalPlace(tmp_path, "none")
