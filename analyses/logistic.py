"""Logistic regression to its optimum, many at once, on rows that need not fit in memory.

Each minimises mean cross-entropy + |W|^2 / (2 C n) of standardised features, the bias free: scikit-learn's LogisticRegression
after a StandardScaler. Steps are L-BFGS in coordinates in which the curvature is at most 1: by Boehning's bound (1992) the
Hessian of softmax regression is at most 1/2 (of two classes 1/4) times the covariance of the features, the Cholesky factor of
which therefore makes a good preconditioner. All tasks take part in each reading of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from tensortape.stores.dtypes import Array

from .descent import Descent
from .gram import Sums, chosen, features
from .rows import Rows
from .sweep import Accumulator, Block, Job, sweep
from .tasks import Probe, Selection, Task

TOLERANCE = 1e-7  # of the objective: how far above the minimum to stop
PASSES = 300
_CALM = 1e-8  # a step that gains less of the objective is none


@dataclass(frozen=True)
class Weighted:
    """A task with weights to evaluate: logits of a row x are (x - shift) @ weights + bias; [d, width] and [width]."""

    task: Task
    weights: Array
    bias: Array


class Losses(Accumulator):
    """Cross-entropy (nats) of each task, and its derivatives by weights and bias, summed over training rows.

    Tasks trained on the same rows share the selection of these, and one matrix product.
    """

    state = ("values", "slopes", "offsets")
    values: Array
    slopes: Array
    offsets: Array

    def __init__(self, tasks: Sequence[Weighted], shift: Array) -> None:
        self.tasks, self.shift = tuple(tasks), shift
        self.bounds = np.cumsum([0, *(one.task.width for one in tasks)])
        self.weights = np.concatenate([one.weights for one in tasks], 1)
        self.bias = np.concatenate([one.bias for one in tasks])
        self.cohorts = _cohorts([one.task for one in tasks])

    def update(self, block: Block) -> None:
        """Losses and slopes of a block."""
        x = features(block)
        x = x - self.shift.astype(x.dtype)
        values, slopes = np.zeros(len(self.tasks)), np.zeros((self.bounds[-1], x.shape[1]))
        offsets = np.zeros(self.bounds[-1])
        for numbers in self.cohorts:
            here = self.tasks[numbers[0]].task.trained.rows(block.tags)
            rows = chosen(x, here)
            columns = np.concatenate([np.arange(self.bounds[n], self.bounds[n + 1]) for n in numbers])
            logits = rows @ self.weights[:, columns].astype(x.dtype) + self.bias[columns].astype(x.dtype)
            at = 0
            for number in numbers:
                task = self.tasks[number].task
                values[number] = _to_residuals(logits[:, at : at + task.width], block.tags[task.labels][here])
                at += task.width
            slopes[columns], offsets[columns] = logits.T @ rows, logits.sum(0, dtype=np.float64)
        for name, value in (("values", values), ("slopes", slopes), ("offsets", offsets)):
            self.add(name, value)


class Coordinates:
    """Of tasks on the same rows: between weights of centred rows and coordinates [width, d + 1] in which the curvature is at most
    about 1."""

    def __init__(self, sums: Sums, penalty: float, width: int) -> None:
        self.shift, self.offset, self.scale = sums.shift, sums.offset, sums.deviation
        self.penalty = penalty
        self.bound = 0.25 if width == 1 else 0.5
        correlation = sums.covariance / np.outer(self.scale, self.scale)
        self._factor = np.linalg.cholesky(self.bound * correlation + self.penalty * np.eye(len(self.scale)))

    def standardised(self, point: Array) -> tuple[Array, Array]:
        """Weights [d, width] and bias of standardised features."""
        return solve_triangular(self._factor, point[:, :-1].T, lower=True, trans="T"), point[:, -1] / np.sqrt(self.bound)

    def weights(self, point: Array) -> tuple[Array, Array]:
        """Weights [d, width] and bias of rows less the shift."""
        standard, bias = self.standardised(point)
        weights = standard / self.scale[:, None]
        return weights, bias - self.offset @ weights

    def slope(self, standard: Array, bias: Array) -> Array:
        """The slope by coordinates, from the slopes by weights and bias of standardised features."""
        by_weights = solve_triangular(self._factor, standard, lower=True).T
        return np.concatenate([by_weights, (bias / np.sqrt(self.bound))[:, None]], 1)


class Fit:
    """One task on its way to the optimum."""

    def __init__(self, task: Task, count: int, coordinates: Coordinates, tolerance: float = TOLERANCE) -> None:
        self.task, self.coordinates, self.tolerance = task, coordinates, tolerance
        self.descent = Descent(np.zeros((task.width, len(coordinates.shift) + 1)))
        self.gap, self.passes = float("inf"), 0
        self._count, self._calm = count, 0

    @property
    def weighted(self) -> Weighted:
        """The task at the point to be tried."""
        return Weighted(self.task, *self.coordinates.weights(self.descent.trial))

    def tell(self, value: float, slope: Array, offset: Array) -> None:
        """At that point, summed over the training rows: the loss, and its slopes by weights [width, d] and bias [width]."""
        at = self.coordinates
        weights, bias = at.standardised(self.descent.trial)
        by_weights = ((slope - np.outer(offset, at.offset)) / at.scale).T / self._count + at.penalty * weights
        penalty = at.penalty if self.task.penalise_bias else 0.0
        by_bias = offset / self._count + penalty * bias
        objective = value / self._count + 0.5 * at.penalty * float((weights**2).sum()) + 0.5 * penalty * float((bias**2).sum())
        before = self.descent.value
        self.descent.tell(objective, at.slope(by_weights, by_bias))
        self.passes += 1
        if self.descent.value == objective:
            self.gap = float((by_weights**2).sum() / (2 * at.penalty)) + abs(float(bias @ by_bias))
            self._calm = self._calm + 1 if before - objective < _CALM * abs(objective) else 0

    @property
    def converged(self) -> bool:
        """Whether the objective is at its minimum, as far as its slope and its last steps tell."""
        return self.passes > 0 and (self.descent.remaining < self.tolerance * abs(self.descent.value) or self._calm >= 3)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to try."""
        return self.converged or self.passes >= PASSES

    @property
    def probe(self) -> Probe:
        """The classifier, as it is now."""
        weights, bias = self.coordinates.weights(self.descent.at)
        if self.task.width == 1:
            weights, bias = (np.concatenate([np.zeros_like(one), one], -1) for one in (weights, bias))
        return Probe(self.coordinates.shift, weights, bias, self.descent.value, self.gap, self.passes, self.converged)


