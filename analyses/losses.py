"""Cross-entropy of several logistic regressions at once, its slopes and its curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensortape.stores.dtypes import Array

from .coordinates import Frame
from .gram import chosen, features
from .sweep import Accumulator, Block
from .tasks import Selection, Task

MOST_JOINT = 4096  # parameters of which the curvature is taken as a whole, 128 MiB; of more only that of each class


@dataclass(frozen=True)
class Weighted:
    """A task with parameters [width, d + 1] of standardised features to evaluate it at."""

    task: Task
    frame: Frame
    parameters: Array


class Losses(Accumulator):
    """Cross-entropy (nats) of each task, and its slopes by weights and bias, summed over training rows.

    Tasks trained on the same rows share the selection of these, and one matrix product.
    """

    state = ("values", "slopes", "offsets")
    values: Array
    slopes: Array
    offsets: Array

    def __init__(self, tasks: Sequence[Weighted]) -> None:
        self.tasks = tuple(one.task for one in tasks)
        self.shift = tasks[0].frame.shift
        self.bounds = np.cumsum([0, *(task.width for task in self.tasks)])
        every = [one.frame.weights(one.parameters) for one in tasks]
        self.weights = np.concatenate([weights for weights, _ in every], 1)
        self.bias = np.concatenate([bias for _, bias in every])
        self.cohorts = _cohorts(self.tasks)

    def update(self, block: Block) -> None:
        """Losses and slopes of a block."""
        x = features(block)
        x = x - self.shift.astype(x.dtype)
        values, slopes, offsets = np.zeros(len(self.tasks)), np.zeros(self.weights.T.shape), np.zeros(len(self.bias))
        for numbers in self.cohorts:
            here = self.tasks[numbers[0]].trained.rows(block.tags)
            rows = chosen(x, here)
            columns = np.concatenate([np.arange(self.bounds[n], self.bounds[n + 1]) for n in numbers])
            logits = logits_of(rows, self.weights[:, columns], self.bias[columns])
            at = 0
            for number in numbers:
                task = self.tasks[number]
                values[number] = to_residuals(logits[at : at + task.width], block.tags[task.labels][here])
                at += task.width
            slopes[columns], offsets[columns] = logits @ rows, logits.sum(1, dtype=np.float64)
        for name, value in (("values", values), ("slopes", slopes), ("offsets", offsets)):
            self.add(name, value)


class Curvatures(Accumulator):
    """The Hessian of a task's mean cross-entropy by parameters, over its training rows; in blocks as `Coordinates` take them."""

    state = ("blocks", "count")
    blocks: Array
    count: Array

    def __init__(self, at: Weighted) -> None:
        self.at = at

    def update(self, block: Block) -> None:
        """That of a block's rows."""
        x = features(block)[self.at.task.trained.rows(block.tags)]
        rows = x - self.at.frame.shift.astype(x.dtype)
        shares = logits_of(rows, *self.at.frame.weights(self.at.parameters))
        to_shares(shares)
        wide, width, size = self.at.frame.standardised(rows), len(shares), x.shape[1] + 1
        joint = width * size <= MOST_JOINT
        found = np.zeros((width, size, width, size) if joint else (width, size, 1, size))
        for one in range(width):
            for other in range(one + 1) if joint else (one,):
                weight = shares[one] * ((one == other) - shares[other])
                product = wide.T @ (weight[:, None] * wide)
                found[one, :, other if joint else 0, :] = product
                if joint:
                    found[other, :, one, :] = product.T
        self.add("blocks", found.reshape(1, width * size, -1) if joint else found[:, :, 0])
        self.add("count", len(x))

    def finalize(self) -> Array:
        """[blocks, size, size]."""
        found: Array = self.blocks / self.count
        return found


def logits_of(rows: Array, weights: Array, bias: Array) -> Array:
    """[width, n]: a class's numbers lie together, so that sums over classes are sums of long rows."""
    found: Array = weights.T.astype(rows.dtype) @ rows.T + bias[:, None].astype(rows.dtype)
    return found


def to_shares(logits: Array) -> Array:
    """Change logits [width, n] to probabilities of the classes (of one logit: of class 1); the log of what divided them, [n]."""
    if len(logits) == 1:
        total: Array = np.logaddexp(logits[0], 0)
        logits[0] = np.exp(logits[0] - total)
        return total
    highest = logits.max(0)
    logits -= highest
    np.exp(logits, out=logits)
    total = logits.sum(0)
    logits /= total
    found: Array = np.log(total) + highest
    return found


def to_residuals(logits: Array, labels: Array) -> float:
    """Change logits [width, n] to probabilities less 1 for the true class; the summed cross-entropy."""
    every = np.arange(len(labels))
    if len(logits) == 1:
        own = np.where(labels == 1, logits[0], 0).sum(dtype=np.float64)
        total = to_shares(logits)
        logits[0] -= labels == 1
    else:
        own = logits[labels, every].sum(dtype=np.float64)
        total = to_shares(logits)
        logits[labels, every] -= 1
    return float(total.sum(dtype=np.float64) - own)


def _cohorts(tasks: Sequence[Task]) -> list[list[int]]:
    """Tasks by number that are trained on the same rows, together."""
    found: dict[Selection, list[int]] = {}
    for number, task in enumerate(tasks):
        found.setdefault(task.trained, []).append(number)
    return list(found.values())
