"""Which rows are trained on and which are tested on. Groups are never split: windows of one document leak into one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensortape.stores.dtypes import Array

from .errors import LabelError
from .spaces import draw_order

# Voita & Titov (2020, section 3.1): blocks of the training data, as shares of it.
MDL_SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Split:
    """Rows in cells.

    Args:
        of_row: the cell of each row; int16.
        folds: pairs of (cells to train on, cells to test on), one pair unless cross-validated.
        blocks: cells to train on in the order in which an online code sends them.
    """

    of_row: Array
    folds: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    blocks: tuple[int, ...]


def split(groups: Sequence[str], owner: Array, *, test_share: float, folds: int | None, blocks: bool, seed: int) -> Split:
    """A split that depends on the names of groups and the seed alone, so that another run of the same examples is split alike.

    Args:
        groups: group of each example of the run.
        owner: example of each row.
        test_share: about this share of the rows is tested on, the rest trained on.
        folds: instead, cut into so many folds; each is tested on after training on the others.
        blocks: whether to cut what is trained on into blocks for an online code.

    Raises:
        LabelError: too few groups.
    """
    names, of_example = np.unique(np.array(groups, object).astype(str), return_inverse=True)
    of_row = of_example[owner]
    rows = np.bincount(of_row, minlength=len(names))
    place = {name: number for number, name in enumerate(names)}
    order = np.array([place[name] for name in draw_order([names[n] for n in np.flatnonzero(rows)], seed)])
    if len(order) < (folds or 2):
        raise LabelError(
            f"the labelled rows are of {len(order)} groups, which cannot be split into {folds or 2} parts; record more documents, "
            "or give groups="
        )
    cell = np.zeros(len(names), np.int16)
    if folds is not None:
        cell[order] = np.arange(len(order)) % folds
        every = tuple(range(folds))
        return Split(cell[of_row], tuple((tuple(c for c in every if c != fold), (fold,)) for fold in every), ())
    closest = np.abs(np.cumsum(rows[order]) - test_share * rows.sum()).argmin() + 1
    tested = min(int(closest), len(order) - 1)
    cell[order[:tested]] = -1
    trained = order[tested:]
    cell[trained] = _blocks(rows[trained]) if blocks else 0
    used = tuple(sorted(set(cell[trained].tolist())))
    return Split(cell[of_row], ((used, (-1,)),), used)


def _blocks(rows: Array) -> Array:
    """The block of each group: the first whose share of the rows is not full before it."""
    share = (np.cumsum(rows) - rows) / rows.sum()
    found: Array = np.searchsorted(MDL_SHARES, share, "right").astype(np.int16)
    return found