def fit(rows: Rows, fits: Sequence[Fit], shift: Array, executor: Executor | None = None) -> list[Probe]:
    """Bring all fits to their optimum; they share every reading of the rows."""
    while left := [one for one in fits if not one.done]:
        [[found]] = sweep([Job(rows, (Losses([one.weighted for one in left], shift),))], executor, title="fitting")
        for number, one in enumerate(left):
            columns = slice(found.bounds[number], found.bounds[number + 1])
            one.tell(float(found.values[number]), found.slopes[columns], found.offsets[columns])
    return [one.probe for one in fits]


def _cohorts(tasks: Sequence[Task]) -> list[list[int]]:
    """Tasks by number that are trained on the same rows, together."""
    found: dict[Selection, list[int]] = {}
    for number, task in enumerate(tasks):
        found.setdefault(task.trained, []).append(number)
    return list(found.values())


def _to_residuals(logits: Array, labels: Array) -> float:
    """Change logits [n, width] to probabilities less 1 for the true class; the summed cross-entropy."""
    if logits.shape[1] == 1:
        z = logits[:, 0]
        loss = np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0) - np.where(labels == 1, z, 0)
        logits[:, 0] = 1 / (1 + np.exp(-z)) - (labels == 1)
        return float(loss.sum(dtype=np.float64))
    every = np.arange(len(labels))
    logits -= logits.max(1, keepdims=True)
    own = logits[every, labels].sum(dtype=np.float64)
    np.exp(logits, out=logits)
    total = logits.sum(1, keepdims=True)
    logits /= total
    logits[every, labels] -= 1
    return float(np.log(total).sum(dtype=np.float64) - own)
