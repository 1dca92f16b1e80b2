"""Writing in the background: in order, bounded, and nothing is lost or goes unsaid."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import same_bits, writer_at

from tensortape.stores import RunWriter, open_run
from tensortape.stores.background import Background
from tensortape.stores.errors import BrokenWriterError, SchemaError
from tensortape.stores.places import LocalPlace

ROW = np.arange(257, dtype=np.float32)


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background(limit=1000)
    yield background
    background.stop()


def threads() -> list[threading.Thread]:
    """Threads of writers."""
    return [thread for thread in threading.enumerate() if thread.name == "tensortape-writer"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threads()
    yield
    assert threads() == before


# --- the queue ------------------------------------------------------------------------------------------------------------------


def test_tasks_are_done_in_order_by_one_other_thread(background):
    done = []
    for number in range(211):
        background.add(number % 7 * 100, lambda number=number: done.append((number, threading.get_ident())))
    background.wait()
    assert [number for number, _ in done] == list(range(211))
    assert {thread for _, thread in done} == {threads()[-1].ident}


def test_what_is_held_never_exceeds_the_limit(background):
    """Counted by the tasks themselves: what was let in, less what is done."""
    held, most = 0, 0
    lock = threading.Lock()

    def task(size: int) -> None:
        nonlocal held
        time.sleep(0.001)
        with lock:
            held -= size

    for size in [7, 400, 0, 600, 599, 1, 999, 13] * 13:
        background.make_room(size)
        with lock:
            held += size
            most = max(most, held)
        background.add(size, lambda size=size: task(size))
    background.wait()
    # `held` falls just before the task counts as done, so it can only be lower than what the queue goes by.
    assert 600 < most <= 1000
    assert held == 0


def test_whoever_adds_waits_only_when_the_queue_is_full(background):
    """The thread is held up by an event, not by a clock."""
    go_on, added = threading.Event(), threading.Event()
    background.add(500, go_on.wait)
    background.add(499, lambda: None)

    def one_more() -> None:
        background.add(2, lambda: None)
        added.set()

    waiting = threading.Thread(target=one_more)
    waiting.start()
    assert not added.wait(0.1)
    go_on.set()
    assert added.wait(10)
    waiting.join()


def test_a_task_larger_than_the_limit_goes_alone(background):
    done = []
    for _ in range(3):
        background.add(5000, lambda: done.append(len(background._tasks)))
    background.wait()
    assert done == [0, 0, 0]


def test_what_a_task_holds_is_let_go_when_it_is_done(background):
    import gc
    import weakref

    class Large: ...

    large = Large()
    gone = weakref.ref(large)
    background.add(1, lambda large=large: None)
    del large
    background.wait()
    gc.collect()
    assert gone() is None


def test_an_error_is_raised_once_and_nothing_is_begun_after_it(background):
    done = []
    go_on = threading.Event()
    background.add(1, lambda: go_on.wait() and 1 / 0)
    background.add(1, lambda: done.append(1))
    go_on.set()
    with pytest.raises(ZeroDivisionError):
        background.wait()
    background.check()
    with pytest.raises(BrokenWriterError, match="division by zero"):
        background.add(1, lambda: done.append(2))
    with pytest.raises(BrokenWriterError, match="division by zero"):
        background.wait()
    assert done == []


def test_whoever_waits_for_room_learns_of_an_error(background):
    go_on = threading.Event()
    background.add(1000, lambda: go_on.wait() and 1 / 0)
    threading.Timer(0.05, go_on.set).start()
    with pytest.raises(ZeroDivisionError):
        background.add(1, lambda: None)


def test_an_interrupted_wait_leaves_the_queue_as_it_was(background, monkeypatch):
    """Ctrl-C arrives while the caller waits for room."""
    go_on, done = threading.Event(), []
    background.add(1000, go_on.wait)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(background._change, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.add(1, lambda: done.append(1))
    go_on.set()
    background.add(1, lambda: done.append(2))
    background.wait()
    assert done == [2]


# --- a writer with it -----------------------------------------------------------------------------------------------------------


def values(id_: int, rows: int) -> np.ndarray:
    """What tells an example from the others."""
    return ROW + np.arange(id_, id_ + rows, dtype=np.float32)[:, None]


def append(writer: RunWriter, *ids: int, rows: int = 5) -> None:
    writer.append(ids=list(ids), columns={"token/h": [values(id_, rows) for id_ in ids]})


def check(path: Path, *ids: int, rows: int = 5) -> None:
    run = open_run(path)
    assert run.ids == list(ids)
    for number, id_ in enumerate(ids):
        assert same_bits(run["token/h"][number], values(id_, rows))
    assert run.verify().ok


class Slow:
    """Holds up every shard that is written until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, what: str = "/c.") -> None:
        self.go_on = threading.Event()
        self.error: Exception | None = None
        replace = LocalPlace.replace

        def held_up(place: LocalPlace, path: str, buffers: Any) -> None:
            if what in path:
                self.go_on.wait()
                if self.error is not None:
                    raise self.error
            replace(place, path, buffers)

        monkeypatch.setattr(LocalPlace, "replace", held_up)


