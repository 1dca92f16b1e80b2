"""Rows of one run, or the same rows of two, in any order: what is compared, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tensortape.stores import Run
from tensortape.stores.chosen_rows import ChosenRows
from tensortape.stores.dtypes import Array

from .errors import JoinError
from .rows import BLOCK_BYTES, PIECE_BYTES, Merged, picked
from .spaces import Space
from .sweep import Block


@dataclass(frozen=True)
class Side:
    """Columns of one run, and which of their rows are compared, by number."""

    columns: tuple[ChosenRows, ...]
    merged: Merged | None
    rows: Array

    @property
    def widths(self) -> list[int]:
        """Features of each column."""
        return [int(np.prod(one.column.shape[1:])) for one in self.columns]


@dataclass(frozen=True)
class Aligned:
    """A source of rows of several sides, all features in one axis.

    Args:
        sides: with as many rows each.
        blocks: the rows of each block, by their place in the sides' `rows`.
        together: blocks per piece.
    """

    sides: tuple[Side, ...]
    blocks: tuple[Array, ...]
    together: int = 1

    @classmethod
    def whole(cls, sides: tuple[Side, ...]) -> Aligned:
        """All rows in order, in blocks of about 4 MiB."""
        width = 4 * sum(sum(side.widths) for side in sides)
        count = max(64, BLOCK_BYTES // width)
        every = np.arange(len(sides[0].rows))
        blocks = tuple(every[start : start + count] for start in range(0, len(every), count))
        return cls(sides, blocks, max(1, PIECE_BYTES // (count * width)))

    @property
    def widths(self) -> list[int]:
        """Features of each column of each side."""
        return [width for side in self.sides for width in side.widths]

    def pieces(self) -> list[AlignedPiece]:
        """The blocks, a few to a piece."""
        groups = [self.blocks[start : start + self.together] for start in range(0, len(self.blocks), self.together)]
        columns = [(side.columns, side.merged) for side in self.sides]
        return [AlignedPiece(columns, [(at, [one.rows[at] for one in self.sides]) for at in group]) for group in groups]


@dataclass(frozen=True)
class AlignedPiece:
    """Some blocks: of each the places of its rows, and their numbers in each side."""

    columns: Sequence[tuple[tuple[ChosenRows, ...], Merged | None]]
    wanted: Sequence[tuple[Array, Sequence[Array]]]

    def blocks(self) -> Iterator[Block]:
        """One array [n, all features] per block."""
        for at, rows in self.wanted:
            found = [
                picked(column, merged, numbers).reshape(len(at), -1)
                for (columns, merged), numbers in zip(self.columns, rows, strict=True)
                for column in columns
            ]
            yield Block((np.concatenate(found, axis=1),), at, {})


def partners(mine: Space, theirs: Space) -> tuple[Array, Array]:
    """Rows of two spaces that are the same row of the same example, by key: the same number of each, in the order of the first's.

    Raises:
        JoinError: no example in common, or one that has not as many rows in both.
    """
    number = {key: at for at, key in enumerate(theirs.run.keys)}
    partner = np.array([number.get(key, -1) for key in mine.run.keys])
    counts, other = (np.bincount(one.owner, minlength=len(one.run)) for one in (mine, theirs))
    both = np.flatnonzero((partner >= 0) & (counts > 0))
    both = both[other[partner[both]] > 0]
    if not len(both):
        raise JoinError(f"no example of {mine.run.path} is in {theirs.run.path} too, by id, phase and step, with the sites")
    differ = both[counts[both] != other[partner[both]]]
    if len(differ):
        one, there = differ[0], partner[differ[0]]
        raise JoinError(
            f"example {mine.run.ids[one]!r} has {counts[one]} rows in {mine.run.path} and {other[there]} in {theirs.run.path}; "
            "compare runs of the same tokens, or level='example'"
        )
    return rows_of(mine, both), rows_of(theirs, partner[both])


def rows_of(space: Space, examples: Array) -> Array:
    """The rows of some examples, one after the other in the order given, by number; int64."""
    counts = np.bincount(space.owner, minlength=len(space.run))
    starts, lengths = (np.cumsum(counts) - counts)[examples], counts[examples]
    found: Array = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    return found


def side(run: Run, space: Space, names: Sequence[str], rows: Array | None = None) -> Side:
    """Some columns of a space; all of its rows if none are given."""
    columns = tuple(ChosenRows(run[name], space.examples) for name in names)
    return Side(columns, space.merged, np.arange(len(space)) if rows is None else rows)
