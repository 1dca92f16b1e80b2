"""SIGTERM: everything appended is committed and the process leaves with 143, unless the program has plans of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from strategies import writer_at

from tensortape.stores import open_run, termination


@pytest.fixture(autouse=True)
def nobody_watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever writers of other tests have left: these tests begin with Python's own handling of SIGTERM, and no writer open."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(termination, "_open", 0)
    yield
    signal.signal(signal.SIGTERM, before)


BEGIN = """
import os, pathlib, signal, sys, threading, time
import numpy as np
from tensortape.stores import RunWriter
from tensortape.stores.places import LocalPlace

path, background = pathlib.Path(sys.argv[1]), sys.argv[2] == "background"

def writer(name="run"):
    return RunWriter(path / f"{name}.zarr", background=background, commit_seconds=1e9)

def append(writer, number):
    writer.append(ids=[number], columns={"token/h": [np.full((3, 5), number, np.float32)]})
    print(number, flush=True)
"""

LOOP = (
    BEGIN
    + """
with writer() as first:
    for number in range(10**9):
        append(first, number)
"""
)

MIDDLE = (
    BEGIN
    + """
replace = LocalPlace.replace
def slow(place, name, buffers):
    print("busy", flush=True)
    time.sleep(0.02)
    replace(place, name, buffers)

first = writer()
append(first, 0)
append(first, 1)
LocalPlace.replace = slow
first.commit()
append(first, 2)
print("never here", flush=True)
time.sleep(60)
"""
)

CLOSING = MIDDLE.replace("first.commit()", "first.close()")

TWO = (
    BEGIN
    + """
first, second = writer("first"), writer("second")
append(first, 0)
append(second, 1)
first.close()
append(second, 2)
print("ready", flush=True)
time.sleep(60)
"""
)

OWN = (
    BEGIN
    + """
def mine(*_):
    print("mine", flush=True)
    os._exit(5)

signal.signal(signal.SIGTERM, mine)
first = writer()
append(first, 0)
first.commit()
append(first, 1)
print("ready", flush=True)
time.sleep(60)
"""
)

THREAD = (
    BEGIN
    + """
def work():
    first = writer()
    append(first, 0)
    first.commit()
    print("ready", flush=True)
    time.sleep(60)

threading.Thread(target=work, daemon=True).start()
time.sleep(60)
"""
)

CHILD = (
    BEGIN
    + """
first = writer()
append(first, 0)
child = os.fork()
if child == 0:
    print("ready", flush=True)
    time.sleep(60)
    os._exit(1)
time.sleep(0.1)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
append(first, 1)
first.close()
"""
)


def told(code: str, folder: Path, kind: str, until: str) -> tuple[int, list[str], float]:
    """Run a program, send SIGTERM once it has said something; its status, what it has said, and the seconds it took to leave."""
    with subprocess.Popen([sys.executable, "-c", code, folder, kind], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        said = []
        for line in program.stdout:
            said.append(line.strip())
            if said[-1] == until:
                break
        began = time.monotonic()
        program.send_signal(signal.SIGTERM)
        said += program.stdout.read().split()
        return program.wait(), said, time.monotonic() - began


KINDS = pytest.mark.parametrize("kind", ["background", "foreground"])


@KINDS
def test_everything_appended_is_committed(tmp_path, kind):
    """In a loop without a pause, at whatever line the signal comes."""
    status, said, seconds = told(LOOP, tmp_path, kind, "29")
    assert status == 143
    assert seconds < 20
    run = open_run(tmp_path / "run.zarr")
    # What was said was appended; the last append may have been done without being said.
    assert run.ids[: len(said)] == [int(number) for number in said]
    assert len(run) - len(said) in (0, 1)
    assert [float(rows[0, 0]) for rows in run["token/h"][:]] == run.ids
    assert all(part.closed for part in run.parts)
    assert run.verify().ok


@KINDS
@pytest.mark.parametrize("code", [MIDDLE, CLOSING], ids=["commit", "close"])
def test_a_commit_is_finished_first(tmp_path, kind, code):
    status, said, _ = told(code, tmp_path, kind, "busy")
    assert status == 143
    assert "never" not in said
    run = open_run(tmp_path / "run.zarr")
    assert run.ids == [0, 1]
    assert all(part.closed for part in run.parts)
    assert run.verify().ok


@KINDS
def test_every_open_writer_commits(tmp_path, kind):
    status, *_ = told(TWO, tmp_path, kind, "ready")
    assert status == 143
    assert [open_run(tmp_path / f"{name}.zarr").ids for name in ("first", "second")] == [[0], [1, 2]]


@KINDS
def test_a_handler_of_the_programs_own_is_left_alone(tmp_path, kind):
    status, said, _ = told(OWN, tmp_path, kind, "ready")
    assert status == 5
    assert said[-1] == "mine"
    assert open_run(tmp_path / "run.zarr").ids == [0]


@KINDS
def test_a_writer_in_a_thread_leaves_signals_alone(tmp_path, kind):
    """Python has handlers in the main thread only; what was committed stands."""
    status, *_ = told(THREAD, tmp_path, kind, "ready")
    assert status == -signal.SIGTERM
    assert open_run(tmp_path / "run.zarr").ids == [0]


@KINDS
def test_a_forked_child_ends_as_it_always_did(tmp_path, kind):
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert open_run(tmp_path / "run.zarr").ids == [0, 1]


# --- in this process ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def default_disposition() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_default_is_back_when_the_last_writer_is_closed(tmp_path):
    first, second = writer_at(tmp_path / "a.zarr"), writer_at(tmp_path / "b.zarr")
    first.close()
    assert signal.getsignal(signal.SIGTERM) is termination._exit
    second.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_that_came_later_stays(tmp_path):
    def mine(*_: object) -> None: ...

    with writer_at(tmp_path / "a.zarr"):
        signal.signal(signal.SIGTERM, mine)
    assert signal.getsignal(signal.SIGTERM) is mine


def test_a_writer_that_another_thread_closed_does_not_keep_the_next_one_from_watching(tmp_path):
    writer = writer_at(tmp_path / "a.zarr")
    closing = threading.Thread(target=writer.close)
    closing.start()
    closing.join()
    writer_at(tmp_path / "b.zarr").close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_error_does_not_swallow_the_signal(tmp_path):
    """It came while something was written that then failed."""

    def write() -> None:
        with termination.postponed():
            os.kill(os.getpid(), signal.SIGTERM)
            raise OSError("the disk is full")

    with writer_at(tmp_path / "a.zarr"), pytest.raises(SystemExit) as caught:
        write()
    assert caught.value.code == 143
    assert isinstance(caught.value.__context__, OSError)


def test_blocks_within_one_another_wait_for_the_outermost(tmp_path):
    done = []

    def write() -> None:
        with termination.postponed():
            with termination.postponed():
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(1)

    with writer_at(tmp_path / "a.zarr"), pytest.raises(SystemExit):
        write()
    assert done == [1]