@pytest.fixture
def slow(monkeypatch) -> Iterator[Slow]:
    slow = Slow(monkeypatch)
    yield slow
    slow.go_on.set()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.zarr"


def test_the_same_run_is_written(path, tmp_path):
    for options in ({"background": True}, {}):
        with writer_at(tmp_path / f"{len(options)}.zarr", **options) as writer:
            for number in range(0, 30, 3):
                append(writer, number, number + 1, number + 2)
            writer.commit()
            assert len(writer.committed_ids) == 30
    check(tmp_path / "1.zarr", *range(30))
    assert open_run(tmp_path / "0.zarr").digest() == open_run(tmp_path / "1.zarr").digest()


def test_a_slow_disk_holds_the_caller_up_only_when_the_queue_is_full(path, slow):
    """The budget leaves half for the queue: as many appends as fit go through while nothing is written at all."""
    budget, rows = 1 << 21, 61
    size = rows * ROW.nbytes
    writer = writer_at(path, background=True, memory_budget=budget, commit_bytes=1)
    room = budget // 2 // (size + 200)  # keys and bounds count, too
    for number in range(room):
        append(writer, number, rows=rows)
    held = threading.Event()

    def one_more() -> None:
        for number in range(room, room + 3):
            append(writer, number, rows=rows)
        held.set()

    waiting = threading.Thread(target=one_more)
    waiting.start()
    assert not held.wait(0.2)
    assert writer._background is not None
    assert writer._background._held <= budget // 2
    slow.go_on.set()
    waiting.join()
    writer.close()
    check(path, *range(room + 3), rows=rows)


@pytest.mark.parametrize("call", ["append", "commit", "add_asset"])
def test_an_error_of_the_disk_reaches_the_caller_once_as_it_is(path, slow, call):
    calls: dict[str, Callable[[RunWriter], None]] = {
        "append": lambda writer: append(writer, 2),
        "commit": RunWriter.commit,
        "add_asset": lambda writer: writer.add_asset("x", b""),
    }
    writer = writer_at(path, background=True, commit_bytes=1)
    append(writer, 0)
    slow.error = OSError(errno.ENOSPC, "No space left on device")
    slow.go_on.set()
    while writer._broken is None:
        time.sleep(0.001)
    with pytest.raises(OSError, match="No space left") as caught:
        calls[call](writer)
    assert caught.value is slow.error
    for again in calls.values():
        with pytest.raises(BrokenWriterError, match=r"No space left.*mode='resume'"):
            again(writer)
    writer.close()
    slow.error = None
    with writer_at(path, "resume", background=True) as writer:
        append(writer, 0)
    check(path, 0)


