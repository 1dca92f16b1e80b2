"""P5: a flipped bit, a truncated, empty, swapped, stale or deleted object is reported by name, never returned as data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import edit_json, files_below, flip, put, random_values, same_bits, small_chunks, writer_at

from tensortape.stores import Verification, open_run
from tensortape.stores.errors import DamagedError, StoreError
from tensortape.stores.verify import verify_run

LENGTHS = [5, 0, 13, 1, 30, 0, 0, 8, 21, 2, 17, 40]
IDS = [f"x{number:02d}" for number in range(len(LENGTHS))]
TOKEN_COLUMNS = ("token/h", "token/tag", "token/word")


def values_of_columns() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "token/h": [random_values(rng, "bfloat16", (length, 3)) for length in LENGTHS],
        "token/tag": [rng.integers(0, 1000, length) for length in LENGTHS],
        "token/word": [np.array([f"w{n}" for n in rng.integers(0, 999, length)], object) for length in LENGTHS],
        "example/y": rng.random(len(LENGTHS)),
        "example/topic": [f"topic {number}" for number in range(len(LENGTHS))],
    }


VALUES = values_of_columns()


def write(path: Path, *, close: bool = True) -> Any:
    """Twelve examples in four commits: chunks of 8 rows, shards of 256 bytes, a partly filled tail in every array."""
    writer = writer_at(path)
    with small_chunks(shard_bytes=256):
        for start in range(0, 12, 3):
            some = {name: values[start : start + 3] for name, values in VALUES.items()}
            writer.append(ids=IDS[start : start + 3], columns=some)
            writer.commit()
    if close:
        writer.close()
    return writer


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A closed run that tests damage and repair again."""
    path = tmp_path_factory.mktemp("verify") / "run.zarr"
    write(path)
    return path


@contextmanager
def restored(*files: Path) -> Iterator[None]:
    """Put files back afterwards."""
    before = [(file, file.read_bytes()) for file in files]
    try:
        yield
    finally:
        for file, content in before:
            put(file, content)


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("parts/p*/*/**/c.*"))


def array_documents(path: Path) -> list[Path]:
    return sorted({shard.with_name("zarr.json") for shard in shards(path)})


def group_documents(path: Path) -> list[Path]:
    """Of tables, columns with several arrays, and the folder of parts: what a reader that goes from group to group needs."""
    every = sorted((path / "parts").rglob("zarr.json"))
    return [file for file in every if file not in array_documents(path) and file != part_document(path)]


def part_document(path: Path) -> Path:
    return path / "parts/p000000/zarr.json"


def records(path: Path) -> list[Path]:
    return sorted(path.glob("parts/p*/commits/*.json"))


def end(path: Path) -> Path:
    """Names the last record of a closed part."""
    return path / "parts/p000000/end.json"


