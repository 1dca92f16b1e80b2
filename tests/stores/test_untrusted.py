"""What runs of strangers may not do: the rules one by one. The fault suite tries them all together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import put, writer_at

from tensortape.app.show import printable
from tensortape.stores import RunWriter, commits, open_run, strict_json
from tensortape.stores.errors import DamagedError, FormatVersionError
from tensortape.stores.layout import Grid, check_grid, plan
from tensortape.stores.places import LocalPlace

CLOSING = "parts/p000000/commits/000000000002.json"
RECORD = "parts/p000000/commits/000000000001.json"
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(1 << 80), 1 << 80), st.floats(allow_nan=False, allow_infinity=False), st.text()
    ),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
)


@pytest.fixture
def path(tmp_path):
    with RunWriter(tmp_path / "run.zarr", durability="rename") as writer:
        writer.append(ids=["a", "b"], columns={"token/h": [np.ones((5, 3), np.float32), np.zeros((2, 3), np.float32)]})
        writer.commit()
    return tmp_path / "run.zarr"


def rewrite(path, change):
    """Another first record, with the right checksum, of a part that is still open."""
    record = json.loads((path / RECORD).read_bytes())["record"]
    change(record)
    for name in (commits.path_of("p000000", 2), commits.end_path("p000000")):
        (path / name).unlink(missing_ok=True)
    put(path / RECORD, commits._framed(json.dumps(record).encode()))


@given(values)
def test_what_json_can_say_is_read_as_json_reads_it(value):
    content = json.dumps(value).encode()
    assert strict_json.parse(content, "here") == json.loads(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"NaN",
        b"[-Infinity]",
        b'{"a":1,"a":1}',
        b'"\\ud800"',
        b"[" * 10**5,
        b"1" * 10**5,
        b"[" + b"0," * 2**20 + b"0]",
    ],
)
def test_what_json_should_not_say_is_refused(content):
    with pytest.raises(DamagedError, match=r"^here: "):
        strict_json.parse(content, "here")


def test_long_documents_are_refused_before_they_are_read(path):
    os.truncate(path / "zarr.json", strict_json.MOST + 1)
    with pytest.raises(DamagedError, match=r"zarr\.json: an object of 16777217 bytes"):
        open_run(path)


@given(st.lists(st.integers(1, 40), max_size=3), st.sampled_from([1, 2, 4, 8]), st.integers(0, 1 << 20))
def test_every_grid_that_is_planned_is_accepted(shape, itemsize, shard_bytes):
    check_grid(plan(tuple(shape), itemsize, shard_bytes), tuple(shape), itemsize, "here")


@pytest.mark.parametrize(
    ("chunk", "shard"),
    [((2,), (4,)), ((2, 3), (5, 3)), ((2, 2), (4, 4)), ((2, 3), (4, 6)), ((1, 5), (1, 5)), ((1, 3), (1 << 40, 3))],
)
def test_other_grids_are_refused(chunk, shard):
    with pytest.raises(DamagedError, match="here has chunks"):
        check_grid(Grid(chunk, shard), (3,), 4, "here")


@pytest.mark.parametrize("name", ["zarr.json", CLOSING, "parts", "parts/p000000/commits", "parts/p000000/token/h"])
def test_links_are_not_followed(path, name):
    (path / name).rename(path.parent / "moved")
    (path / name).symlink_to(path.parent / "moved")
    with pytest.raises(DamagedError, match="a symbolic link"):
        open_run(path)["token/h"].rows()


def test_nothing_is_written_through_a_link(path):
    (path.parent / "outside").mkdir()
    (path / "assets").symlink_to(path.parent / "outside")
    with pytest.raises(DamagedError, match="assets: a symbolic link"):
        LocalPlace(path).replace("assets/x", [b"x"])
    assert not list((path.parent / "outside").iterdir())


def test_the_root_may_be_a_link(path):
    (path.parent / "link").symlink_to(path)
    assert open_run(path.parent / "link").ids == ["a", "b"]
    assert open_run(path.parent / "link").verify().ok


def test_a_codec_or_dtype_that_is_not_known_is_refused_by_name(path):
    rewrite(path, lambda record: record["columns"]["token/h"]["arrays"]["values"].update(codec="pickle"))
    with pytest.raises(FormatVersionError, match=r"000000000001\.json: array 'token/h' .*'pickle'"):
        open_run(path)


def test_rows_that_there_are_no_files_for_take_no_memory(path):
    """2^40 rows that are said to be in one shard, which is a small file: refused before anything is allocated."""

    def change(record):
        record["rows"]["token"] = 1 << 40
        record["columns"]["token/h"]["arrays"]["values"].update(chunk=[1 << 40, 3], shard=[1 << 40, 3])
        record["arrays"]["token/h"] = {"rows": 1 << 40, "shards": {"0": [1 << 40, "00000000"]}}

    rewrite(path, change)
    program = f"""
import resource
from tensortape.stores import open_run
from tensortape.stores.errors import DamagedError
from tensortape.stores.part_reader import PartReader
run = open_run({str(path)!r})
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
part = run["token/h"]._holders[0]
try:
    part.slice(part.state.columns["token/h"], 0, 1 << 40)
except DamagedError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "the shard has" in found.stdout


def test_examples_that_share_rows_are_refused(path):
    """Else few rows would become any number."""
    part = open_run(path)._parts[0]
    start, length = part.bounds("token")
    from tensortape.stores.part_checks import check_bounds

    check_bounds("p", "token", start, length, 7)
    for wrong in (
        (start * 0, length, 7),
        (start, length, 6),
        (start - 1, length, 7),
        (start, length + (1 << 62), 7),
        (start, -length, 7),
    ):
        with pytest.raises(DamagedError, match=r"p: examples are said to have rows of table 'token'"):
            check_bounds("p", "token", *wrong)


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    path, model = tmp_path / "run.zarr", {"class": "\x1b]0;owned\x07", "parameters": "many", "dtype": 3}
    with writer_at(path, about={"model": model}) as writer:
        writer.append(ids=["a"], columns={"example/y": [1.0]})
    found = subprocess.run(
        [sys.executable, "-m", "tensortape.app.cli", "info", str(path)], capture_output=True, text=True, check=True
    )
    assert "\x1b" not in found.stdout + found.stderr
    assert printable("\x1b]0;owned\x07") in found.stdout
