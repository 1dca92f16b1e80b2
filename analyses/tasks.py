"""What linear classifiers are fitted to, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tensortape.stores.dtypes import Array

CELL = "cell"  # the tag that says which cell of a split a row is in


@dataclass(frozen=True)
class Selection:
    """Rows that have a label in the tag `labels` and are in some cells of a split (in any, if None)."""

    labels: str
    cells: tuple[int, ...] | None = None

    def rows(self, tags: Mapping[str, Array]) -> Array:
        """Which rows of a block they are; bool."""
        labelled: Array = tags[self.labels] >= 0
        if self.cells is None:
            return labelled
        among = np.zeros(max(int(tags[CELL].max(initial=0)), *self.cells) + 2, bool)  # cell -1 is its last entry
        among[list(self.cells)] = True
        return labelled & among[tags[CELL]]


@dataclass(frozen=True)
class Task:
    """One classification.

    Args:
        labels: the tag with classes 0 to K - 1.
        classes: K.
        trained, tested: rows it is fitted to, and tried on.
        scaled: rows whose mean and covariance set its features' scale; those it is trained on if not given.
        penalise_bias: also penalise the bias, so that a class without rows does no harm.
    """

    labels: str
    classes: int
    trained: Selection
    tested: Selection
    scaled: Selection | None = None
    penalise_bias: bool = False

    @property
    def width(self) -> int:
        """Weight vectors it is fitted with: one for two classes, else one per class."""
        return 1 if self.classes == 2 else self.classes


@dataclass(frozen=True)
class Probe:
    """A linear classifier: scores of a row x are (x - center) @ weights + bias; the class is that of the highest score.

    Args:
        center: [d]. weights: [d, K]. bias: [K]. All float64.
        objective: what was minimised, where that was an optimisation: mean cross-entropy (nats) + |W|^2 / (2 C n), of standardised
            features.
        gap: how far above its minimum the objective is at most; nan for closed forms.
        passes: how often the rows were read for it.
        converged: whether it came as close as it was asked to.
    """

    center: Array
    weights: Array
    bias: Array
    objective: float = float("nan")
    gap: float = float("nan")
    passes: int = 1
    converged: bool = True

    def scores(self, rows: Array) -> Array:
        """[n, K] of rows [n, *feature]."""
        x = rows.reshape(len(rows), -1)
        wide = x if x.dtype == np.float64 else x.astype(np.float32)
        found: Array = (wide - self.center.astype(wide.dtype)) @ self.weights.astype(wide.dtype) + self.bias.astype(wide.dtype)
        return found

    def predict(self, rows: Array) -> Array:
        """Class of each row; int64."""
        found: Array = self.scores(rows).argmax(1)
        return found
