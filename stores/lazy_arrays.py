"""Columns as dask and xarray arrays: nothing is read until it is computed, and then by whichever thread or process computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import Column
from .dtypes import Array

BLOCK_BYTES = 16 << 20  # smaller shards are joined: dask takes about a millisecond for each block

if TYPE_CHECKING:
    import dask.array
    import xarray


def to_dask(column: Column) -> dask.array.Array:
    """The rows of a column; a block holds the rows of a shard, or of several small ones."""
    try:
        import dask.array
    except ImportError:
        raise ImportError("to_dask needs dask: pip install 'tensortape[dask]'") from None
    blocks = (tuple(np.diff(_starts(column)).tolist()) or (0,), *((size,) for size in column.shape[1:]))
    empty = np.empty((0,) * len(column.shape), column.dtype)
    found: dask.array.Array = dask.array.from_array(RowsOf(column), chunks=blocks, meta=empty)
    return found


def to_xarray(column: Column) -> xarray.DataArray:
    """The rows of a column as dask computes them, their axes named; the coordinate `example` numbers the example of each row."""
    try:
        import xarray
    except ImportError:
        raise ImportError("to_xarray needs xarray and dask: pip install 'tensortape[xarray]'") from None
    examples = np.repeat(np.arange(len(column.lengths)), np.maximum(column.lengths, 0))
    return xarray.DataArray(
        to_dask(column),
        dims=column.axes,
        coords={"example": (column.axes[0], examples)},
        name=column.name.partition("/")[2],
        attrs=column.attributes,
    )


class RowsOf:
    """A column as dask slices it: an array [rows, *feature]."""

    def __init__(self, column: Column) -> None:
        self._column = column
        self.shape, self.dtype, self.ndim = column.shape, column.dtype, len(column.shape)

    def __getitem__(self, index: tuple[Any, ...]) -> Array:
        rows, *features = index
        found: Array = self._column.rows(rows)
        return found[(..., *features)] if features else found


def _starts(column: Column) -> Array:
    """First rows of the blocks, and the number of rows at the end. Every one is the edge of a shard; most blocks are not small."""
    edges = column.edges("shard")
    enough = max(int(np.diff(edges).max(initial=1)), BLOCK_BYTES * len(column) // max(column.nbytes, 1), 1)
    first = np.unique(edges[:-1] // enough, return_index=True)[1]
    return np.append(edges[first], edges[-1])
