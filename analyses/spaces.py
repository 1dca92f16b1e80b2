"""Which rows an analysis is about: tokens, words or spans of tokens, or examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
import pandas as pd

from tensortape.stores import Column, Run
from tensortape.stores.chosen_rows import ChosenRows
from tensortape.stores.dtypes import Array

from .errors import LabelError
from .rows import Merged, Pool, Rows

MISSING = -100
DOCUMENT, ID = "example/document", "example/id"


@dataclass(frozen=True)
class Space:
    """Rows: of which examples of the run, on which table, and how they are merged from its rows."""

    run: Run
    table: str
    examples: Array  # bool, one per example of the run
    merged: Merged | None
    level: str = "token"

    @cached_property
    def lengths(self) -> Array:
        """Rows of the table of each example that is in; int64."""
        found: Array = np.maximum(self.run.tables[self.table].lengths, 0)[self.examples]
        return found

    @cached_property
    def owner(self) -> Array:
        """The example each row belongs to; int64."""
        every = np.repeat(np.flatnonzero(self.examples), self.lengths)
        return every if self.merged is None else every[self.merged.first]

    def __len__(self) -> int:
        return len(self.owner)

    def rows(self, columns: Sequence[Column], tags: dict[str, Array], wanted: Array | None = None) -> Rows:
        """A source of these rows."""
        return Rows(tuple(columns), self.examples, tags, wanted, self.merged)

    def values(self, column: Column) -> Array:
        """One value per row: of the row's first token, or of its example."""
        if column.table == "example":
            found: Array = _of_examples(column, len(self.run))[self.owner]
            return found
        every = ChosenRows(column, self.examples).between(0, int(self.lengths.sum()))
        return every if self.merged is None else every[self.merged.first]

    def types(self) -> Array | None:
        """The number of each row's type (its token id, or those of its tokens); int64. None of examples, and without token ids."""
        if self.level == "example" or "input_ids" not in self.run.tables[self.table]:
            return None
        ids = ChosenRows(self.run.tables[self.table]["input_ids"], self.examples).between(0, int(self.lengths.sum()))
        if self.merged is None:
            return ids
        spans = zip(self.merged.first.tolist(), self.merged.last.tolist(), strict=True)
        of_row = np.array([ids[first:last].tobytes() for first, last in spans], object)
        return np.unique(of_row, return_inverse=True)[1]

    def groups(self, name: str | None) -> list[str]:
        """The group of each example of the run, as text: a column's values, by default of `group_column`."""
        name = name or group_column(self.run)
        if name == ID:
            return [str(id_) for id_ in self.run.ids]
        return [str(value) for value in _of_examples(self.run[name], len(self.run)).tolist()]


def space(
    run: Run,
    columns: Sequence[Column],
    labels: Sequence[Column],
    level: str | None,
    pool: Pool = "mean",
    examples: Array | None = None,
) -> Space:
    """The rows that labels and sites have in common.

    Args:
        run: an open run.
        columns: the sites.
        labels: columns of labels, on the same rows as the sites or one per example.
        level: `token` (every row of the sites), `example`, or the name of a column that numbers words or spans: consecutive rows of
            an example with the same number, not below 0, are one row. If not given, what the labels are of.
        pool: how tokens are joined: `first`, `last` or `mean`.
        examples: only these; bool, one per example of the run.

    Raises:
        LabelError: sites and labels have no rows in common.
    """
    if pool not in get_args(Pool):
        raise ValueError(f"pool is one of {', '.join(get_args(Pool))}, not {pool!r}")
    table = _one_table(columns)
    if table == "example" or (level is None and all(column.table == "example" for column in labels)):
        level = "example"
    level = level or "token"
    for column in labels:
        if column.table not in (table, "example"):
            raise LabelError(
                f"{columns[0].name!r} has values on the rows of {table!r}, the labels {column.name!r} on those of "
                f"{column.table!r}; give labels of {table!r}, or select other sites"
            )
    numbering = run[level] if level not in ("token", "example") else None
    needed = [*columns, *labels, *([] if numbering is None else [numbering])]
    here = np.logical_and.reduce([*([] if examples is None else [examples]), *(column.present for column in needed)])
    whole = _with_rows(Space(run, table, here, None, level), needed)
    if level == "token" or table == "example":
        return whole
    return _with_rows(Space(run, table, here, _merged(whole, numbering, pool), level), needed)


def group_column(run: Run) -> str:
    """What examples are grouped by unless something else is asked for: their document where that is known, else their id."""
    return DOCUMENT if DOCUMENT.partition("/")[2] in run.tables["example"] else ID


def _with_rows(space: Space, needed: Sequence[Column]) -> Space:
    if not len(space):
        raise LabelError(
            f"no example of the run has rows of all of {', '.join(column.name for column in needed)}, or none of those asked for"
        )
    return space


def _merged(space: Space, numbering: Column | None, pool: Pool) -> Merged:
    number = np.zeros(len(space), np.int64) if numbering is None else space.values(numbering)
    if number.dtype.kind not in "iu":
        raise LabelError(f"words and spans are numbered by integers, but {numbering and numbering.name!r} is {number.dtype}")
    new = np.ones(len(number) + 1, bool)
    new[1:-1] = (np.diff(number) != 0) | (np.diff(space.owner) != 0)
    edges = np.flatnonzero(new)
    kept = number[edges[:-1]] >= 0 if len(number) else np.zeros(0, bool)
    return Merged(edges[:-1][kept], edges[1:][kept], pool)


def _one_table(columns: Sequence[Column]) -> str:
    tables = sorted({column.table for column in columns})
    if len(tables) != 1:
        raise LabelError(f"sites are analysed together on the rows of one table, but these are on {', '.join(tables)}")
    return tables[0]


def _of_examples(column: Column, count: int) -> Array:
    """An example column's values on all examples of the run; missing where it has none."""
    values: Array = column.rows()
    if len(values) == count:
        return values
    found = np.full(count, "" if values.dtype == object else MISSING, values.dtype)
    found[column.present] = values
    return found


@dataclass(frozen=True)
class Labels:
    """Classes of rows: their names in order, and each row's class, -1 where it has none; int32."""

    name: str
    classes: tuple[str, ...]
    of_row: Array


def read_labels(space: Space, column: Column, *, least: int = 2) -> Labels:
    """Labels of the rows; text that is empty and -100 (any float that is NaN) are missing. LabelError for too few classes."""
    values = space.values(column)
    kept = values != "" if values.dtype == object else values != MISSING
    codes, uniques = pd.factorize(values[kept], sort=True)
    if len(uniques) < least:
        raise LabelError(f"labels {column.name!r} have {len(uniques)} classes; this needs at least {least}")
    of_row = np.full(len(values), -1, np.int32)
    of_row[kept] = codes
    return Labels(column.name, tuple(map(str, uniques)), of_row)


def draw_order(groups: Sequence[str], seed: int) -> list[str]:
    """Groups in an order that depends on their names and the seed alone."""
    return sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).digest())
