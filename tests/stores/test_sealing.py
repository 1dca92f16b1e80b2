"""P6: a part whose writer is gone is sealed; should the writer come back, its next commit fails and changes nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import files_below, random_values, same_bits, small_chunks, writer_at

from tensortape.stores import RunWriter, chain, commits, open_run, writer
from tensortape.stores.errors import BrokenWriterError, LostPartError, StoreError
from tensortape.stores.places import LocalPlace
from tensortape.stores.verify import verify_run

CHILD = """
import sys
import numpy as np
from tensortape.stores import RunWriter
writer = RunWriter(sys.argv[1], durability="rename")
writer.append(ids=["a", "b"], columns={"token/h": [np.full((3, 2), 1.5), np.full((5, 2), 2.5)]})
writer.commit()
writer.append(ids=["c"], columns={"token/h": [np.full((7, 2), 3.5)]})
print("ready", flush=True)
for step in sys.stdin.readline().split():
    try:
        writer.append(ids=["d"], columns={"token/h": [np.full((2, 2), 4.5)]}) if step == "append" else writer.commit()
        print("done", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
        break
sys.stdout.flush()
os._exit(0)
"""


@contextmanager
def child(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has committed a and b, and appended c."""
    command = [sys.executable, "-c", CHILD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def values(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {"token/h": [random_values(rng, "bfloat16", (5 + number % 7, 3))], "example/name": [f"name {number}"]}


def assert_holds(path: Path, numbers: list[int]) -> None:
    run = open_run(path)
    assert run.ids == numbers
    for place, number in enumerate(numbers):
        assert same_bits(run["token/h"][place], values(number)["token/h"][0])
        assert run["example/name"][place] == f"name {number}"
    report = verify_run(path)
    assert report.ok, report


def kinds(path: Path) -> list[str]:
    return [part.kind for part in open_run(path).parts]


def test_the_part_of_a_killed_process_is_sealed_by_resuming(tmp_path):
    path = tmp_path / "run.zarr"
    with child(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert kinds(path) == ["commit"]
        with writer_at(path, "resume") as second:
            assert kinds(path) == ["sealed"]
            assert "a" in second.committed_ids
            assert "c" not in second.committed_ids
            second.append(ids=["c"], columns={"token/h": [np.full((7, 2), 3.5)]})
    run = open_run(path)
    assert (run.ids, kinds(path)) == (["a", "b", "c"], ["sealed", "closed"])
    assert [part.ended for part in run.parts] == [True, True]
    assert verify_run(path).ok


@pytest.mark.parametrize("steps", ["append commit", "commit"])
def test_a_stopped_process_that_wakes_fails_and_changes_nothing_that_counts(tmp_path, steps):
    path = tmp_path / "run.zarr"
    with child(path) as process:
        process.send_signal(signal.SIGSTOP)
        with writer_at(path, "resume") as second:
            second.append(ids=["z"], columns={"token/h": [np.full((4, 2), 9.5)]})
        before = files_below(path)
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(f"{steps}\n", timeout=120)
        assert said.split() == ["LostPartError"]
        assert files_below(path) == before
    run = open_run(path)
    assert run.ids == ["a", "b", "z"]
    assert [rows[0, 0] for rows in run["token/h"][:]] == [1.5, 2.5, 9.5]
    assert verify_run(path).ok


class InterruptedPlace(LocalPlace):
    """Before its operation of a given number, something else happens."""

    left = 0
    happens: Callable[[], Any] = staticmethod(lambda: None)

    def _count(self) -> None:
        InterruptedPlace.left -= 1
        if InterruptedPlace.left == 0:
            InterruptedPlace.happens()

    def create(self, path: str, buffers: Any) -> None:
        self._count()
        super().create(path, buffers)

    def replace(self, path: str, buffers: Any) -> None:
        self._count()
        super().replace(path, buffers)

    def settle(self) -> None:
        self._count()
        super().settle()

    def exists(self, path: str) -> bool:
        self._count()
        return super().exists(path)


@contextmanager
def interrupted(operation: int, happens: Callable[[], Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "place_at", lambda where, durability, **_: InterruptedPlace(Path(where), durability))
        patch.setattr(InterruptedPlace, "happens", staticmethod(happens))
        patch.setattr(InterruptedPlace, "left", operation)
        yield


def sealed_at(path: Path, operation: int, ending: str) -> bool:
    """A commit (or close) during which, before operation number `operation`, somebody seals the part; whether it got so far."""
    with interrupted(0, lambda: None), small_chunks():
        mine = writer_at(path)
        mine.append(ids=[0, 1], columns={name: given * 2 for name, given in values(0).items()} | both(0, 1))
        mine.commit()
        mine.append(ids=[2], columns=values(2))
        others = LocalPlace(path, "rename")
        sealed = []
        InterruptedPlace.happens = staticmethod(lambda: sealed.append(chain.seal(others, mine.uid, "p000000")))
        InterruptedPlace.left = operation
        try:
            getattr(mine, ending)()
        except LostPartError:
            counts = False
        else:
            counts = True
        InterruptedPlace.left = 0
    assert counts or sealed == [True]
    assert_holds(path, [0, 1, 2] if counts else [0, 1])
    with writer_at(path, "resume") as second:
        for number in (2, 3):
            if number not in second.committed_ids:
                second.append(ids=[number], columns=values(number))
    assert_holds(path, [0, 1, 2, 3])
    return bool(sealed)


def both(*numbers: int) -> dict[str, Any]:
    each = [values(number) for number in numbers]
    return {name: [given for one in each for given in one[name]] for name in each[0]}


@pytest.mark.parametrize("ending", ["commit", "close"])
def test_sealing_at_any_operation_of_a_commit(tmp_path, ending):
    """Also after the writer has looked whether its part is still its own: the commit counts whole, or fails."""
    operation = 1
    while sealed_at(tmp_path / f"{operation}.zarr", operation, ending):
        operation += 1
    assert operation > 10


def test_sealing_races_with_commits_of_a_thread(tmp_path):
    """Whichever is first: what was acknowledged is there, and nothing else, except a commit that was cut off from its answer."""
    path = tmp_path / "run.zarr"
    mine = writer_at(path)
    acknowledged: list[int] = []
    begun = threading.Event()

    def write() -> None:
        for number in range(200):
            mine.append(ids=[number], columns=values(number))
            mine.commit()
            acknowledged.append(number)
            if number == 3:
                begun.set()

    def writing() -> None:
        try:
            write()
        except LostPartError:
            pass
        finally:
            begun.set()

    thread = threading.Thread(target=writing)
    thread.start()
    begun.wait()
    sealed = chain.seal(LocalPlace(path, "rename"), mine.uid, "p000000")
    thread.join()
    assert sealed
    assert kinds(path) == ["sealed"]
    assert_holds(path, acknowledged)


def test_a_part_without_a_record_is_sealed_and_ignored(tmp_path):
    path = tmp_path / "run.zarr"
    with small_chunks():
        zombie = writer_at(path)
        for number in range(5):
            zombie.append(ids=[number], columns=values(number))
    with writer_at(path, "resume") as second:
        assert len(second.committed_ids) == 0
        second.append(ids=[0], columns=values(0))
    before = files_below(path)
    with pytest.raises(LostPartError):
        zombie.commit()
    assert files_below(path) == before
    assert [part.name for part in open_run(path).parts] == ["p000001"]
    assert not list((path / "parts/p000000/commits").glob("*.shards"))
    assert_holds(path, [0])


def test_a_run_of_parts_without_a_record_is_empty(tmp_path):
    path = tmp_path / "run.zarr"
    writer_at(path).append(ids=[0], columns=values(0))
    writer_at(path, "resume").close()
    assert_empty(path)
    writer_at(path, "resume").close()
    assert_empty(path)


def assert_empty(path: Path) -> None:
    assert open_run(path).ids == []
    assert verify_run(path).ok


def test_killed_between_the_closing_record_and_the_end(tmp_path):
    path = tmp_path / "run.zarr"

    class Killed(LocalPlace):
        def create(self, path: str, buffers: Any) -> None:
            if path.endswith("end.json"):
                raise KeyboardInterrupt
            super().create(path, buffers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "place_at", lambda where, durability, **_: Killed(Path(where), durability))
        mine = RunWriter(path, durability="rename")
        mine.append(ids=[0, 1], columns=both(0, 1))
        with pytest.raises(KeyboardInterrupt):
            mine.close()
    assert [(part.kind, part.ended) for part in open_run(path).parts] == [("closed", False)]
    assert_holds(path, [0, 1])
    assert [note.partition(":")[0] for note in verify_run(path).unfinished] == [commits.end_path("p000000")]
    writer_at(path, "resume").close()
    assert [(part.kind, part.ended) for part in open_run(path).parts] == [("closed", True)]
    assert verify_run(path).unfinished == ()
    assert_holds(path, [0, 1])


def test_a_sealed_writer_stays_unusable(tmp_path):
    path = tmp_path / "run.zarr"
    mine = writer_at(path)
    mine.append(ids=[0], columns=values(0))
    mine.commit()
    writer_at(path, "resume").close()
    with pytest.raises(LostPartError, match="part p000000 was sealed"):
        mine.append(ids=[1], columns=values(1))
    for use in (mine.commit, lambda: mine.append(ids=[2], columns=values(2))):
        with pytest.raises(BrokenWriterError, match="mode='resume'"):
            use()
    mine.close()
    assert_holds(path, [0])


def test_writers_of_one_session_leave_each_other_alone(tmp_path):
    path = tmp_path / "run.zarr"
    first = writer_at(path, session="s", rank=0)
    first.append(ids=[0], columns=values(0))
    first.commit()
    second = writer_at(path, "resume", session="s", rank=1)
    second.append(ids=[1], columns=values(1))
    first.append(ids=[2], columns=values(2))
    first.close()
    second.close()
    assert kinds(path) == ["closed", "closed"]
    assert_holds(path, [0, 2, 1])


def test_a_column_added_to_a_run_that_is_being_written(tmp_path):
    """It has values for the examples that were there; the writer goes on."""
    path = tmp_path / "run.zarr"
    mine = writer_at(path)
    mine.append(ids=[0, 1], columns=both(0, 1))
    mine.commit()
    open_run(path).add_column("example/added", [7, 8])
    mine.append(ids=[2], columns=values(2))
    mine.close()
    assert_holds(path, [0, 1, 2])
    added = open_run(path)["example/added"]
    assert added.present.tolist() == [True, True, False]
    assert added.rows().tolist() == [7, 8]
    assert kinds(path) == ["closed", "closed"]


def test_resuming_a_damaged_run_refuses(tmp_path):
    """Sealing reads the part first: what cannot be told is not sealed."""
    path = tmp_path / "run.zarr"
    mine = writer_at(path)
    mine.append(ids=[0], columns=values(0))
    mine.commit()
    record = path / commits.path_of("p000000", 1)
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(StoreError, match="the commit record is damaged"):
        writer_at(path, "resume")
    assert not (path / commits.end_path("p000000")).exists()
