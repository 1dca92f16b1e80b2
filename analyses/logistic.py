"""Logistic regression to its optimum, many at once, on rows that need not fit in memory.

Each minimises mean cross-entropy + |W|^2 / (2 C n) of standardised features, the bias free: scikit-learn's LogisticRegression
after a StandardScaler. First on a sample of the rows that is held in memory, by L-BFGS; the curvature of that sample at its
optimum then makes coordinates in which L-BFGS needs few readings of all rows to get to the optimum of all of them. All tasks take
part in each reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from tensortape.stores.dtypes import Array

from .coordinates import Coordinates, Frame, bound
from .descent import Descent
from .gram import Sums
from .losses import Curvatures, Losses, Weighted
from .rows import Rows
from .sweep import Block, Job, Source, sweep
from .tasks import Probe, Task

TOLERANCE = 3e-7  # of the objective: how far above the minimum to stop
ROUGH = 1e-5  # the same, on a sample
PASSES = 300
SAMPLE = 50  # rows per parameter
HELD_BYTES = 256 << 20  # rows that take less, as float32, are read once and held


@dataclass(frozen=True)
class Fit:
    """One task to be fitted, to so many rows; features are scaled by the sums of some rows.

    Args:
        tolerance: of the objective, how far above its minimum to stop.
        like: tasks of the same rows with the same name here are as curved as one another, so that the curvature of one does for
            all.
    """

    task: Task
    count: int
    sums: Sums
    strength: float
    tolerance: float = TOLERANCE
    like: str | None = None

    @property
    def penalty(self) -> float:
        """Of the mean cross-entropy."""
        return self.strength / self.count


class Climb:
    """One task on its way down, in some coordinates.

    Args:
        fit: what is fitted.
        coordinates: to move in.
        start: parameters [width, d + 1] to begin at.
        count: training rows it is evaluated on, if not all of them.
    """

    def __init__(self, fit: Fit, coordinates: Coordinates, start: Array, count: int | None = None) -> None:
        self._fit, self._count, self._coordinates = fit, count or fit.count, coordinates
        self._tolerance = fit.tolerance if count is None else max(fit.tolerance, ROUGH)
        self._frame = Frame(fit.sums)
        self._descent = Descent(coordinates.point(start))
        self._penalties = np.full(start.shape[1], fit.penalty)
        self._penalties[-1] = fit.penalty if fit.task.penalise_bias else 0
        self._calm = self.passes = 0
        self.gap = float("inf")

    @property
    def trial(self) -> Weighted:
        """The task where it is to be evaluated next."""
        return Weighted(self._fit.task, self._frame, self._coordinates.parameters(self._descent.trial))

    @property
    def best(self) -> Weighted:
        """The task where it has been found lowest."""
        return Weighted(self._fit.task, self._frame, self._coordinates.parameters(self._descent.at))

    def tell(self, value: float, by_weights: Array, by_bias: Array) -> None:
        """What was found there, summed over the training rows: the loss, and its slopes by weights [width, d] and bias [width]."""
        parameters = self.trial.parameters
        slope = self._frame.slope(by_weights, by_bias) / self._count + self._penalties * parameters
        objective = value / self._count + 0.5 * float((self._penalties * parameters**2).sum())
        before = self._descent.value
        self._descent.tell(objective, self._coordinates.slope(slope))
        self.passes += 1
        if self._descent.value == objective:
            self.gap = self._duality_gap(slope, parameters)
            self._calm = self._calm + 1 if before - objective < 0.1 * self._tolerance * abs(objective) else 0

    @property
    def converged(self) -> bool:
        """Whether the objective is at its minimum, as far as its slope and its last steps tell."""
        near = self._descent.remaining < self._tolerance * abs(self._descent.value)
        return self.passes > 0 and (near or self._calm >= 3)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to try."""
        return self.converged or self.passes >= PASSES

    @property
    def probe(self) -> Probe:
        """The classifier, as it is now."""
        weights, bias = self._frame.weights(self.best.parameters)
        if self._fit.task.width == 1:
            weights, bias = (np.concatenate([np.zeros_like(one), one], -1) for one in (weights, bias))
        return Probe(self._fit.sums.shift, weights, bias, self._descent.value, self.gap, self.passes, self.converged)

    def _duality_gap(self, slope: Array, parameters: Array) -> float:
        """Primal less dual objective, for the dual point of the residuals: |slope|^2 / (2 penalty), and what a free bias leaves."""
        penalised = self._penalties > 0
        free = np.abs((slope * parameters)[:, ~penalised].sum())
        return float((slope[:, penalised] ** 2).sum() / (2 * self._fit.penalty) + free)


