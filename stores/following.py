"""Following a run that is still being written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .reader import Run


def follow(run: Run, *, timeout: float | None = None, poll: float = 0.5) -> Iterator[Run]:
    """The run, refreshed whenever something was committed, until all of its writers have closed.

    Raises:
        TimeoutError: after so many seconds in which nothing was committed.
    """
    seen, deadline = -1, _in(timeout)
    while True:
        run.refresh()
        commits = sum(part.commits for part in run.parts)
        if commits != seen:
            seen, deadline = commits, _in(timeout)
            yield run
        if run.parts and all(part.closed for part in run.parts) and run.parts[-1].kind != "sealed":
            return  # whoever has sealed the last part, of a writer that was killed, is about to write another one
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run.path}: nothing was committed for {timeout} s; the last step is {run.last_step}")
        time.sleep(poll)


def _in(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout
