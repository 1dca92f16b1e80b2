"""Repair: whatever is damaged, all that is whole stays, bit for bit, and what is not is given up by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from strategies import flip, put, random_values, same_bits, small_chunks, step, writer_at

from tensortape.stores import layout, open_run, repair
from tensortape.stores.dtypes import stored
from tensortape.stores.errors import FormatVersionError, LostPartError
from tensortape.stores.places import LocalPlace
from tensortape.stores.repair import Repair, repair_run
from tensortape.stores.schema import ArraySchema
from tensortape.stores.shards import Geometry
from tensortape.stores.verify import verify_run

LENGTHS = [5, 0, 13, 1, 30, 0, 0, 8, 21, 2, 17, 40]
IDS = [f"x{number:02d}" for number in range(len(LENGTHS))]
BASE = ("token/h", "token/word", "example/y", "example/topic", "example/wide")
EXTENSION = "token/added"
PART = "parts/p000000"


def values_of_columns() -> dict[str, Any]:
    rng = np.random.default_rng(11)
    return {
        "token/h": [random_values(rng, "bfloat16", (length, 3)) for length in LENGTHS],
        "token/word": [[f"w{n}é" for n in rng.integers(0, 999, length)] for length in LENGTHS],
        "example/y": rng.random(len(LENGTHS)),
        "example/topic": [f"topic {number}" for number in range(len(LENGTHS))],
        "example/wide": random_values(rng, "float32", (len(LENGTHS), 11, 3)),
        EXTENSION: [random_values(rng, "float16", (length,)) for length in LENGTHS],
    }


VALUES = values_of_columns()


def some(numbers: slice) -> dict[str, Any]:
    return {name: VALUES[name][numbers] for name in BASE}


def write(path: Path, *, close: bool = True, pending: bool = False) -> Any:
    """Twelve examples in four commits; rows of `example/wide` are cut into three pieces. `pending`: the last three by closing."""
    writer = writer_at(path)
    writer.add_asset("tokenizer.json", b"{}")
    with small_chunks(shard_bytes=256), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "SPLIT_ROW_BYTES", 64)
        for start in range(0, 12, 3):
            writer.append(ids=IDS[start : start + 3], columns=some(slice(start, start + 3)))
            if start < 9 or not pending:
                writer.commit()
        if close:
            writer.close()
            open_run(path).add_column(EXTENSION, VALUES[EXTENSION])
    return writer


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("repair") / "sound.zarr"
    write(path)
    return path


@pytest.fixture
def fresh(sound, tmp_path) -> Iterator[Callable[[], Path]]:
    """Copies of the run, one after another."""
    numbers = iter(range(10**6))

    def copy(source: Path = sound) -> Path:
        path = tmp_path / f"{next(numbers)}.zarr"
        shutil.copytree(source, path)
        return path

    return copy


# Kinds of damage.


def flipped(file: Path) -> None:
    flip(file, file.stat().st_size // 3, 0x10)


def truncated(file: Path) -> None:
    put(file, file.read_bytes()[:-1])


def emptied(file: Path) -> None:
    put(file, b"")


def deleted(file: Path) -> None:
    file.unlink()


def swapped(file: Path) -> None:
    """With another object of the same kind, or of any."""
    others = [other for other in sorted(file.parent.iterdir()) if other.is_file() and other != file]
    other = others[-1] if others else next(file.parent.glob("*/zarr.json"), file.parents[1] / "zarr.json")
    put(file, other.read_bytes())


DAMAGES = [flipped, truncated, emptied, deleted, swapped]


# What must be true afterwards.


def equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, (str, list)):
        return list(found) == list(expected) if isinstance(expected, list) else found == expected
    return same_bits(found, expected)


def assert_readable(path: Path, without: set[str], columns: tuple[str, ...] = BASE) -> None:
    """Everything but some examples is in the run, by example and by row; those are in none of the columns."""
    run = open_run(path)
    ids = run.ids
    assert set(IDS) - without <= set(ids) <= set(IDS)
    for name in columns:
        column = run[name]
        assert {id_ for id_, there in zip(ids, column.present, strict=True) if there} == set(IDS) - without, name
        kept = [id_ for id_ in ids if id_ not in without]
        for id_ in kept:
            assert equal(column[ids.index(id_)], VALUES[name][IDS.index(id_)]), (name, id_)
        expected = [VALUES[name][IDS.index(id_)] for id_ in kept]
        if kept and name == "token/word":
            assert column.rows().tolist() == [word for words in expected for word in words]
        elif kept and name != "example/topic":
            assert same_bits(column.rows(), np.concatenate(expected) if name.startswith("token/") else np.stack(expected))


def assert_plain_zarr_sees_no_garbage(path: Path, without: set[str]) -> None:
    """Rows of examples that were given up are what was written, or fill values; all others are what was written."""
    group = zarr.open_group(path / PART, mode="r")
    h, wide, count = group["token/h"][:], group["example/wide"][:], group["example/step"].shape[0]
    starts = np.cumsum([0, *LENGTHS])
    for number, id_ in enumerate(IDS[:count]):
        for rows, expected in (
            (h[starts[number] : starts[number + 1]], VALUES["token/h"][number]),
            (wide[number], VALUES["example/wide"][number]),
        ):
            if id_ not in without:
                assert same_bits(rows, expected)
            else:
                bits, was = rows.view(f"u{rows.itemsize}"), expected.view(f"u{rows.itemsize}")
                fill = {2: 0x7FC0, 4: 0x7FC00000}[rows.itemsize]
                assert ((bits == was) | (bits == fill)).all()


def record_again(path: Path) -> list[str]:
    """Resume and record whatever the run says it misses; the ids."""
    with writer_at(path, "resume") as writer:
        missing = [id_ for id_ in IDS if writer.missing(BASE, id_)]
        for id_ in missing:
            writer.append(ids=[id_], columns=some(slice(IDS.index(id_), IDS.index(id_) + 1)))
    return missing


def ids_of(withdrawn: list[str | int]) -> set[str]:
    """What a repair calls the examples it gave up: ids, or numbers where those were damaged."""
    return {IDS[int(name.split()[1])] if str(name).startswith("number ") else name for name in map(str, withdrawn)}


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def check_repaired(path: Path, damaged: Path, was: bytes | None, expected: set[str]) -> Repair:
    """All that holds of any repair; `was` is the damaged file's content (None: it was deleted)."""
    done = repair_run(path)
    name = str(damaged.relative_to(path))
    assert done.changed, name
    assert ids_of(done.withdrawn) == expected, name
    assert verify_run(path).ok, (name, verify_run(path))
    kept = [path / done.quarantine / name, damaged]
    assert was is None or any(file.exists() and file.read_bytes() == was for file in kept), name
    assert_readable(path, expected)
    assert_readable(path, set(), (EXTENSION,))
    assert_plain_zarr_sees_no_garbage(path, expected)
    before = content(path)
    again = repair_run(path)
    assert not again.changed, (name, again)
    assert content(path) == before
    assert record_again(path) == sorted(expected)
    assert_readable(path, set(), (*BASE, EXTENSION))
    assert verify_run(path).ok
    return done