def test_closing_raises_what_nobody_knows_of_yet(path, slow):
    """Whether the error was there before, or comes while closing waits; and only once."""
    writer = writer_at(path, background=True)
    append(writer, 0)
    slow.error = OSError(errno.ENOSPC, "No space left on device")
    threading.Timer(0.05, slow.go_on.set).start()
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    writer.close()
    with pytest.raises(BrokenWriterError):
        append(writer, 1)


def test_a_part_that_cannot_be_closed_breaks_the_writer(path, slow):
    """A part that makes room for one with other columns is closed in the background; that may fail like anything else."""
    slow.go_on.set()
    writer = writer_at(path, background=True, memory_budget=1_400_000)  # enough for the buffers of one part
    append(writer, 0)
    writer.commit()
    append(writer, 1)
    slow.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012 - here or there
        writer.append(ids=[0], columns={"token/w": [np.ones((5, 97), np.float32)]})
        writer.commit()
    slow.error = None
    with pytest.raises(BrokenWriterError):
        writer.commit()
    check(path, 0)


def test_what_is_appended_may_be_changed_at_once(path, slow):
    """Arrays, packed arrays, tensors' memory, lists and ids are taken as they are at the time of the call."""
    ids, lengths = [0, 1], np.array([2, 3])
    packed, single, numbers = np.ones((5, 3), np.float32), np.ones((2, 3), np.uint16), [7, 8]
    rows = [np.full((2, 3), 2.0), np.full((3, 3), 3.0)]
    words = np.array(["a", "b"], object)
    writer = writer_at(path, background=True, commit_bytes=1)
    columns = {"token/p": packed, "token/r": rows, "example/s": single, "example/n": numbers, "example/w": words}
    writer.append(ids=ids, columns=columns, lengths={"token": lengths})
    for array in (packed, single, *rows, lengths):
        array.fill(0)
    words[:] = "changed"
    ids[0], numbers[0] = 99, 99
    columns.clear()
    slow.go_on.set()
    writer.close()
    run = open_run(path)
    assert run.ids == [0, 1]
    assert (run["token/p"].rows() == 1).all()
    assert [len(rows) for rows in run["token/p"][:]] == [2, 3]
    assert [sorted(set(rows.ravel())) for rows in run["token/r"][:]] == [[2.0], [3.0]]
    assert (run["example/s"].rows() == 1).all()
    assert run["example/n"][:] == [7, 8]
    assert run["example/w"][:] == ["a", "b"]


def test_what_is_drained_is_not_copied(path, monkeypatch):
    from tensortape.stores.ragged import Cells

    monkeypatch.setattr(Cells, "copied", None)
    with writer_at(path, background=True) as writer:
        columns = {"token/h": [ROW[:, None]]}
        writer.drain(ids=[0], columns=columns)
        assert columns == {}
    assert open_run(path).ids == [0]


def test_a_refused_append_changes_nothing(path):
    with writer_at(path, background=True) as writer:
        append(writer, 0)
        with pytest.raises(SchemaError):
            writer.append(ids=[1], columns={"token/h": [np.ones((3, 5), np.float16)]})
        append(writer, 1)
    check(path, 0, 1)


def test_an_interrupt_while_waiting_for_room_loses_only_that_append(path, slow, monkeypatch):
    """Ctrl-C when the disk is slow; the writer can be used afterwards and rows stay where they belong."""
    writer = writer_at(path, background=True, memory_budget=1 << 21, commit_bytes=1)
    append(writer, 0, rows=701)
    append(writer, 1)
    assert writer._background is not None

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer._background._change, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            append(writer, 2, rows=701)
    slow.go_on.set()
    append(writer, 3)
    append(writer, 2)
    writer.close()
    run = open_run(path)
    assert run.ids == [0, 1, 3, 2]
    assert [len(rows) for rows in run["token/h"][:]] == [701, 5, 5, 5]
    assert [float(rows[0, 0]) for rows in run["token/h"][:]] == [0, 1, 3, 2]


