"""Rows divided in two, a concept and what it is told from, and random divisions of the same rows to hold that against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from tensortape.stores.dtypes import Array

from .concept_sets import RANDOM, Choice
from .errors import LabelError
from .spaces import Space
from .splits import split


@dataclass(frozen=True)
class Side:
    """A concept and what it is told from.

    Args:
        labels: of each row, 1 for the concept, 0 for what it is told from, -1 for neither; int8.
        sets: the same for the rows that are fitted to, -1 for all others, and beside it random sets; [n, 1 + M], int8.
        shuffled: how many units were shuffled for these.
    """

    concept: str
    against: str
    labels: Array
    sets: Array
    shuffled: int

    @property
    def fitted(self) -> Array:
        """Rows that are fitted to; bool."""
        found: Array = self.sets[:, 0] >= 0
        return found

    @property
    def tested(self) -> Array:
        """Rows that are held out; bool."""
        found: Array = (self.labels >= 0) & ~self.fitted
        return found

    @cached_property
    def size(self) -> int:
        """Rows of the concept that are fitted to."""
        return int((self.sets[:, 0] == 1).sum())

    @cached_property
    def count(self) -> int:
        """All rows that are fitted to."""
        return int(self.fitted.sum())


@dataclass(frozen=True)
class Division:
    """Concepts on the rows of a space."""

    space: Space
    sides: tuple[Side, ...]

    @cached_property
    def wanted(self) -> Array:
        """Rows that any concept needs; bool."""
        found: Array = np.logical_or.reduce([side.labels >= 0 for side in self.sides])
        return found

    @cached_property
    def cohorts(self) -> list[int]:
        """For each concept the number of the first one that is fitted to the same rows."""
        fitted = [side.fitted.tobytes() for side in self.sides]
        return [fitted.index(one) for one in fitted]


def divide(
    space: Space,
    level: str,
    concepts: Mapping[str, Choice],
    against: Choice | str | None,
    groups: str | None,
    test_share: float,
    null: int,
    seed: int,
) -> Division:
    """Concepts on the rows of a space, a share of the groups held out. LabelError for one that leaves nothing to fit."""
    of_example = space.groups(groups)
    of_row = np.array(of_example, object)[space.owner]
    trained = np.ones(len(space), bool)
    if test_share:
        trained = split(of_example, space.owner, test_share=test_share, folds=None, blocks=False, seed=seed).of_row >= 0
    found = []
    for name, concept in concepts.items():
        labels = _labels(space, level, concept, against, seed)
        sets, shuffled = random_sets(np.where(trained, labels, -1), of_row, null, seed)
        told_from = against.name if isinstance(against, Choice) else against or "rest"
        found.append(Side(name, told_from, labels, sets, shuffled))
        if not 0 < found[-1].size < found[-1].count:
            raise LabelError(
                f"of the {found[-1].count} rows to fit {name!r} to, {found[-1].size} are of the concept; it needs rows of both "
                "sides: give against=, another seed=, or a smaller test_share="
            )
    return Division(space, tuple(found))


def _labels(space: Space, level: str, concept: Choice, against: Choice | str | None, seed: int) -> Array:
    """1 for the concept, 0 for what it is told from, -1 for neither."""
    found = concept.of(space, level)
    if isinstance(against, Choice):
        other = against.of(space, level) == 1
        if (other & (found == 1)).any():
            raise LabelError(f"{concept.name!r} and {against.name!r} have rows in common; a concept is told from other rows")
        return np.where(found == 1, 1, np.where(other, 0, -1)).astype(np.int8)
    rest = np.flatnonzero(found == 0)
    if against == RANDOM:
        found[np.random.default_rng(seed).permutation(rest)[int((found == 1).sum()) :]] = -1
    return found


def random_sets(labels: Array, groups: Array, times: int, seed: int) -> tuple[Array, int]:
    """A concept's set and random ones of its size, and how many units were shuffled for them.

    Groups are shuffled whole where all rows of each have one label, as rows of a document are no independent draws; else rows are.

    Args:
        labels: 1 for the concept, 0 for what it is held against; -1 for rows that are neither stay so. [n], int8.
        groups: of each row.
        times: how many random sets.

    Returns:
        [n, 1 + times], int8, the concept's own labels first; contiguous by set.
    """
    rows = np.flatnonzero(labels >= 0)
    of_group = pd.factorize(groups[rows])[0]
    label = labels[rows]
    shares = np.bincount(of_group, label) / np.bincount(of_group)
    units = of_group if np.isin(shares, (0, 1)).all() else np.arange(len(rows))
    count = int(units.max()) + 1
    found = np.full((len(labels), 1 + times), -1, np.int8, order="F")
    found[:, 0] = labels
    random = np.random.default_rng(seed)
    for number in range(times):
        place = random.permutation(count)
        order = place if count == len(rows) else np.argsort(place[units], kind="stable")
        found[rows, 1 + number] = 0
        found[rows[order[: int(label.sum())]], 1 + number] = 1
    return found, count