def damage_and_repair(path: Path, name: str, damage: Callable[[Path], None], expected: set[str]) -> Repair:
    file = path / name
    damage(file)
    return check_repaired(path, file, file.read_bytes() if file.exists() else None, expected)


# Which examples own a chunk, worked out from what was written alone.


def array_schemas(path: Path) -> dict[str, ArraySchema]:
    [part] = [part for part in open_run(path).parts if part.name == "p000000"]
    return {role.path: role for column in part.columns.values() for role in column.arrays.values()}


def texts_of(array: str) -> list[list[str]]:
    """Texts of a column by example."""
    every = {
        "token/word": VALUES["token/word"],
        "example/topic": [[text] for text in VALUES["example/topic"]],
        "example/id": [[id_] for id_ in IDS],
        "example/phase": [["record"]] * len(IDS),
    }
    return every[array.rpartition("/")[0]]


def owners(array: str, first: int, stop: int) -> set[str]:
    """The examples that depend on elements [first, stop) of an array."""
    if array.endswith("/utf8"):
        sizes = [sum(len(text.encode()) for text in texts) for texts in texts_of(array)]
    elif array.endswith("/end"):
        sizes, stop = [len(texts) for texts in texts_of(array)], stop + 1
    else:
        sizes = LENGTHS if array.startswith("token/") else [1] * len(IDS)
    ends = np.cumsum(sizes)
    return {id_ for id_, size, end in zip(IDS, sizes, ends, strict=True) if size and end - size < stop and end > first}


