"""Commit records: whole or refused, one chain per part, never of another run."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, feature_shapes, flip, unicode_names, writer_at

from tensortape.stores import commits, open_run
from tensortape.stores.commits import Record, ShardRecord
from tensortape.stores.errors import DamagedError, FormatVersionError
from tensortape.stores.schema import column_schema
from tensortape.stores.verify import verify_run

shard_records = st.builds(
    ShardRecord, st.integers(1, 2**40), st.lists(st.integers(0, 2**32 - 1), max_size=5).map(lambda crcs: np.array(crcs, "<u4"))
)
counts = st.dictionaries(st.text(max_size=8), st.integers(0, 2**50), max_size=3)


@st.composite
def columns(draw):
    name = f"token/{draw(unicode_names)}"
    return {name: column_schema(name, draw(st.sampled_from(sorted(DTYPES))), draw(feature_shapes), shard_bytes=1 << 20)}


@st.composite
def records(draw):
    array_rows = draw(counts)
    shards = {path: draw(st.dictionaries(st.integers(0, 10**6), shard_records, max_size=3)) for path in array_rows}
    text = st.text(max_size=10)
    return Record(
        run=draw(text),
        part=draw(text),
        number=draw(st.integers(1, 10**9)),
        previous=draw(text),
        kind=draw(st.sampled_from(commits.KINDS)),
        rows=draw(counts),
        columns=draw(columns()),
        array_rows=array_rows,
        shards=shards,
        aligned=tuple(draw(st.lists(st.tuples(text, st.integers(0, 99), st.integers(0, 99)), max_size=2))),
        nonfinite=draw(counts),
        written=draw(st.integers(0, 2**60)),
    )


@settings(deadline=None)
@given(records())
def test_a_record_comes_back_from_its_file(record):
    data = record.encode()
    found = Record.decode(data, "here")
    for field in ("run", "part", "number", "previous", "kind", "rows", "columns", "array_rows", "aligned", "nonfinite", "written"):
        assert getattr(found, field) == getattr(record, field)
    for path, shards in record.shards.items():
        assert found.shards[path].keys() == shards.keys()
        assert all(found.shards[path][n].rows == shard.rows for n, shard in shards.items())
        assert all(np.array_equal(found.shards[path][n].crcs, shard.crcs) for n, shard in shards.items())
    assert found.encode() == data


def test_a_record_is_json_with_the_checksum_of_its_inner_bytes():
    """Any program can check it: the checksum covers the bytes as they stand in the file."""
    data = Record("run", "p000000", 1, "").encode()
    document = json.loads(data)
    assert list(document) == ["crc32c", "record"]
    inner = data[data.index(b'"record":') + len(b'"record":') : -1]
    assert document["crc32c"] == f"{google_crc32c.value(inner):08x}"


@settings(deadline=None)
@given(records(), st.data())
def test_a_changed_byte_is_damage(record, data):
    before = record.encode()
    position = data.draw(st.integers(0, len(before) - 1))
    changed = bytearray(before)
    changed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamagedError, match="here: the commit record is damaged"):
        Record.decode(bytes(changed), "here")


@settings(deadline=None, max_examples=30)
@given(records(), st.data())
def test_a_truncated_record_is_damage(record, data):
    before = record.encode()
    with pytest.raises(DamagedError, match="here"):
        Record.decode(before[: data.draw(st.integers(0, len(before) - 1))], "here")


@pytest.mark.parametrize("more", [b" ", b"\n", b"}", b"\0" * 100])
def test_bytes_after_a_record_are_damage(more):
    with pytest.raises(DamagedError, match="here"):
        Record.decode(Record("run", "p000000", 1, "").encode() + more, "here")


def rewritten(data: bytes, **changes: object) -> bytes:
    """A record with other entries and the right checksum, as a later version would write it."""
    inner = json.dumps({**json.loads(data)["record"], **changes}, separators=(",", ":")).encode()
    return b'{"crc32c":"%08x","record":' % google_crc32c.value(inner) + inner + b"}"


@pytest.mark.parametrize("changes", [{"version": 2}, {"kind": "gone"}, {"kind": "checkpoint"}])
def test_records_of_a_later_version_or_kind_are_refused(changes):
    data = rewritten(Record("run", "p000000", 1, "").encode(), **changes)
    with pytest.raises(FormatVersionError, match=r"here is a record of kind .* update tensortape"):
        Record.decode(data, "here")


def test_a_later_version_may_have_other_entries_altogether():
    data = Record("run", "p000000", 1, "").encode()
    inner = b'{"version":2}'
    with pytest.raises(FormatVersionError, match="update tensortape"):
        Record.decode(b'{"crc32c":"%08x","record":' % google_crc32c.value(inner) + inner + b"}", "here")
    assert Record.decode(rewritten(data), "here").number == 1


# The chain of a part, on disk.


@pytest.fixture
def path(tmp_path) -> Path:
    """A closed run of five records in one part."""
    with writer_at(tmp_path / "run.zarr") as writer:
        for number in range(4):
            writer.append(ids=[number], columns={"token/h": [np.full(3 + number, number)]})
            writer.commit()
    return tmp_path / "run.zarr"


def record(path: Path, number: int) -> Path:
    return path / commits.path_of("p000000", number)


def open_again(path: Path) -> None:
    """Take back that the part was closed, as if its writer had been killed before: all of its records count then."""
    (path / commits.end_path("p000000")).unlink()
    record(path, 5).unlink()


def assert_damaged(path: Path, message: str) -> None:
    """Verify says which object it is; and where no checkpoint follows, the run does not open and no writer resumes it."""
    report = verify_run(path)
    assert not report.ok
    assert any("p000000" in str(damage) and re.search(message, str(damage)) for damage in report.damaged)
    if not (path / commits.end_path("p000000")).exists():
        for use in (open_run, lambda path: writer_at(path, "resume")):
            with pytest.raises(DamagedError, match=message):
                use(path)


def test_records_are_numbered_and_each_names_the_digest_of_the_one_before(path):
    files = sorted((path / "parts/p000000/commits").glob("*.json"))
    assert [file.name for file in files] == [f"{number:012d}.json" for number in range(1, 6)]
    previous = ""
    for number, file in enumerate(files, start=1):
        found = Record.decode(file.read_bytes(), file.name)
        assert (found.number, found.previous, found.part, found.run) == (number, previous, "p000000", open_run(path).uid)
        assert found.kind == ("closed" if number == 5 else "commit")
        previous = hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_schema_is_written_once_and_rows_are_totals(path):
    found = [Record.decode(record(path, number).read_bytes(), "") for number in range(1, 6)]
    assert [bool(entry.columns) for entry in found] == [True, False, False, False, True], "the closing one is a checkpoint"
    assert [entry.rows["example"] for entry in found] == [1, 2, 3, 4, 4]
    assert [entry.rows["token"] for entry in found] == [3, 7, 12, 18, 18]
    assert found[4].array_rows == {}, "closing touched nothing"
    assert {listed_path: one.rows for listed_path, one in found[4].listed.items()}["token/h"] == 18


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_missing_record_is_damage_where_others_follow(path, number):
    record(path, number).unlink()
    assert_damaged(path, rf"{number:012d}\.json: the commit record is missing")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_missing_record_of_an_open_part_is_damage_where_others_follow(path, number):
    open_again(path)
    record(path, number).unlink()
    assert_damaged(path, rf"{number:012d}\.json: the commit record is missing")


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_records_before_the_closing_one_are_not_needed_for_reading(path, number):
    record(path, number).unlink()
    run = open_run(path)
    assert run.ids == [0, 1, 2, 3]
    assert [len(run["token/h"][example]) for example in range(4)] == [3, 4, 5, 6]


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 3), (1, 5), (3, 4)])
def test_records_in_another_order_are_damage(path, first, second):
    one, other = record(path, first).read_bytes(), record(path, second).read_bytes()
    record(path, first).write_bytes(other)
    record(path, second).write_bytes(one)
    assert_damaged(path, "belongs to another run, part or place|closed by another")


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_record_of_another_run_is_damage(path, tmp_path, number):
    """Of the same number, part and content: the uid tells."""
    with writer_at(tmp_path / "other.zarr") as writer:
        for other in range(4):
            writer.append(ids=[other], columns={"token/h": [np.full(3 + other, other)]})
            writer.commit()
    shutil.copy(record(tmp_path / "other.zarr", number), record(path, number))
    assert_damaged(path, f"{number:012d}.json: this commit record belongs to another run")


def test_a_record_of_another_part_is_damage(path):
    with writer_at(path, "resume") as writer:
        writer.append(ids=[9], columns={"token/h": [np.full(3, 9)]})
    shutil.copy(path / commits.path_of("p000001", 1), record(path, 1))
    open_again(path)
    assert_damaged(path, "belongs to another run, part or place")


def test_a_record_with_another_history_is_damage(path):
    """Right run, part and number, but what it says of the record before it is wrong."""
    data = record(path, 3).read_bytes()
    record(path, 3).write_bytes(rewritten(data, previous="0" * 64))
    open_again(path)
    assert_damaged(path, "does not follow the one before it")


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_flipped_bit_in_a_record_is_damage(path, number):
    size = record(path, number).stat().st_size
    for position in range(0, size, max(size // 20, 1)):
        before = flip(record(path, number), position, 0x10)
        assert any(f"{number:012d}.json" in damage.path for damage in verify_run(path).damaged)
        if number == 5:
            with pytest.raises(DamagedError, match=f"{number:012d}.json"):
                open_run(path)
        record(path, number).write_bytes(before)
    assert open_run(path).ids == [0, 1, 2, 3]


def test_a_record_that_stands_beside_the_chain_is_damage(path):
    """Number 6 where 5 should be."""
    open_again(path)
    shutil.copy(record(path, 4), record(path, 6))
    assert_damaged(path, r"000000000005\.json: the commit record is missing")


def test_a_record_after_the_end_is_ignored(path):
    """Whoever wrote it was late: the part was closed."""
    shutil.copy(record(path, 5), record(path, 7))
    assert open_run(path).ids == [0, 1, 2, 3]
    assert verify_run(path).ok


@pytest.mark.parametrize("changes", [{"version": 2}, {"kind": "gone"}])
def test_a_run_with_a_record_of_a_later_version_is_refused(path, changes):
    record(path, 5).write_bytes(rewritten(record(path, 5).read_bytes(), **changes))
    with pytest.raises(FormatVersionError, match=r"000000000005\.json is a record of kind .*update tensortape"):
        open_run(path)


def test_unfinished_records_are_not_seen(path):
    (path / "parts/p000000/commits/.000000000006.json.d41d8cd9.partial").write_bytes(b"half")
    assert open_run(path).ids == [0, 1, 2, 3]
