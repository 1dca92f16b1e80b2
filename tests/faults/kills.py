"""SIGKILL at random instants of processes that record, resume and add a column; what they had acknowledged is checked each time."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from .promises import broken, broken_after_resuming, torn_to_zarr
from .recipe import ADDED, Recipe, append, record
from .recipe import writing as writing_to

# Children are forked from a process that has imported what they need, so that kills hit the recording and not the imports.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["__main__", "pytest", "hypothesis.strategies", "tensortape.stores"])


def kills(folder: Path, count: int, appends: int, seed: int) -> Iterator[list[str]]:
    """So many kills; a run is killed, resumed and killed again until it is complete, and then the next one begins."""
    dice, killed, runs = random.Random(seed), 0, 0
    lifetime = _lifetime(folder / "timed.zarr", Recipe(seed, appends, 300))
    while killed < count:
        path, recipe = folder / f"run{runs}.zarr", Recipe(seed + runs, appends, 300)
        durability, every = dice.choice(["fsync", "rename"]), dice.randint(1, 3)
        acknowledged: set[int | str] = set()
        while ADDED not in acknowledged and killed < count:
            acknowledged |= _killed(path, recipe, every, durability, lifetime * dice.random())
            wrong = broken(path, recipe, acknowledged)
            if ADDED not in acknowledged:
                killed += 1
                yield wrong
        yield [*broken_after_resuming(path, recipe), *torn_to_zarr(path, recipe)]
        shutil.rmtree(path)
        runs += 1


def together(folder: Path, trials: int, writers: int, seed: int) -> Iterator[list[str]]:
    """P6: several processes write into one run at once, some are killed, a last one does what they left undone."""
    dice, path = random.Random(seed), folder / "run.zarr"
    for number in range(trials):
        recipe = Recipe(seed + number, 3 * writers, 100)
        with writing_to(path) as writer:
            append(writer, recipe, lambda what: None, share=slice(1))
        reading, writing = _PROCESSES.Pipe(duplex=False)
        children = [
            _PROCESSES.Process(target=_one_of, args=(path, recipe, slice(n, None, writers), writing)) for n in range(writers)
        ]
        for child in children:
            child.start()
        writing.close()
        for child in dice.sample(children, writers // 3):
            child.join(dice.random())
            child.kill()
        for child in children:
            child.join()
        with reading:
            acknowledged = list(_received(reading))
        wrong = broken(path, recipe, acknowledged)
        wrong += [f"a writer ended with {child.exitcode}" for child in children if child.exitcode not in (0, -signal.SIGKILL)]
        yield [*wrong, *broken_after_resuming(path, recipe)]
        shutil.rmtree(path)


def _one_of(path: Path, recipe: Recipe, share: slice, pipe: Connection) -> None:
    """One of several that belong together: writers of other sessions would close its part, taking it for gone."""
    with writing_to(path, session="six") as writer:
        append(writer, recipe, pipe.send, share=share)


def _killed(path: Path, recipe: Recipe, every: int, durability: str, seconds: float) -> set[int | str]:
    """What a child acknowledged that was killed after so many seconds."""
    reading, writing = _PROCESSES.Pipe(duplex=False)
    child = _PROCESSES.Process(target=_child, args=(path, recipe, every, durability, writing))
    child.start()
    writing.close()
    child.join(seconds)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "the child failed by itself"
    with reading:
        return set(_received(reading))


def _lifetime(path: Path, recipe: Recipe) -> float:
    """Seconds that a child takes which nobody kills; the very first one waits for the process that it is forked from."""
    for _ in range(2):
        began = time.monotonic()
        assert ADDED in _killed(path, recipe, 2, "fsync", 60)
        shutil.rmtree(path)
    return time.monotonic() - began


def _child(path: Path, recipe: Recipe, every: int, durability: str, pipe: Connection) -> None:
    record(path, recipe, pipe.send, every, durability=durability)


def _received(pipe: Connection) -> Iterator[int | str]:
    try:
        while True:
            yield pipe.recv()
    except EOFError:
        return