def test_an_interrupted_close_can_be_repeated(path, slow, monkeypatch):
    writer = writer_at(path, background=True)
    append(writer, 0)
    assert writer._background is not None

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer._background._change, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.close()
    slow.go_on.set()
    writer.close()
    check(path, 0)
    assert all(part.closed for part in open_run(path).parts)


def test_several_sets_of_columns_at_once(path):
    """Parts open while others are being written."""
    with writer_at(path, background=True, commit_bytes=1) as writer:
        for number in range(40):
            columns = {"token/h": [np.full((3, 2), number, np.float32)]}
            writer.append(ids=[number], columns=columns)
        for number in range(40):
            writer.append(ids=[number], columns={f"token/x{number % 5}": [np.full((3, 2), -number, np.float32)]})
    run = open_run(path)
    assert run.ids == list(range(40))
    for number in range(40):
        assert (run[f"token/x{number % 5}"][number] == -number).all()
    assert run.verify().ok


# --- processes ------------------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
import numpy as np
from tensortape.stores import RunWriter
from tensortape.stores.places import LocalPlace

replace = LocalPlace.replace
def slow(place, path, buffers):
    time.sleep(0.05)
    replace(place, path, buffers)

writer = RunWriter(sys.argv[1], durability="rename", background=True)
LocalPlace.replace = slow
wide = np.arange(1 << 19, dtype=np.float32).reshape(-1, 1 << 10)
for number in range(4):
    writer.append(ids=[number], columns={"token/h": [wide + number], "token/g": [wide - number]})
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("then", "code"), {"": 0, "1 / 0": 1, "raise SystemExit(3)": 3}.items())
def test_a_forgotten_writer_is_drained_at_exit(path, then, code):
    """Also of wide columns, for which several threads are used that cannot be had any more by then."""
    done = python(SLOW + then, path)
    assert done.returncode == code, done.stderr
    assert "cannot schedule" not in done.stderr
    run = open_run(path)
    assert run.ids == [0, 1, 2, 3]
    assert run["token/g"][3][0].tolist() == (np.arange(1 << 10, dtype=np.float32) - 3).tolist()
    assert all(part.closed for part in run.parts)


FORK = (
    SLOW
    + """
import os, json
child = os.fork()
if child == 0:
    writer.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
writer.append(ids=[4], columns={"token/h": [wide], "token/g": [wide]})
writer.close()
"""
)


def test_a_forked_child_never_commits(path):
    """It has no thread, and neither waits for one nor writes; the parent goes on."""
    done = python(FORK, path)
    assert done.returncode == 0, done.stderr
    run = open_run(path)
    assert run.ids == [0, 1, 2, 3, 4]
    assert len(run.parts) == 1
    assert run.verify().ok


MEMORY = """
import json, resource, sys, time
import numpy as np
from tensortape.stores import RunWriter
from tensortape.stores.places import LocalPlace

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
replace = LocalPlace.replace
def slow(place, path, buffers):
    time.sleep(0.01)
    replace(place, path, buffers)
LocalPlace.replace = slow
rows = np.ones((4, 257, 1024), np.float32)  # 4 MiB
before = peak()
with RunWriter(sys.argv[1], durability="rename", background=True, memory_budget=int(sys.argv[2]) << 20) as writer:
    for number in range(int(sys.argv[3])):
        columns = {"token/h": list(rows + number), "token/g": list(rows - number)}
        writer.drain(ids=[f"{number} {row}" for row in range(4)], columns=columns)
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
def test_memory_stays_in_the_budget_however_slow_the_disk(path, tmp_path):
    """480 MiB through a budget of 64 MiB; what is being appended comes on top."""
    done = python(MEMORY, path, 64, 60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) <= 64 + 32