def positions(size: int, count: int = 10) -> list[int]:
    """Evenly spread, and the first and the last byte."""
    return sorted({*range(0, size, max(size // count, 1)), size - 1})


def is_reported(path: Path, file: Path) -> bool:
    """Whether verify names the file. Another error than those of a store is no report."""
    try:
        report = verify_run(path)
    except Exception:
        return False
    return not report.ok and any(str(file.relative_to(path)) in str(damage) for damage in report.damaged)


def unreported_flips(path: Path, files: list[Path]) -> list[tuple[str, int]]:
    missed = []
    for file in files:
        with restored(file):
            before = file.read_bytes()
            for position in positions(len(before)):
                flip(file, position, 1 << position % 8)
                if not is_reported(path, file):
                    missed.append((str(file.relative_to(path)), position))
                put(file, before)
    return missed


def test_what_the_tests_below_damage(path):
    """Several shards of every kind of column, in full and partly filled."""
    arrays = open_run(path).parts[0].arrays
    assert {name: len(array.shards) for name, array in arrays.items() if name.startswith("token/")} == {
        "token/h": 5,
        "token/tag": 5,
        "token/word/utf8": 3,
        "token/word/end": 5,
    }
    assert len(shards(path)) > 25
    assert len(records(path)) == 5


def test_an_undamaged_run_is_sound(path):
    report = verify_run(path)
    assert report.ok
    assert report.damaged == ()
    assert report.shards == len(shards(path))
    assert report.nbytes == sum(shard.stat().st_size for shard in shards(path))
    assert repr(report) == f"<Verification {path}: sound; {report.shards} shards, {report.nbytes} bytes read>"


# Flipped bits.


@pytest.mark.slow
def test_a_flipped_bit_in_a_shard_is_reported(path):
    """In rows, in the stored checksums, in the padding of the tail, in the index and in its checksum."""
    assert unreported_flips(path, shards(path)) == []


def test_a_flipped_bit_in_a_commit_record_is_reported(path):
    assert unreported_flips(path, records(path)) == []


def test_a_flipped_bit_in_an_array_document_is_reported(path):
    """Foreign readers go by it: another fill value, chunk shape, dtype or `logical_dtype` is damage."""
    assert unreported_flips(path, array_documents(path)) == []


def test_a_flipped_bit_in_a_part_document_is_reported(path):
    assert unreported_flips(path, [part_document(path)]) == []


def test_a_flipped_bit_in_what_a_closed_part_says_of_its_last_record_is_reported(path):
    assert unreported_flips(path, [end(path)]) == []


def test_a_flipped_bit_in_a_group_document_is_reported(path):
    """Without it a foreign reader does not find the arrays below."""
    assert unreported_flips(path, group_documents(path)) == []


def owners(first: int, stop: int) -> tuple[str, str]:
    """First and last example that have rows [first, stop) of the token table."""
    ends = np.cumsum(LENGTHS)
    starts = ends - LENGTHS
    owning = [id_ for id_, start, end in zip(IDS, starts, ends, strict=True) if start < stop and end > first]
    return owning[0], owning[-1]


@pytest.mark.parametrize("array", ["token/h", "token/tag", "token/word/end"])
def test_the_report_names_the_examples_of_the_damaged_chunk(path, array):
    """Every chunk of every shard of a token column in turn: first and last example that own a row in it."""
    [part] = open_run(path).parts
    schema = next(role for column in part.columns.values() for role in column.arrays.values() if role.path == array)
    (chunk_rows, *_), (shard_rows, *_) = schema.grid.chunk, schema.grid.shard
    features = "".join(".0" for _ in schema.shape)
    total = sum(LENGTHS)
    stride = chunk_rows * int(np.prod(schema.shape)) * {"bfloat16": 2, "int64": 8}[schema.dtype] + 4
    for first in range(0, total, chunk_rows):
        shard, chunk = first // shard_rows, first % shard_rows // chunk_rows
        file = path / f"parts/p000000/{array}/c.{shard}{features}"
        with restored(file):
            flip(file, chunk * stride)
            [damage] = verify_run(path).damaged
        after = 1 if array.endswith("/end") else 0  # a text begins where the one before it ends
        assert (damage.first, damage.last) == owners(first, min(first + chunk_rows + after, total))
        assert damage.path == str(file.relative_to(path))
        assert damage.reason == f"chunk {chunk} does not hold the bytes that were committed"
        assert str(damage) == f"{damage.path}: {damage.reason} (examples {damage.first!r} to {damage.last!r})"


def assert_never_returned(path: Path, name: str) -> int:
    """Every example of a column is what was written, or a DamagedError that names it; how many are damaged.

    A text begins where the one before it ends, which may lie in a damaged chunk that holds only earlier examples.
    """
    column = open_run(path)[name]
    damaged = 0
    for number, expected in enumerate(VALUES[name]):
        try:
            found = column[number]
        except DamagedError as error:
            damaged += 1
            if name in ("token/h", "token/tag"):
                first, last = str(error).split("(examples ")[1].rstrip(")").replace("'", "").split(" to ")
                assert first <= IDS[number] <= last
        else:
            assert list(found) == list(expected) if name == "token/word" else same_bits(found, expected)
    return damaged


@pytest.mark.parametrize("name", TOKEN_COLUMNS)
def test_damaged_rows_are_never_returned(path, name):
    """A flipped bit at many places of the column's shards: each example is right or refused, by example, gather and block alike."""
    folder = path / "parts/p000000" / name
    damaged = 0
    for shard in [shard for shard in shards(path) if folder in shard.parents]:
        size = shard.stat().st_size
        for position in positions(size, 6):
            with restored(shard):
                flip(shard, position, 0x80)
                count = assert_never_returned(path, name)
                damaged += count
                if count:
                    for read in (lambda: open_run(path)[name].rows(), lambda: list(open_run(path)[name].blocks(rows=7))):
                        with pytest.raises(DamagedError, match=str(shard.relative_to(path))):
                            read()
    assert damaged > 20


def test_damage_is_found_once_and_again(path):
    """A chunk that was found damaged stays damaged for the same open run."""
    file = path / "parts/p000000/token/h/c.0.0"
    with restored(file):
        flip(file, 0)
        column = open_run(path)["token/h"]
        for _ in range(3):
            with pytest.raises(DamagedError, match="examples 'x00' to 'x02'"):
                column[0]
        assert same_bits(column[11], VALUES["token/h"][11])


def test_damage_in_text_is_refused_before_it_is_decoded(path):
    """Broken UTF-8 is a DamagedError, not a UnicodeDecodeError."""
    file = path / "parts/p000000/token/word/utf8/c.0"
    with restored(file):
        flip(file, 3, 0xFF)
        with pytest.raises(DamagedError, match=r"token/word/utf8/c\.0: chunk 0 does not hold the bytes"):
            open_run(path)["token/word"].rows()


def test_damage_of_keys_and_bounds_is_reported_too(path):
    """Also when the examples that other damage would be reported for cannot be read any more."""
    ids, rows = (path / f"parts/p000000/{name}" for name in ("example/id/utf8/c.0", "token/h/c.0.0"))
    with restored(ids, rows):
        flip(ids, 0)
        flip(rows, 0)
        report = verify_run(path)
        assert [damage.path for damage in report.damaged] == [str(file.relative_to(path)) for file in (rows, ids)]
        with pytest.raises(DamagedError):
            open_run(path)["token/h"][0]


# Truncated, empty, deleted, swapped and stale objects.


def every_object(path: Path) -> list[Path]:
    """All that verify has to know: shards, array documents, the part document, and records that others follow."""
    return [*shards(path), *array_documents(path), part_document(path), *records(path)[:-1]]


@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_a_truncated_or_empty_object_is_reported(path, keep):
    missed = []
    for file in [*every_object(path), records(path)[-1], end(path)]:
        with restored(file):
            content = file.read_bytes()
            put(file, content[: int(len(content) * keep) if isinstance(keep, float) else keep])
            if not is_reported(path, file):
                missed.append(str(file.relative_to(path)))
    assert missed == []


def test_an_object_that_has_grown_is_reported(path):
    missed = []
    for file in [*shards(path), *records(path), end(path)]:
        with restored(file):
            put(file, file.read_bytes() + b"\0")
            if not is_reported(path, file):
                missed.append(str(file.relative_to(path)))
    assert missed == []


def test_a_deleted_object_is_reported(path):
    missed = []
    for file in every_object(path):
        with restored(file):
            file.unlink()
            if not is_reported(path, file):
                missed.append(str(file.relative_to(path)))
    assert missed == []


def test_a_deleted_group_document_is_reported(path):
    missed = []
    for file in group_documents(path):
        with restored(file):
            file.unlink()
            if not is_reported(path, file):
                missed.append(str(file.relative_to(path)))
    assert missed == []


def test_a_deleted_last_record_is_reported(path):
    """The chain ends where it ends: what says that this part was closed, with so many records?"""
    with restored(records(path)[-1]):
        records(path)[-1].unlink()
        assert not verify_run(path).ok


def test_deleting_all_records_of_a_part_is_reported(path):
    """Otherwise the examples of a closed part vanish without a word."""
    with restored(*records(path)):
        for file in records(path):
            file.unlink()
        assert not verify_run(path).ok


@pytest.mark.parametrize("name", TOKEN_COLUMNS)
def test_a_deleted_shard_is_never_read_as_missing_rows(path, name):
    folder = path / "parts/p000000" / name
    for shard in [shard for shard in shards(path) if folder in shard.parents]:
        with restored(shard):
            shard.unlink()
            assert assert_never_returned(path, name) > 0


def test_opening_a_run_whose_part_document_is_gone_is_damage(path):
    """Its records are there: this is no interrupted claim."""
    with restored(part_document(path)):
        part_document(path).unlink()
        with pytest.raises(DamagedError, match=r"parts/p000000/zarr\.json"):
            open_run(path)


def test_opening_a_run_with_a_damaged_part_document_is_a_store_error(path):
    """Never an error of Python's own, whichever byte is damaged."""
    raised = []
    with restored(part_document(path)):
        before = part_document(path).read_bytes()
        for position in range(0, len(before), 3):
            flip(part_document(path), position)
            try:
                open_run(path)
            except StoreError:
                pass
            except Exception as error:
                raised.append((position, type(error).__name__))
            put(part_document(path), before)
    assert raised == []


def test_swapped_shards_are_reported(path):
    """Any two full shards of one array have the same size."""
    missed = []
    for array in {shard.parent for shard in shards(path)}:
        full = sorted(array.glob("c.*"))[:-1]
        for one, other in pairwise(full):
            with restored(one, other):
                contents = one.read_bytes(), other.read_bytes()
                if contents[0] == contents[1]:
                    continue
                put(one, contents[1])
                put(other, contents[0])
                missed += [str(file.relative_to(path)) for file in (one, other) if not is_reported(path, file)]
                if array.name == "h":
                    assert assert_never_returned(path, "token/h") > 0
    assert missed == []


def test_a_shard_of_another_array_is_reported(path):
    one, other = (path / f"parts/p000000/{name}/c.0" for name in ("token/tag", "token/word/end"))
    with restored(one):
        put(one, other.read_bytes())
        assert is_reported(path, one)
        assert assert_never_returned(path, "token/tag") > 0


def test_a_stale_shard_is_reported(tmp_path):
    """Every version that a tail ever had, put back after closing."""
    path = tmp_path / "run.zarr"
    writer = writer_at(path)
    versions: list[dict[str, bytes]] = []
    with small_chunks():
        for start in range(0, 12, 3):
            writer.append(ids=IDS[start : start + 3], columns={name: values[start : start + 3] for name, values in VALUES.items()})
            writer.commit()
            versions.append({str(shard): shard.read_bytes() for shard in shards(path)})
    writer.close()
    missed, replaced = [], 0
    for name, stale in {(name, content) for version in versions for name, content in version.items()}:
        file = Path(name)
        if file.read_bytes() == stale:
            continue
        replaced += 1
        with restored(file):
            put(file, stale)
            if not is_reported(path, file):
                missed.append(name)
    assert missed == []
    assert replaced > 20
    assert verify_run(path).ok


def test_a_shape_that_is_behind_what_is_committed_is_reported(path):
    """A foreign reader would miss rows that are there."""
    file = path / "parts/p000000/token/h/zarr.json"
    with restored(file):
        edit_json(file, lambda document: document.update(shape=[7, 3]))
        [damage] = verify_run(path).damaged
    assert damage.path == str(file.relative_to(path))
    assert "states 7 rows, but 137 are committed" in damage.reason


def test_several_damages_are_all_listed(path):
    files = [path / f"parts/p000000/token/{name}" for name in ("h/c.0.0", "h/c.2.0", "tag/c.1", "tag/zarr.json")]
    with restored(*files):
        flip(files[0], 0)
        files[1].unlink()
        put(files[2], b"")
        put(files[3], b"{}")
        report = verify_run(path)
    assert sorted(damage.path for damage in report.damaged) == sorted(str(file.relative_to(path)) for file in files)
    assert "4 damaged objects" in repr(report)
    assert repr(report).count("\n") == 4


def test_verifying_an_open_run_is_the_same_check(path):
    file = path / "parts/p000000/token/h/c.1.0"
    run = open_run(path)
    with restored(file):
        flip(file, 5)
        report = run.verify()
    assert isinstance(report, Verification)
    assert [damage.path for damage in report.damaged] == ["parts/p000000/token/h/c.1.0"]


# No false alarms.


def test_an_open_run_with_tails_is_sound(tmp_path):
    """Committed tails, tails that are longer than committed, and a part that has committed nothing."""
    path = tmp_path / "run.zarr"
    writer = write(path, close=False)
    assert verify_run(path).ok
    with small_chunks():
        writer.append(ids=["more"], columns={name: [values[11]] for name, values in VALUES.items()})
    assert verify_run(path).ok
    next(iter(writer._parts._parts.values()))._write_tails("p000000")  # a commit that was interrupted before its record
    assert verify_run(path).ok
    assert open_run(path).ids == IDS
    assert assert_never_returned(path, "token/h") == 0
    second = writer_at(path, "resume")
    second.append(ids=["other"], columns={"example/y": [1.0]})
    assert verify_run(path).ok


def test_unfinished_files_are_no_damage(tmp_path):
    """What a kill leaves behind: temporary files anywhere."""
    path = tmp_path / "run.zarr"
    write(path)
    for folder in [folder for folder in path.rglob("*") if folder.is_dir()]:
        (folder / ".c.0.d41d8cd98f00b204e9800998ecf8427e.partial").write_bytes(b"half")
    assert verify_run(path).ok
    assert open_run(path).ids == IDS
    assert assert_never_returned(path, "token/h") == 0


def test_verifying_writes_nothing(path):
    before = files_below(path)
    assert verify_run(path).ok
    assert files_below(path) == before