def fit(rows: Rows, fits: Sequence[Fit], executor: Executor | None = None) -> list[Probe]:
    """Bring all fits to their optimum."""
    source: Rows | Held = held(rows) if executor is None and _bytes(rows) <= HELD_BYTES else rows
    sample = held(replace(rows, wanted=_sample(rows, fits)))
    rough = [_rough(one, sample) for one in fits]
    _descend(sample, rough, None)
    climbs = []
    curved: dict[str, Coordinates] = {}
    for number, (one, begun) in enumerate(zip(fits, rough, strict=True)):
        name = one.like or str(number)
        curved[name] = curved[name] if name in curved else _curved(one, begun, sample)
        climbs.append(Climb(one, curved[name], begun.best.parameters))
    _descend(source, climbs, executor)
    return [climb.probe for climb in climbs]


@dataclass(frozen=True)
class Held:
    """A source whose blocks are in memory."""

    blocks_of_pieces: Sequence[Sequence[Block]]

    def pieces(self) -> list[HeldPiece]:
        """The pieces they were read from."""
        return [HeldPiece(blocks) for blocks in self.blocks_of_pieces]

    def count(self, task: Task) -> int:
        """Training rows of a task."""
        return sum(int(task.trained.rows(block.tags).sum()) for blocks in self.blocks_of_pieces for block in blocks)


@dataclass(frozen=True)
class HeldPiece:
    """A piece whose blocks are in memory."""

    held: Sequence[Block]

    def blocks(self) -> Iterator[Block]:
        """Its blocks."""
        return iter(self.held)


def held(source: Source) -> Held:
    """Read a source once, for several readings of it."""
    return Held([list(piece.blocks()) for piece in source.pieces()])


def _descend(source: Source, climbs: Sequence[Climb], executor: Executor | None) -> None:
    while left := [climb for climb in climbs if not climb.done]:
        [[found]] = sweep([Job(source, (Losses([climb.trial for climb in left]),))], executor, title="fitting")
        for number, climb in enumerate(left):
            columns = slice(found.bounds[number], found.bounds[number + 1])
            climb.tell(float(found.values[number]), found.slopes[columns], found.offsets[columns])


def _rough(one: Fit, sample: Held) -> Climb:
    start = np.zeros((one.task.width, len(one.sums.shift) + 1))
    return Climb(one, bound(one.sums, one.penalty, one.task.width), start, max(sample.count(one.task), 1))


def _curved(one: Fit, begun: Climb, sample: Held) -> Coordinates:
    """Coordinates from the curvature of a sample at its optimum."""
    [[blocks]] = sweep([Job(sample, (Curvatures(begun.best),))])
    penalties = np.full(len(one.sums.shift) + 1, one.penalty)
    penalties[-1] = one.penalty if one.task.penalise_bias else 0
    floor = 1e-6 * blocks.max()  # a bias that all classes share has no curvature
    every = np.tile(penalties + floor, blocks.shape[1] // len(penalties))
    return Coordinates([block + np.diag(every) for block in blocks])


def _sample(rows: Rows, fits: Sequence[Fit]) -> Array:
    """Rows in which every task has as many training rows as its parameters need, or all of its own; bool."""
    draw = np.random.default_rng(0).random(len(rows))
    tags: Mapping[str, Array] = rows.tags
    found = np.zeros(len(draw), bool)
    for one in fits:
        needed = SAMPLE * one.task.width * (len(one.sums.shift) + 1)
        found |= one.task.trained.rows(tags) & (draw < needed / max(one.count, 1))
    return found


def _bytes(rows: Rows) -> int:
    count = len(rows) if rows.wanted is None else int(rows.wanted.sum())
    return 4 * count * int(np.prod(rows.columns[0].shape[1:]))
