"""Columns that are computed on reading: one row per example out of all of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from .columns import Column
from .dtypes import Array
from .errors import UnknownColumnError
from .quantize import Quantization
from .schema import ColumnSchema, Json

KINDS = ("mean", "max", "first", "last")


class ReducedColumn(Column):
    """`<site>|<kind>` of a run that holds all tokens of the site; the same numbers as `Site(..., reduce=<kind>)` stores.

    Means of 16-bit floats are taken in float32 and returned in the column's dtype. An example without tokens gives NaN, or -1 for
    integers.
    """

    def __init__(self, column: Column, kind: str) -> None:
        if kind not in KINDS:
            raise UnknownColumnError(f"columns can be reduced to {', '.join(KINDS)} on reading, not to {kind!r}")
        self.name = f"{column.name}|{kind}"
        self._whole, self._kind = column, kind

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the column."""
        return self._whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(examples, *feature)."""
        return (len(self), *self._whole.shape[1:])

    @property
    def table(self) -> str:
        """Its rows are examples."""
        return "example"

    @property
    def lengths(self) -> Array:
        """1 for each example that has tokens recorded, else -1."""
        return np.where(self.present, 1, -1)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `rows()`."""
        return ("example", *self._whole.axes[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of what it is computed from."""
        return self._whole.nbytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of the files that is in."""
        return self._whole.stored_bytes

    @property
    def compress(self) -> str:
        """The codec of what it is computed from."""
        return self._whole.compress

    @property
    def quantization(self) -> Quantization | None:
        """What quantising what it is computed from has cost."""
        return self._whole.quantization

    @property
    def site(self) -> Json | None:
        """The recorded site, with how it is reduced."""
        return None if self._whole.site is None else {**self._whole.site, "reduce": self._kind}

    @property
    def attributes(self) -> Json:
        """Those of the column."""
        return self._whole.attributes

    @property
    def present(self) -> Array:
        """Per example whether the column has tokens recorded; bool."""
        return self._whole.present

    @property
    def identity(self) -> str:
        """That of what it is computed from; its name tells the two apart."""
        return self._whole.identity

    @property
    def paths(self) -> list[str]:
        """The Zarr arrays of the values it is computed from."""
        return self._whole.paths

    @property
    def role_paths(self) -> dict[str, list[str]]:
        """The Zarr arrays it is computed from."""
        return self._whole.role_paths

    def __getitem__(self, example: int | slice) -> Any:
        if isinstance(example, slice):
            return [self[number] for number in range(*example.indices(len(self.present)))]
        return _reduced(self._whole[example], self._kind)

    def within(self, example: int, first: int, last: int) -> Array:
        """Rows [first, last) of an example, which has one."""
        found: Array = np.asarray(self[example])[None][first:last]
        return found

    def rows(self, selection: Any = slice(None)) -> Any:
        """Rows by number, over the examples that have the column."""
        examples = np.flatnonzero(self.present)[selection]
        if np.ndim(examples) == 0:
            return self[int(examples)]
        return (
            np.stack([self[number] for number in examples.tolist()])
            if len(examples)
            else np.empty((0, *self.shape[1:]), self.dtype)
        )

    def blocks(self, rows: int = 65536) -> Iterator[Array]:
        """All rows in order, at most `rows` at a time."""
        for start in range(0, len(self), rows):
            yield self.rows(slice(start, start + rows))

    def several(self, slices: Sequence[slice]) -> list[Array]:
        """`rows` of several slices."""
        return [self.rows(one) for one in slices]

    def edges(self, unit: Literal["chunk", "shard"]) -> Array:
        """An example lies where its first token does."""
        lengths = self._whole.lengths[self.present]
        begun = np.searchsorted(np.cumsum(lengths) - lengths, self._whole.edges(unit))
        return np.unique(np.concatenate([[0], begun, [len(self)]]))

    def __len__(self) -> int:
        return int(self.present.sum())

    @property
    def _schema(self) -> ColumnSchema:
        return self._whole._schema


def _reduced(rows: Array, kind: str) -> Any:
    if not len(rows):
        return np.full(rows.shape[1:], np.nan if rows.dtype.kind in "fV" else -1, rows.dtype)
    if kind in ("first", "last"):
        return rows[0 if kind == "first" else -1].copy()
    if kind == "max":
        return rows.max(0)
    wide = np.float64 if rows.dtype == np.float64 else np.float32
    return rows.mean(0, dtype=wide).astype(rows.dtype)
