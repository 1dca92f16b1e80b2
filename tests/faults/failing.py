"""The n-th file operation fails, for every n until a whole recording passes; what then stands on disk is checked each time."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, product
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from strategies import small_chunks

from tensortape.stores import StoreError, parts

from .layer import Meet, Operation, layer, state_of
from .promises import broken, broken_after_resuming
from .recipe import ADDED, Acknowledge, Recipe, append, record, writing

FEW = ("token/h",)
OLD, NEW = Recipe(11, 2, 9, FEW), Recipe(12, 2, 9, FEW)  # 45 token rows at most, which fill two shards of 16 and more


def fails(code: int) -> Meet:
    """The call is not made. Of `close` it is: a handle is gone whatever close says."""

    def meet(operation: Operation) -> Any:
        if operation.name == "close":
            operation.make()
        raise OSError(code, os.strerror(code), str(operation.paths[0]))

    return meet


def fails_though_done(operation: Operation) -> Any:
    """The call is made, but its success is not reported, as over a network."""
    result = operation.make()
    if operation.name == "read":
        result.close()
    if operation.name == "open":
        os.close(result)
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(operation.paths[0]))


def interrupted(operation: Operation) -> Any:
    """Control-C."""
    if operation.name == "close":
        operation.make()
    raise KeyboardInterrupt


def short(operation: Operation) -> Any:
    """A write takes a part of what it is given, and says so."""
    if operation.name != "writev":
        return operation.make()
    handle, buffers = operation.arguments
    content = b"".join(bytes(buffer) for buffer in buffers)
    return operation.make(handle, [content[: (len(content) + 1) // 2]])


def short_then_full(operation: Operation) -> Any:
    """A disk that fills up in the middle of a write."""
    if operation.name == "writev":
        short(operation)
    return fails(errno.ENOSPC)(operation)


FAULTS: dict[str, Meet] = {
    "EIO": fails(errno.EIO),
    "EIO, though done": fails_though_done,
    "ENOSPC": fails(errno.ENOSPC),
    "half a write, then ENOSPC": short_then_full,
    "EACCES": fails(errno.EACCES),
    "EINTR": fails(errno.EINTR),
    "KeyboardInterrupt": interrupted,
    "short write": short,
}
SURVIVED = {"short write"}


@dataclass
class Nth:
    """Makes every call but the n-th, to which the fault happens."""

    number: int
    fault: Meet
    calls: int = 0

    def __call__(self, operation: Operation) -> Any:
        """Meet one operation."""
        self.calls += 1
        return self.fault(operation) if self.calls == self.number else operation.make()


@dataclass
class Attempt:
    """One recording with a fault, and what became of it."""

    acknowledged: list[int | str] = field(default_factory=list)
    error: BaseException | None = None

    def run(self, job: Callable[[Path, Acknowledge], object], path: Path, meet: Meet) -> None:
        """Record, with every operation going through the layer."""
        try:
            with layer(path.parent, meet), _known_uuids(), small_chunks(shard_bytes=256):
                job(path, self.acknowledged.append)
        except (OSError, StoreError, KeyboardInterrupt) as error:
            self.error = error


@contextmanager
def _known_uuids() -> Iterator[None]:
    """The same names and identities in every attempt, so that what is left behind can be compared."""
    numbers = map(UUID, map("{:032x}".format, count(1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uuid, "uuid4", lambda: next(numbers))
        yield


def nth_operation(folder: Path, faults: Sequence[str], job: str, first: int = 1, step: int = 1) -> Iterator[list[str]]:
    """One trial per fault and n: what is wrong after the n-th operation of a job has failed."""
    start, run, wrong_after = JOBS[job]
    before, path = folder / "before" / "run.zarr", folder / "now" / "run.zarr"
    start(before)
    checked: dict[str, list[str]] = {}  # different faults often leave the same bytes behind
    for fault, number in product(faults, range(first, _operations(before, path, run) + 1, step)):
        shutil.copytree(before.parent, path.parent)
        attempt = Attempt()
        attempt.run(run, path, Nth(number, FAULTS[fault]))
        left = state_of(path.parent, attempt.acknowledged)
        wrong = _wrong(attempt, path, fault)
        if left not in checked:
            checked[left] = wrong_after(path, attempt.acknowledged)
        yield [f"{fault} at operation {number} of {job}: {one}" for one in (*wrong, *checked[left])]
        shutil.rmtree(path.parent)
    shutil.rmtree(before.parent)


def _operations(before: Path, path: Path, run: Callable[[Path, Acknowledge], object]) -> int:
    """How many operations the job has."""
    shutil.copytree(before.parent, path.parent)
    attempt, nth = Attempt(), Nth(0, fails_though_done)
    attempt.run(run, path, nth)
    assert attempt.error is None
    shutil.rmtree(path.parent)
    return nth.calls


def _wrong(attempt: Attempt, path: Path, fault: str) -> Iterator[str]:
    if attempt.error is None and ADDED not in attempt.acknowledged:
        yield "nothing is complete, and nobody was told"
    if attempt.error is not None and fault in SURVIVED:
        yield f"the caller got {attempt.error!r}"
    if any(path.parent.rglob("*.partial")):
        yield "an unfinished file was left behind"


def _nothing(path: Path) -> None:
    path.parent.mkdir(parents=True)


def _old_run(path: Path) -> None:
    _nothing(path)
    record(path, OLD, lambda number: None)


def _begun_run(path: Path) -> None:
    """One of the two appends, by a session that ended well; the added column is the next session's."""
    _nothing(path)
    with small_chunks(shard_bytes=256), writing(path) as writer:
        append(writer, replace(NEW, appends=1), lambda number: None)


