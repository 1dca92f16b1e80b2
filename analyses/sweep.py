"""One reading of a run for any number of statistics: in this thread, in threads, in processes or on a cluster, with the same bits.

A `Source` cuts what is to be read into pieces that depend on the run alone. Each piece is read by one task, which updates empty
accumulators with its blocks; the states are then merged in the order of the pieces. Who computed a piece, and when, is no matter.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from tensortape.stores.derived import Derived
from tensortape.stores.dtypes import Array

SAVE_SECONDS = 30.0
_AHEAD = 2  # pieces per core that are read or wait to be merged


@dataclass(frozen=True)
class Block:
    """Some rows: one array [n, *feature] per column, the rows' numbers, and what is known of each row."""

    values: tuple[Array, ...]
    rows: Array
    tags: Mapping[str, Array]


class Accumulator:
    """A statistic of rows, built up block by block. `state` names the attributes that hold it, numpy arrays that start as a zero.

    Sums are kept in float64 (or integers) and added up in a fixed order, so a result has the same bits whoever computed it. An
    accumulator has to be picklable; what it was made with is not state and never changes.
    """

    state: ClassVar[tuple[str, ...]] = ()
    key: str | None = None  # what tells it from all others of the run; with a key it is kept in the run, and not computed twice

    def init(self) -> Self:
        """An empty one that was made with the same."""
        empty = copy(self)
        for name in self.state:
            setattr(empty, name, np.zeros(()))
        return empty

    def update(self, block: Block) -> None:
        """Take a block into account."""
        raise NotImplementedError

    def merge(self, other: Self) -> None:
        """Take into account what another has seen, all of which comes after what this one has; by default states are sums."""
        for name in self.state:
            self.add(name, getattr(other, name))

    def add(self, name: str, value: Any) -> None:
        """Add to an attribute, in place once it has its shape."""
        held = getattr(self, name)
        if held.ndim and held.dtype == np.result_type(held, value):
            held += value
        else:
            setattr(self, name, held + value)

    def finalize(self) -> Any:
        """The result."""
        return self


class Piece(Protocol):
    """What one task reads. Picklable, and small."""

    def blocks(self) -> Iterator[Block]:
        """Its blocks, in order."""


class Source(Protocol):
    """What is to be read, in pieces that depend on the run alone."""

    def pieces(self) -> Sequence[Any]:
        """All pieces, in order; each is a `Piece`."""


@dataclass(frozen=True)
class Job:
    """Accumulators that share one reading of a source.

    Args:
        source: what to read.
        accumulators: what to make of it; they stay as they are.
    """

    source: Source
    accumulators: tuple[Accumulator, ...]


def sweep(
    jobs: Sequence[Job], executor: Executor | None = None, *, kept: Derived | None = None, title: str = "reading"
) -> list[list[Any]]:
    """What the accumulators of each job make of its source, finalized.

    Args:
        jobs: any number of them; their pieces are read side by side.
        executor: `ThreadPoolExecutor`, `ProcessPoolExecutor`, dask's `client.get_executor()` or any other; threads of this process
            if not given. All of them give the same bits on the same kind of processor.
        kept: the run's store of derived numbers, for jobs with a key.
        title: of the progress bar, which is shown on a terminal.
    """
    tallies = [_Tally(job, kept) for job in jobs]
    total = sum(len(tally.pieces) for tally in tallies)
    with (
        _workers(executor) as pool,
        _one_core_each(),
        tqdm(total=total, desc=title, unit="piece", disable=None, leave=False) as bar,
    ):
        try:
            _run(tallies, pool, bar)
        finally:
            for tally in tallies:
                tally.save()
    return [tally.results() for tally in tallies]


def work(piece: Piece, accumulators: Sequence[Accumulator], parent: int) -> list[Accumulator]:
    """One task: empty accumulators, updated with the blocks of a piece."""
    if os.getpid() != parent:
        os.environ["OMP_NUM_THREADS"] = "1"  # for good, also for what is not imported yet: the process is a worker
        threadpool_limits(1)
    found = [accumulator.init() for accumulator in accumulators]
    for block in piece.blocks():
        for accumulator in found:
            accumulator.update(block)
    return found


