"""`tensortape info --follow` beside a process that records."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Process = subprocess.Popen[str]
Start = Callable[..., Process]

WRITER = """
import sys
import numpy as np
from tensortape.stores import RunWriter

with RunWriter(sys.argv[1], durability="rename") as writer:
    for line in sys.stdin:
        step = int(line)
        writer.append(ids=["a", "b"], columns={"token/h": [np.ones((5, 3), np.float32), np.ones((2, 3), np.float32)]}, step=step)
        writer.append_steps(steps=[step], columns={"step/loss": [1.0]})
        writer.commit()
"""


def heed_interrupts() -> None:
    """What a shell starts in the background is deaf to Control-C, and so is all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python processes; ends them."""
    started: list[Process] = []

    def begin(*words: Any, **options: Any) -> Process:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options["preexec_fn"] = heed_interrupts
        started.append(subprocess.Popen([sys.executable, *map(str, words)], **{**pipes, **options}))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def commit(writer: Process, step: int) -> None:
    assert writer.stdin is not None
    writer.stdin.write(f"{step}\n")
    writer.stdin.flush()


def seen(follower: Process, step: int, examples: int) -> dict[str, Any]:
    """What the follower says once it has seen a step and all of its examples, which are committed one after the other."""
    assert follower.stdout is not None
    for line in follower.stdout:
        found: dict[str, Any] = json.loads(line)
        if (found["step"], found["examples"]) == (step, examples):
            return found
    raise AssertionError(f"it ended before step {step}")


def test_from_before_the_first_commit_to_the_last(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    follower = start("-m", "tensortape.app.cli", "info", path, "--follow", "--json")
    assert follower.stderr is not None
    assert "there is no folder with anything in it; waiting for it" in follower.stderr.readline()
    writer = start("-c", WRITER, path)
    for number, step in enumerate((3, 7, 20), 1):
        commit(writer, step)
        found = seen(follower, step, 2 * number)
        assert found["commits"] >= number
        assert found["bytes"] >= number * 7 * 3 * 4
    writer.communicate()  # closes what it is told by, and so its run
    assert follower.wait() == 0
    assert "closed" in follower.stderr.read()


def test_someone_who_has_seen_enough(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writer = start("-c", WRITER, path)
    follower = start("-m", "tensortape.app.cli", "info", path, "--follow")
    commit(writer, 4)
    assert follower.stdout is not None
    line = next(line for line in follower.stdout if line.startswith("step 4: 2 examples, "))
    assert line.rstrip().endswith(" commits")
    follower.send_signal(signal.SIGINT)
    assert follower.wait(timeout=60) == 0
    assert follower.stderr is not None
    assert "Traceback" not in follower.stderr.read()


def test_a_run_that_is_closed(start: Start, tmp_path: Path) -> None:
    """One line, and the end."""
    path = tmp_path / "run.zarr"
    start("-c", WRITER, path).communicate("1\n")
    out, err = start("-m", "tensortape.app.cli", "info", path, "--follow", "--json").communicate()
    assert [json.loads(line)["examples"] for line in out.splitlines()] == [2]
    assert err.endswith("closed\n")
