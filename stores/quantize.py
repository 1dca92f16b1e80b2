"""Columns of floating values kept as int8: codes and a scale per row, and exactly the few features that would spoil the scale.

A row's scale is the largest finite magnitude of its coded features over 126, and a value is its code times the scale, rounded to
the column's dtype. Codes beyond 126 stand for what is no number: 127 and -127 for the infinities, -128 for NaN (not its payload).
Features whose values are far larger than most (every Transformer has some) are outliers: their positions are chosen once per part
and their values are kept as they are, with the code 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from . import checked, dtypes
from .dtypes import Array
from .errors import DamagedError, FormatVersionError, SchemaError

INT8 = "int8"
NAMES = (INT8,)
DTYPES = ("float16", "bfloat16", "float32")
LARGEST_CODE = 126
NAN, MINUS_INFINITY, INFINITY = -128, -127, 127
OUTLIER = 6.0  # times the median feature
OUTLIERS_PER = 100  # features for each outlier that is kept
_PIECE_BYTES = 256 << 10  # allocators give larger blocks back at once, and faulting them in anew costs more than the arithmetic
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(LARGEST_CODE), np.float32(0))

_ALLOWING_NAN = np.errstate(invalid="ignore")  # numpy warns of casting and comparing a signalling one


@dataclass(frozen=True)
class Quantization:
    """What quantising has cost, over all values that were coded: neither outliers nor NaN and infinity."""

    squared_error: float = 0.0
    squared_values: float = 0.0
    largest_error: float = 0.0

    @property
    def relative_rms(self) -> float:
        """Root of the mean squared error over that of the mean squared value; 0 where all values are 0."""
        return math.sqrt(self.squared_error / self.squared_values) if self.squared_values else 0.0

    def __add__(self, other: Quantization) -> Quantization:
        return Quantization(
            self.squared_error + other.squared_error,
            self.squared_values + other.squared_values,
            max(self.largest_error, other.largest_error),
        )


@dataclass(frozen=True)
class Int8:
    """How one part keeps a column: `outliers` are positions in the flattened feature shape, in order."""

    outliers: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As stored in a column's schema."""
        return {"codes": INT8, "outliers": list(self.outliers)}

    @classmethod
    def from_json(cls, document: dict[str, Any], features: int) -> Int8:
        """The reverse of `to_json`, for rows of so many features.

        Raises:
            DamagedError: positions that are none of theirs. FormatVersionError: codes of a later version.
        """
        checked.members(document, "'quantized'", {"codes": checked.TEXT, "outliers": checked.LIST})
        if document["codes"] != INT8:
            raise FormatVersionError(f"a column is quantised to {document['codes']!r}; update tensortape to read it")
        outliers = checked.numbers(document["outliers"], "'outliers'", 0, features - 1)
        if any(one >= other for one, other in pairwise(outliers)):
            raise DamagedError("the positions of outliers do not ascend")
        return cls(outliers)

    def roles(self, dtype: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Logical dtype and feature shape of the arrays that a column of this dtype and shape is kept in."""
        exact = {"outliers": (dtype, (len(self.outliers),))} if self.outliers else {}
        return {"codes": (INT8, shape), "scale": ("float32", ()), **exact}

    def encode(self, block: Array, dtype: str) -> Iterator[tuple[dict[str, Array], Quantization]]:
        """The arrays, by role, of rows [n, *feature] of the stored dtype, some rows at a time, and what that cost."""
        for rows in _pieces(block):
            values = _flat(dtypes.from_stored(rows, dtype))
            codes, scale, cost = _encoded(self._coded(values), values.dtype)
            arrays = {"codes": codes.reshape(rows.shape), "scale": scale}
            if self.outliers:
                arrays["outliers"] = _flat(rows)[:, self.outliers]
            yield arrays, cost

    def decode(self, arrays: Mapping[str, Array], dtype: str) -> Array:
        """Rows [n, *feature] of the logical dtype from the arrays by role."""
        codes, scale = arrays["codes"], arrays["scale"]
        out = np.empty(codes.shape, dtypes.logical(dtype))
        for start, rows in _numbered(codes):
            out[start : start + len(rows)] = _decoded(_flat(rows), scale[start : start + len(rows)]).reshape(rows.shape)
        if self.outliers:
            _flat(out)[:, self.outliers] = dtypes.from_stored(arrays["outliers"], dtype)
        return out

    @_ALLOWING_NAN
    def _coded(self, values: Array) -> Array:
        """What is coded of rows [n, features]: outliers as 0; float32."""
        kept = values.astype(np.float32)
        kept[:, self.outliers] = 0
        return kept


def check(name: str | None) -> None:
    """SchemaError for a name that is no quantisation's."""
    if name is not None and name not in NAMES:
        raise SchemaError(f"quantize is one of {', '.join(NAMES)}, or None, not {name!r}")


def plan(column: str, dtype: str, blocks: Iterable[Array]) -> Int8:
    """How a column whose first rows are `blocks` [n, *feature] of the stored dtype is kept; SchemaError unless it can be.

    Outliers are the features whose largest magnitude is over 6 times the median of all features, the largest ones first, at most
    one in a hundred (rounded up).
    """
    if dtype not in DTYPES:
        raise SchemaError(f"column {column!r} is {dtype}, but quantize='int8' is for {', '.join(DTYPES)}; record it unquantised")
    peaks = (_peaks(_flat(dtypes.from_stored(rows, dtype))) for block in blocks for rows in _pieces(block))
    return Int8(_outliers(reduce(np.maximum, peaks, np.zeros((), np.float32))))


def _outliers(peaks: Array) -> tuple[int, ...]:
    if not np.ndim(peaks):
        return ()  # no row has been seen
    over = np.flatnonzero(peaks > OUTLIER * np.median(peaks))
    largest = over[np.argsort(-peaks[over], kind="stable")][: -(-len(peaks) // OUTLIERS_PER)]
    return tuple(sorted(largest.tolist()))


@_ALLOWING_NAN
def _peaks(values: Array) -> Array:
    """The largest finite magnitude of each feature; float32 [features]."""
    magnitude = np.abs(values.astype(np.float32))
    found: Array = np.where(np.isfinite(magnitude), magnitude, 0).max(0)
    return found


@_ALLOWING_NAN
def _encoded(values: Array, dtype: np.dtype[Any]) -> tuple[Array, Array, Quantization]:
    """Codes [n, features], scales [n] and cost of float32 rows, which are overwritten."""
    peaks = _largest(values)
    beyond = []
    if not np.isfinite(peaks).all():
        beyond = [(NAN, np.isnan(values)), (MINUS_INFINITY, values == -np.inf), (INFINITY, values == np.inf)]
        values[~np.isfinite(values)] = 0
        peaks = _largest(values)
    scale = np.minimum(peaks / np.float32(LARGEST_CODE), _LARGEST_SCALE)
    steps = np.where(scale > 0, scale, 1)[:, None]
    exact = values / steps
    rounded = np.rint(exact)
    np.clip(rounded, -LARGEST_CODE, LARGEST_CODE, out=rounded)
    codes = rounded.astype(np.int8)
    for code, where in beyond:
        codes[where] = code
    rounded *= scale[:, None]
    return codes, scale, _cost(values, exact, rounded.astype(dtype).astype(np.float32, copy=False), steps)


def _largest(values: Array) -> Array:
    """The largest magnitude of each row; NaN where there is one."""
    found: Array = np.abs(np.maximum(values.max(1), -values.min(1)))  # of nothing but zeros 0, not -0
    return found


def _cost(values: Array, exact: Array, read: Array, steps: Array) -> Quantization:
    """What reading `read` in place of `values` costs. Squares are summed in steps of the row, which never leave float32's range."""
    error = np.subtract(read, values, out=read)
    largest = max(float(error.max()), -float(error.min()))
    error /= steps
    squares = np.square(steps[:, 0], dtype=np.float64)
    squared_error, squared_values = (float(np.vecdot(rows, rows) @ squares) for rows in (error, exact))
    return Quantization(squared_error, squared_values, largest)


def _decoded(codes: Array, scale: Array) -> Array:
    values = _product(codes, scale)
    if codes.min() < -LARGEST_CODE or codes.max() > LARGEST_CODE:
        for code, value in ((NAN, np.nan), (MINUS_INFINITY, -np.inf), (INFINITY, np.inf)):
            values[codes == code] = value
    return values


def _product(codes: Array, scale: Array) -> Array:
    values = codes.astype(np.float32)
    values *= scale[:, None]
    return values


def _flat(rows: Array) -> Array:
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def _pieces(block: Array) -> Iterator[Array]:
    """Rows of a block, some at a time, so that what is computed of them on the way stays small."""
    return (rows for _, rows in _numbered(block))


def _numbered(block: Array) -> Iterator[tuple[int, Array]]:
    step = max(1, _PIECE_BYTES // (4 * math.prod(block.shape[1:])))
    for start in range(0, len(block), step):
        yield start, block[start : start + step]
