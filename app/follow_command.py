"""Following a run that is being recorded: a line whenever something was committed."""

from __future__ import annotations

import json
import time
from contextlib import suppress

import typer

from tensortape.stores import Run, open_run
from tensortape.stores.errors import NotARunError
from tensortape.stores.following import follow

from .show import Json, megabytes, printable

POLL = 0.5  # seconds between looks


def print_followed(path: str, *, as_json: bool) -> None:
    """Say what a run holds each time it holds more, until all of its writers have closed, or Ctrl-C is pressed.

    Args:
        path: of the run, which may be yet to come.
        as_json: an object per line.
    """
    with suppress(KeyboardInterrupt):
        for run in follow(_awaited(path), poll=POLL):
            found = _state(run)
            typer.echo(json.dumps(found) if as_json else _line(found))
        _say(f"{path}: closed")


def _line(found: Json) -> str:
    step = f"step {found['step']}: " if found["step"] is not None else ""
    return f"{step}{found['examples']} examples, {megabytes(found['bytes'])}, {found['commits']} commits"


def _say(text: str) -> None:
    """To someone who waits, and to no program that reads lines."""
    typer.echo(printable(text), err=True)


def _awaited(path: str) -> Run:
    """The run, once it is there."""
    waits = False
    while True:
        try:
            return open_run(path)
        except NotARunError as error:
            if not waits:
                _say(f"{error}; waiting for it")
            waits = True
            time.sleep(POLL)


def _state(run: Run) -> Json:
    step = run.last_step
    return {
        "step": step if step >= 0 else None,
        "examples": len(run),
        "bytes": run.nbytes,
        "commits": sum(part.commits for part in run.parts),
    }