class _Tally:
    """How far a job has come."""

    def __init__(self, job: Job, kept: Derived | None) -> None:
        self._kept = kept
        self._every = [accumulator.init() for accumulator in job.accumulators]
        self.merged = [accumulator for accumulator in self._every if not self._restore(accumulator)]
        self.empty = [accumulator.init() for accumulator in self.merged]
        self.pieces = job.source.pieces() if self.merged else []
        self.done = self._saved = 0
        self._since = time.monotonic()
        self._resume()

    def add(self, found: Sequence[Accumulator]) -> None:
        """Merge what the next piece gave."""
        for mine, other in zip(self.merged, found, strict=True):
            mine.merge(other)
        self.done += 1
        if time.monotonic() - self._since > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Keep what there is, unless it is kept already."""
        if self._kept is None or self.done == self._saved:
            return
        if self.done == len(self.pieces):
            for accumulator in self.merged:
                if accumulator.key is not None:
                    self._kept.save(accumulator.key, _state(accumulator))
            self._kept.remove(self._unfinished)
        elif self._unfinished:
            state = {f"{n}.{name}": value for n, one in enumerate(self.merged) for name, value in _state(one).items()}
            self._kept.save(self._unfinished, {**state, "done": np.array(self.done)})
        self._saved, self._since = self.done, time.monotonic()

    def results(self) -> list[Any]:
        return [accumulator.finalize() for accumulator in self._every]

    @property
    def _unfinished(self) -> str:
        """The key of what there is of them all; empty if any has no key."""
        keys = [accumulator.key for accumulator in self.merged]
        return "" if None in keys else f"unfinished, in {len(self.pieces)} pieces: {keys}"

    def _restore(self, accumulator: Accumulator) -> bool:
        """Take over what is kept of an accumulator; whether there is anything."""
        held = None if self._kept is None or accumulator.key is None else self._kept.load(accumulator.key)
        for name in accumulator.state if held is not None else ():
            setattr(accumulator, name, held[name])  # type: ignore[index]
        return held is not None

    def _resume(self) -> None:
        held = self._kept.load(self._unfinished) if self._kept is not None and self.merged and self._unfinished else None
        if held is not None:
            self.done = self._saved = int(held["done"])
            for number, accumulator in enumerate(self.merged):
                for name in accumulator.state:
                    setattr(accumulator, name, held[f"{number}.{name}"])


def _state(accumulator: Accumulator) -> dict[str, Array]:
    return {name: np.asarray(getattr(accumulator, name)) for name in accumulator.state}


def _run(tallies: Sequence[_Tally], pool: Executor, bar: Any) -> None:
    """Read what is left of all jobs, a few pieces ahead of the one that is merged next."""
    left = iter([(tally, number) for tally in tallies for number in range(tally.done, len(tally.pieces))])
    waiting: deque[tuple[_Tally, Future[list[Accumulator]]]] = deque()
    ahead = _AHEAD * getattr(pool, "_max_workers", os.cpu_count() or 1)
    bar.update(sum(tally.done for tally in tallies))
    try:
        while True:
            for tally, number in _first(left, ahead - len(waiting)):
                waiting.append((tally, pool.submit(work, tally.pieces[number], tally.empty, os.getpid())))
            if not waiting:
                return
            tally, future = waiting.popleft()
            tally.add(future.result())
            bar.update()
    finally:
        for _, future in waiting:
            future.cancel()


def _first(items: Iterator[Any], count: int) -> Iterator[Any]:
    for _, item in zip(range(count), items, strict=False):
        yield item


@contextmanager
def _workers(executor: Executor | None) -> Iterator[Executor]:
    if executor is not None:
        yield executor
        return
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield pool


_lock = threading.Lock()
_sweeps = 0
_limit: Any = None


@contextmanager
def _one_core_each() -> Iterator[None]:
    """Let the linear algebra of this process use one thread per task, so that its sums do not depend on how many there are."""
    global _sweeps, _limit
    with _lock:
        if not _sweeps:
            _limit = threadpool_limits(1)
        _sweeps += 1
    try:
        yield
    finally:
        with _lock:
            _sweeps -= 1
            if not _sweeps:
                _limit.restore_original_limits()
