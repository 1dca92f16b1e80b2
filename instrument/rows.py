"""A whole batch, as the writer takes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensortape.stores import keys
from tensortape.stores.dtypes import Array
from tensortape.stores.names import is_ragged, split
from tensortape.stores.ragged import Lengths
from tensortape.stores.writer import Arrived


@dataclass(frozen=True)
class Rows:
    """Ids, columns, and rows per example of each packed table.

    Values are there once `arrived` has returned, which says how many rows of each column hold NaN or infinity.
    """

    ids: keys.Ids
    columns: dict[str, Any]
    lengths: Lengths
    arrived: Arrived


def keep(rows: Rows, wanted: Array, names: Collection[str]) -> Rows:
    """Only some examples and columns of a batch; `wanted` is a mask over its examples."""
    if wanted.all() and len(names) == len(rows.columns):
        return rows
    counted = rows.arrived()
    chosen = np.flatnonzero(wanted)
    tokens = {table: np.repeat(wanted, lengths) for table, lengths in rows.lengths.items()}
    columns = {}
    for name in (name for name in rows.columns if name in names):
        values = rows.columns[name]
        table = split(name)[0]
        if isinstance(values, list):
            columns[name] = [values[number] for number in chosen]
        else:
            columns[name] = values[tokens[table] if is_ragged(table) else wanted]
    tables = {split(name)[0] for name in columns}
    lengths = {table: np.asarray(counts)[chosen] for table, counts in rows.lengths.items() if table in tables}
    nonfinite = {name: _nonfinite(columns[name]) if count else 0 for name, count in counted.items() if name in columns}
    return Rows([rows.ids[number] for number in chosen], columns, lengths, lambda: nonfinite)  # type: ignore[arg-type]


def first_of_each(ids: keys.Ids) -> Array:
    """A mask over examples: those whose id none before them has."""
    seen: set[str | int] = set()
    return np.array([not (id_ in seen or seen.add(id_)) for id_ in ids])  # type: ignore[func-returns-value]


def _nonfinite(rows: Any) -> int:
    found = np.asarray(rows)
    return int((~np.isfinite(found.reshape(len(found), -1).astype(np.float64))).any(1).sum())