def rows_of_array(array: str) -> int:
    if array.endswith("/utf8"):
        return sum(len(text.encode()) for texts in texts_of(array) for text in texts)
    return sum(LENGTHS) if array.startswith("token/") else len(IDS)


def concerned(path: Path, file: Path, chunks: set[int] | None = None) -> set[str]:
    """The examples with committed rows in some chunks (all by default) of a shard's file."""
    array = str(file.parent.relative_to(path / PART))
    schema = array_schemas(path)[array]
    geometry = Geometry(schema.grid, schema.shape, stored(schema.dtype))
    first, rows = int(file.name.split(".")[1]) * geometry.shard_rows, rows_of_array(array)
    found = set()
    for chunk in range(geometry.slots) if chunks is None else chunks:
        start = first + chunk // geometry.pieces * geometry.chunk_rows
        if start < rows:
            found |= owners(array, start, min(start + geometry.chunk_rows, rows))
    return found


def shards(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in (path / PART).glob("*/**/c.*"))


def test_the_run_has_what_these_tests_are_about(sound):
    schemas = array_schemas(sound)
    assert schemas["example/wide"].grid.chunk == (1, 5, 3)
    assert schemas["example/wide"].grid.shard[1] == 15
    assert len([name for name in shards(sound) if "/token/h/" in name]) > 2
    assert open_run(sound).parts[1].aligned == (("p000000", 0, 12),)
    assert_readable(sound, set(), (*BASE, EXTENSION))


def test_nothing_is_done_to_a_sound_run(fresh):
    path = fresh()
    before = content(path)
    done = repair_run(path)
    assert not done.changed
    assert repr(done) == f"<Repair {path}: nothing to repair>"
    assert content(path) == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncated, emptied, deleted])
def test_a_shard_that_is_gone_costs_the_examples_that_own_its_rows(fresh, sound, damage):
    for name in shards(sound)[:: step(3 if damage is deleted else 10)]:
        path = fresh()
        expected = set() if damage is truncated else concerned(path, path / name)
        damage_and_repair(path, name, damage, expected)
        shutil.rmtree(path)


@pytest.mark.slow
def test_a_flipped_bit_costs_the_examples_of_its_chunk(fresh, sound):
    """In the first and the last chunk of every shard, in a stored checksum, and in the index."""
    for name in shards(sound)[:: step(3)]:
        array = name.removeprefix(f"{PART}/").rpartition("/")[0]
        schema = array_schemas(sound)[array]
        geometry = Geometry(schema.grid, schema.shape, stored(schema.dtype))
        present = ((sound / name).stat().st_size - 16 * geometry.slots - 4) // geometry.stride
        path = fresh()
        chunk = present - 1
        expected = concerned(path, path / name, {chunk})
        damage_and_repair(path, name, lambda file, at=chunk * geometry.stride: flip(file, at, 0x80), expected)
        shutil.rmtree(path)
    for position in (geometry.chunk_bytes, -1, -9):
        damage_and_repair(fresh(), name, lambda file, at=position: flip(file, at, 0x80), set())


@pytest.mark.parametrize("array", ["token/h", "token/word/utf8", "example/wide", "example/start.token", "example/id/end"])
def test_shards_in_each_others_place(fresh, sound, array):
    """Each holds rows that were committed, but elsewhere."""
    path = fresh()
    found = [name for name in shards(path) if name.startswith(f"{PART}/{array}/")]
    first, last = path / found[0], path / found[-1]
    if first == last:
        last = path / next(name for name in shards(path) if "/token/h/" in name)
    one, other = first.read_bytes(), last.read_bytes()
    expected = concerned(path, first) | concerned(path, last)
    put(first, other)
    put(last, one)
    check_repaired(path, first, other, expected)