def _record(path: Path, acknowledge: Acknowledge) -> None:
    record(path, NEW, acknowledge, durability="fsync")


def _record_by_threads(path: Path, acknowledge: Acknowledge) -> None:
    """As if all columns were wide: several threads write the shards of an append, and which operation is the n-th is up to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_WIDE_BYTES", 1)
        _record(path, acknowledge)


def _overwrite(path: Path, acknowledge: Acknowledge) -> None:
    record(path, NEW, acknowledge, mode="overwrite", durability="fsync")


def _after_recording(path: Path, acknowledged: list[int | str]) -> list[str]:
    return [*broken(path, NEW, acknowledged), *broken_after_resuming(path, NEW)]


def _after_resuming(path: Path, acknowledged: list[int | str]) -> list[str]:
    return _after_recording(path, [0, *acknowledged])


def _after_overwriting(path: Path, acknowledged: list[int | str]) -> list[str]:
    """The old run is whole, where it was or aside, and a new one can be begun or gone on with."""
    aside = [*path.parent.glob("run.zarr.old-*")]
    wrong = broken(aside[0] if aside else path, OLD, [0, 1, ADDED])
    if not aside:
        shutil.rmtree(path)
    return [*wrong, *_after_recording(path, acknowledged)]


# What is there before, what is done, and what must hold afterwards.
JOBS = {
    "recording": (_nothing, _record, _after_recording),
    "recording by threads": (_nothing, _record_by_threads, _after_recording),
    "resuming": (_begun_run, _record, _after_resuming),
    "overwriting": (_old_run, _overwrite, _after_overwriting),
}


@contextmanager
def _signals(seconds: float) -> Iterator[list[int]]:
    """A signal again and again, with a handler that does nothing: system calls are interrupted for real."""
    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: came.append(number))
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield came
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def signal_storm(folder: Path, trials: int) -> Iterator[list[str]]:
    """A recording under a signal every half millisecond is the recording it would have been."""
    for number in range(trials):
        path, recipe = folder / "run.zarr", Recipe(number, 10, 300)
        with _signals(0.0005) as came:
            record(path, recipe, lambda what: None, durability="fsync")
        assert came
        yield broken(path, recipe, [*range(recipe.appends), ADDED])
        shutil.rmtree(path)
