"""Every thousandth record, and the one that closes a part, stand for all before them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import files_below, flip, put, same_bits, small_chunks, writer_at

from tensortape.stores import chain, commits, open_run
from tensortape.stores.errors import DamagedError, LostPartError
from tensortape.stores.part_state import read_part
from tensortape.stores.places import LocalPlace
from tensortape.stores.repair import repair_run
from tensortape.stores.verify import verify_run

EVERY = 50
COMMITS = 2 * EVERY + 17


@pytest.fixture(autouse=True)
def more_often() -> Iterator[None]:
    """Every fiftieth record instead of every thousandth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commits, "CHECKPOINT_EVERY", EVERY)
        yield


def value(number: int) -> np.ndarray:
    return np.array([number, -number, number / 3], np.float32)


def write(path: Path, count: int, *, close: bool) -> Any:
    with small_chunks(rows=4):
        writer = writer_at(path, commit_seconds=1e9)
        for number in range(count):
            writer.append(ids=[number], columns={"example/y": value(number)[None], "token/t": [np.arange(number % 3)]})
            writer.commit()
    if close:
        writer.close()
    return writer


@pytest.fixture(scope="module", params=["closed", "open"])
def written(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / f"{request.param}.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commits, "CHECKPOINT_EVERY", EVERY)
        writer = write(path, COMMITS, close=request.param == "closed")
    writer._broken = RuntimeError("abandoned by the test")  # closing it after the first test adds no record
    return path


@pytest.fixture
def path(written, tmp_path) -> Path:
    copy = tmp_path / written.name
    shutil.copytree(written, copy)
    return copy


def record(path: Path, number: int) -> Path:
    return path / commits.path_of("p000000", number)


def lists(path: Path) -> list[Path]:
    return sorted((path / "parts/p000000/commits").glob("*.shards"))


def last_list(path: Path) -> Path:
    return lists(path)[-1]


def assert_readable(path: Path, count: int = COMMITS) -> None:
    run = open_run(path)
    assert run.ids == list(range(count))
    assert same_bits(run["example/y"].rows(), np.stack([value(number) for number in range(count)]))
    assert [rows.tolist() for rows in run["token/t"][:]] == [list(range(number % 3)) for number in range(count)]


def test_a_part_is_read_from_its_last_checkpoint(path):
    assert_readable(path)
    assert verify_run(path).ok
    closed = path.stem == "closed"
    assert len(lists(path)) == (3 if closed else 2)

    class Logged(LocalPlace):
        records = 0

        def read(self, path: str, most: int | None = None) -> bytes:
            Logged.records += path.endswith(".json") and "/commits/" in path
            return super().read(path, most)

    place = Logged(path)
    read_part(place, open_run(path).uid, "p000000")
    assert Logged.records == (1 if closed else 18)


def test_reading_from_a_checkpoint_or_from_all_records_is_the_same(path):
    place, uid = LocalPlace(path), open_run(path).uid
    short, whole = read_part(place, uid, "p000000"), read_part(place, uid, "p000000", whole=True)
    for name in ("rows", "columns", "aligned", "nonfinite", "copies", "assets", "withdrawn", "kind", "last", "commits", "written"):
        assert getattr(short, name) == getattr(whole, name), name
    assert short.arrays.keys() == whole.arrays.keys()
    for name, array in short.arrays.items():
        other = whole.arrays[name]
        assert array.rows == other.rows
        assert {number: shard.to_json() for number, shard in array.shards.items()} == {
            number: shard.to_json() for number, shard in other.shards.items()
        }


@pytest.mark.parametrize("damage", [lambda file: flip(file, 50), lambda file: put(file, b""), Path.unlink])
@pytest.mark.parametrize("number", [1, 7, EVERY, 2 * EVERY - 1])
def test_records_before_the_last_checkpoint_are_not_needed_for_reading(path, damage, number):
    damage(record(path, number))
    assert_readable(path)
    assert any(damage.path == commits.path_of("p000000", number) for damage in verify_run(path).damaged)
    done = repair_run(path)
    assert done.changed
    assert done.withdrawn == []
    assert verify_run(path).ok
    assert_readable(path)
    assert not repair_run(path).changed


@pytest.mark.parametrize("number", [2 * EVERY, 2 * EVERY + 5])
def test_a_record_that_is_needed(path, number):
    """In an open part; nothing is returned that the chain does not lead to."""
    if path.stem == "closed":
        number = COMMITS + 1
    flip(record(path, number), 60)
    with pytest.raises(DamagedError, match="the commit record is damaged"):
        open_run(path)
    assert any(damage.path == commits.path_of("p000000", number) for damage in verify_run(path).damaged)
    done = repair_run(path)
    assert verify_run(path).ok
    assert len(done.withdrawn) == (0 if path.stem == "closed" else COMMITS - number + 1)
    assert_readable(path, COMMITS - len(done.withdrawn))


def swapped(file: Path) -> None:
    put(file, lists(file.parents[3])[0].read_bytes())


def cut(file: Path) -> None:
    put(file, file.read_bytes()[:-5])


EXAMPLE = ("y", "id", "phase", "step", "start.token", "length.token")


def refused_by(read: Callable[[], Any], expected: np.ndarray | None) -> str:
    """The path that a DamagedError names; none where what is read is right: a list has a checksum for each array."""
    try:
        found = read()
    except DamagedError as error:
        return str(error).partition(":")[0]
    assert expected is None or same_bits(found, expected)
    return ""


@pytest.mark.parametrize("damage", [lambda file: flip(file, 7), cut, lambda file: put(file, b""), Path.unlink, swapped])
def test_a_damaged_list_is_noticed_on_first_use(path, damage: Callable[[Path], Any]):
    """Whatever is read is right or refused; nothing but the list is given up."""
    file = last_list(path)
    damage(file)
    expected = {"y": np.stack([value(number) for number in range(COMMITS)]), "id": np.arange(COMMITS)}
    refused = [refused_by(lambda name=name: open_run(path).tables["example"][name].rows(), expected.get(name)) for name in EXAMPLE]
    assert set(refused) - {""} == {str(file.relative_to(path))}
    assert str(file.relative_to(path)) in [damage.path for damage in verify_run(path).damaged]
    done = repair_run(path)
    assert done.changed
    assert done.withdrawn == []
    assert verify_run(path).ok
    assert_readable(path)


def test_every_byte_of_a_list_matters(path):
    """No flipped bit anywhere changes what is read: it is refused or harmless."""
    file = last_list(path)
    content = file.read_bytes()
    for position in range(0, len(content), 97):
        flip(file, position, 1 << position % 8)
        assert not verify_run(path, quick=True).ok
        put(file, content)
    assert verify_run(path).ok


def test_a_writer_whose_part_was_sealed_cannot_replace_a_list(tmp_path):
    """It comes to its checkpoint when somebody else has written one in its place."""
    path = tmp_path / "run.zarr"
    zombie = write(path, EVERY - 1, close=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "check_open", lambda place, part: None)  # it was stopped after it had looked
        zombie.append(ids=[1000], columns={"example/y": value(1)[None], "token/t": [np.arange(2)]})
        writer_at(path, "resume").close()
        before = files_below(path)
        with pytest.raises(LostPartError):
            zombie.commit()
    after = files_below(path)
    [sealing] = [name for name in before if name.endswith(".shards")]
    assert after[sealing] == before[sealing]
    assert_readable(path, EVERY - 1)
    assert verify_run(path).ok


def test_a_writer_goes_on_after_its_checkpoints(tmp_path):
    """What a checkpoint holds is taken over by the next one, shards of all sessions of the part included."""
    path = tmp_path / "run.zarr"
    write(path, EVERY + 1, close=False)
    with small_chunks(rows=4), writer_at(path, "resume") as writer:
        assert len(writer.committed_ids) == EVERY + 1
        for number in range(EVERY + 1, EVERY + 4):
            writer.append(ids=[number], columns={"example/y": value(number)[None], "token/t": [np.arange(number % 3)]})
    assert_readable(path, EVERY + 4)
    assert verify_run(path).ok


@pytest.mark.slow
def test_a_part_of_many_commits(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "CHECKPOINT_EVERY", 1000)
    path = tmp_path / "run.zarr"
    writer = writer_at(path, commit_seconds=1e9)
    for number in range(2345):
        writer.append(ids=[number], columns={"example/y": value(number)[None]})
        writer.commit()
    for numbers in ([1000, 2000], [1000, 2000, 2346]):
        assert [file.name.partition(".")[0] for file in lists(path)] == [f"{number:012d}" for number in numbers]
        run = open_run(path)
        assert run.ids == list(range(2345))
        assert same_bits(run["example/y"].rows(), np.stack([value(number) for number in range(2345)]))
        assert verify_run(path).ok
        writer.close()
    record(path, 1234).unlink()
    assert open_run(path).ids == run.ids