def documents(path: Path) -> list[str]:
    every = [path / "zarr.json", *(path / "parts").rglob("zarr.json")]
    return sorted(str(file.relative_to(path)) for file in every)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_documents_come_back_as_they_were(fresh, sound, damage):
    names = documents(sound)
    assert {"zarr.json", "parts/zarr.json", f"{PART}/zarr.json", f"{PART}/token/zarr.json", f"{PART}/token/h/zarr.json"} <= set(
        names
    )
    path = fresh()
    for name in names[:: step(1 if damage is flipped else 5)]:
        was = (path / name).read_bytes()
        damage(path / name)
        if (path / name).exists() and (path / name).read_bytes() == was:
            continue  # all groups have one document
        found = (path / name).read_bytes() if (path / name).exists() else None
        done = repair_run(path)
        assert done.replaced == [name]
        assert (path / name).read_bytes() == was
        assert found is None or (path / done.quarantine / name).read_bytes() == found
        assert verify_run(path).ok
    assert_readable(path, set(), (*BASE, EXTENSION))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", [0, 2, -1])
def test_records_of_a_closed_part(fresh, damage, which):
    """Its last record is a checkpoint; without it, all the others lead to the same."""
    path = fresh()
    name = sorted((path / PART / "commits").glob("*.json"))[which]
    damage_and_repair(path, str(name.relative_to(path)), damage, set())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", ["commits/*.shards", "end.json"])
def test_what_closed_a_part(fresh, damage, pattern):
    path = fresh()
    [file] = (path / PART).glob(pattern)
    if (damage, pattern) == (deleted, "end.json"):
        file.unlink()
        assert verify_run(path).ok  # as if its writer had been killed just before
        assert not repair_run(path).changed
        assert record_again(path) == []
        assert open_run(path).parts[0].ended
        return
    damage_and_repair(path, str(file.relative_to(path)), damage, set())


def test_a_record_that_held_examples_takes_them_with_it(fresh, tmp_path):
    """Nothing else says which rows they are; they are named by number. Extension columns keep their values."""
    source = tmp_path / "pending.zarr"
    write(source, pending=True)
    path = fresh(source)
    [last] = (path / PART / "commits").glob("000000000004.json")
    done = damage_and_repair(path, str(last.relative_to(path)), flipped, set(IDS[9:]))
    assert done.withdrawn == [f"number {number} of p000000" for number in (9, 10, 11)]


@pytest.mark.parametrize("which", [0, 1, 3])
def test_a_damaged_record_of_an_open_part(tmp_path, which):
    """What follows it cannot be told from its own; the part is sealed, and all that is lost is named and recorded again."""
    path = tmp_path / "run.zarr"
    writer = write(path, close=False)
    file = sorted((path / PART / "commits").glob("*.json"))[which]
    flipped(file)
    done = repair_run(path)
    assert ids_of(done.withdrawn) == set(IDS[3 * which :])
    assert verify_run(path).ok
    with pytest.raises(LostPartError):
        writer.append(ids=["y"], columns=some(slice(0, 1)))
    assert_plain_zarr_sees_no_garbage(path, set(IDS[3 * which :])) if which else None
    assert not repair_run(path).changed
    assert record_again(path) == IDS[3 * which :]
    assert_readable(path, set())
    assert verify_run(path).ok


def test_the_document_of_a_part_that_nothing_was_committed_to(tmp_path):
    path = tmp_path / "run.zarr"
    with small_chunks():
        writer = writer_at(path)
        writer.append(ids=IDS[:3], columns=some(slice(0, 3)))
    flip(path / PART / "zarr.json", 3)
    assert repair_run(path).replaced == [f"{PART}/zarr.json"]
    assert verify_run(path).ok
    assert record_again(path) == IDS


def test_assets_are_lost(fresh):
    path = fresh()
    put(path / "assets/tokenizer.json", b"{")
    done = repair_run(path)
    assert done.lost == ["assets/tokenizer.json"]
    assert not done.changed
    assert [damage.path for damage in verify_run(path).damaged] == done.lost
    assert_readable(path, set(), (*BASE, EXTENSION))


def test_damage_of_several_objects_at_once(fresh):
    """Ids, bounds, a record and rows: whatever names the examples, each is given up once."""
    path = fresh()
    for name in ("example/id/utf8/c.0", "example/start.token/c.0", "token/h/c.1.0", "commits/000000000002.json"):
        flipped(path / PART / name)
    done = repair_run(path)
    assert len(done.withdrawn) == len(set(done.withdrawn)) == len(ids_of(done.withdrawn)) > 1
    assert verify_run(path).ok
    assert_readable(path, ids_of(done.withdrawn))
    assert record_again(path) == sorted(ids_of(done.withdrawn))
    assert_readable(path, set(), (*BASE, EXTENSION))


def test_damage_after_a_repair(fresh):
    """Also of what the first repair itself has written."""
    path = fresh()
    flipped(path / PART / "token/h/c.0.0")
    first = ids_of(repair_run(path).withdrawn)
    flipped(path / PART / "token/h/c.3.0")
    flipped(sorted((path / PART / "commits").glob("*.json"))[-1])
    second = ids_of(repair_run(path).withdrawn)
    assert first
    assert second
    assert verify_run(path).ok
    assert_readable(path, first | second)
    assert record_again(path) == sorted(first | second)
    assert_readable(path, set(), (*BASE, EXTENSION))


def test_a_run_of_a_later_format_is_refused(fresh):
    """What this version cannot read is not damage."""
    path = fresh()
    document = (path / "zarr.json").read_text()
    for file in (path / PART / "commits").glob("*.json"):
        file.unlink()
    for file in path.glob("parts/p000001/commits/*.json"):
        file.unlink()
    put(path / "zarr.json", document.replace('"version": 1', '"version": 2').encode())
    before = content(path)
    with pytest.raises(FormatVersionError):
        repair_run(path)
    assert content(path) == before


# Killed on the way.


class FailingPlace(LocalPlace):
    """Stops at the operation of a given number, as a kill would."""

    left = 0

    def _count(self) -> None:
        FailingPlace.left -= 1
        if FailingPlace.left == 0:
            raise KeyboardInterrupt

    def create(self, path: str, buffers: Any) -> None:
        self._count()
        super().create(path, buffers)

    def replace(self, path: str, buffers: Any) -> None:
        self._count()
        super().replace(path, buffers)

    def settle(self) -> None:
        self._count()
        super().settle()


def stopped_repair(path: Path, operation: int) -> bool:
    """A repair that is killed at an operation; whether there was such an operation."""
    FailingPlace.left = operation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair, "place_at", lambda path, **_: FailingPlace(Path(path)))
        try:
            repair_run(path)
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("token/h/c.0.0", "example/topic/end/c.0"),
        ("example/id/utf8/c.0", "zarr.json", "token/h/zarr.json"),
        ("commits/000000000003.json", "end.json", "token/h/c.1.0"),
    ],
)
def test_a_repair_that_is_killed_at_any_operation_can_be_run_again(fresh, names):
    damaged = fresh()
    for name in names:
        flipped(damaged / PART / name)
    expected = ids_of(repair_run(whole := fresh(damaged)).withdrawn)
    assert_readable(whole, expected)
    operation = 1
    while stopped_repair(path := fresh(damaged), operation):
        repair_run(path)
        assert verify_run(path).ok, operation
        assert_readable(path, expected)
        kept = {file.read_bytes() for file in (path / "quarantine").rglob("*") if file.is_file()}
        for name in names:
            was = (damaged / PART / name).read_bytes()
            assert was in kept or (path / PART / name).read_bytes() == was
        assert not repair_run(path).changed
        shutil.rmtree(path)
        operation += 1
    assert operation > 6
