"""How well fitted classifiers do on rows they have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensortape.stores.dtypes import Array

from .gram import chosen, features
from .sweep import Accumulator, Block
from .tasks import Probe, Task

GROUP = "group"  # the tag that numbers the group of each row


@dataclass(frozen=True)
class Trial:
    """Of the tested rows: `confusion` [true, predicted], and of each group of rows how many were right, and how many there are.

    `nats`: their summed cross-entropy under softmax of the scores.
    """

    confusion: Array
    right: Array
    total: Array
    nats: float

    def __add__(self, other: Trial) -> Trial:
        return Trial(self.confusion + other.confusion, self.right + other.right, self.total + other.total, self.nats + other.nats)

    @property
    def rows(self) -> int:
        """How many rows were tested."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of rows that were right."""
        return float(np.trace(self.confusion)) / max(self.rows, 1)

    @property
    def f1(self) -> Array:
        """F1 of each class; nan for one that neither occurs nor is predicted."""
        of_class = self.confusion.sum(0) + self.confusion.sum(1)
        with np.errstate(invalid="ignore"):
            found: Array = 2 * np.diagonal(self.confusion) / of_class
        return found

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that occur or are predicted."""
        return float(np.nanmean(self.f1)) if self.rows else float("nan")

    def interval(self, times: int, seed: int, share: float = 0.95) -> tuple[float, float]:
        """Percentile bootstrap interval of the accuracy, drawing groups (Efron 1979); nan without at least two groups or draws."""
        groups = np.flatnonzero(self.total)
        if len(groups) < 2 or times < 2:
            return float("nan"), float("nan")
        drawn = np.random.default_rng(seed).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=times)
        found = drawn @ self.right[groups] / (drawn @ self.total[groups])
        low, high = np.quantile(found, [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)


class Trials(Accumulator):
    """`Trial` for each of several probes of one column.

    Args:
        tasks, probes: what was fitted, and how.
        shift: [d].
        groups: how many groups the tag `group` numbers.
    """

    state = ("confusions", "right", "total", "nats")
    confusions: Array
    right: Array
    total: Array
    nats: Array

    def __init__(self, tasks: Sequence[Task], probes: Sequence[Probe], shift: Array, groups: int) -> None:
        self.tasks, self.shift, self.groups = tuple(tasks), shift, groups
        self.bounds = np.cumsum([0, *(task.classes for task in tasks)])
        self.squares = np.cumsum([0, *(task.classes**2 for task in tasks)])
        self.weights = np.concatenate([probe.weights for probe in probes], 1)
        self.bias = np.concatenate([probe.bias - (probe.center - shift) @ probe.weights for probe in probes])

    def update(self, block: Block) -> None:
        """Predict a block."""
        x = features(block)
        x = x - self.shift.astype(x.dtype)
        confusions, nats = np.zeros(self.squares[-1], np.int64), np.zeros(len(self.tasks))
        right, total = (np.zeros((len(self.tasks), self.groups), np.int64) for _ in range(2))
        for number, task in enumerate(self.tasks):
            here = task.tested.rows(block.tags)
            if here.any():
                labels, groups = block.tags[task.labels][here], block.tags[GROUP][here]
                scores = self._scores(number, chosen(x, here))
                predicted = scores.argmax(1)
                cells = np.bincount(labels * task.classes + predicted, minlength=task.classes**2)
                confusions[self.squares[number] : self.squares[number + 1]] = cells
                right[number] = np.bincount(groups, predicted == labels, self.groups)
                total[number] = np.bincount(groups, minlength=self.groups)
                nats[number] = cross_entropy(scores, labels)
        for name, value in (("confusions", confusions), ("right", right), ("total", total), ("nats", nats)):
            self.add(name, value)

    def finalize(self) -> list[Trial]:
        """One for each task."""
        squares = [
            self.confusions[self.squares[n] : self.squares[n + 1]].reshape(task.classes, task.classes)
            for n, task in enumerate(self.tasks)
        ]
        return [Trial(squares[n], self.right[n], self.total[n], float(self.nats[n])) for n in range(len(self.tasks))]

    def _scores(self, number: int, rows: Array) -> Array:
        columns = slice(self.bounds[number], self.bounds[number + 1])
        found: Array = rows @ self.weights[:, columns].astype(rows.dtype) + self.bias[columns].astype(rows.dtype)
        return found


def cross_entropy(scores: Array, labels: Array) -> float:
    """Summed -log softmax(scores)[label], in nats."""
    above = scores - scores.max(1, keepdims=True)
    own = above[np.arange(len(labels)), labels].sum(dtype=np.float64)
    return float(np.log(np.exp(above).sum(1, dtype=np.float64)).sum() - own)
