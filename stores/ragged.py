"""What one append gives for one column, in the one form that buffers take: blocks of rows of the stored dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import dtypes, names
from .dtypes import Array
from .errors import SchemaError

Lengths = Mapping[str, Sequence[int] | Array]


@dataclass(frozen=True)
class Cells:
    """Values of one column for the examples of one append.

    `blocks` are arrays [n, *shape] of the stored dtype whose rows follow one another, or for text one object array per block.
    `lengths` [examples] are the rows of each example (None where a table has exactly one per example, or where only the total is
    known yet).
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: list[Array]
    lengths: Array | None

    @property
    def rows(self) -> int:
        """Rows over all blocks."""
        return sum(map(len, self.blocks))

    @property
    def nbytes(self) -> int:
        """Bytes over all blocks."""
        return sum(block.nbytes for block in self.blocks)

    def copied(self) -> Cells:
        """The same values in memory of their own."""
        return replace(self, blocks=[block.copy() for block in self.blocks])


def cells(name: str, values: Any, examples: int, lengths: Lengths) -> Cells:
    """Values as given to `append`, checked and turned into blocks."""
    table, _ = names.split(name)
    if not names.is_ragged(table):
        return _one_block(name, values, examples)
    if table in lengths and not _is_per_example(values):
        given = counts(table, lengths[table])
        packed = _one_block(name, values, int(given.sum()))
        return Cells(packed.dtype, packed.shape, packed.blocks, given)
    return _per_example(name, values, examples)


def _is_per_example(values: Any) -> bool:
    """Whether values are a list of arrays (or lists), rather than the rows of all examples in one."""
    return isinstance(values, (list, tuple)) and all(hasattr(value, "__len__") and not isinstance(value, str) for value in values)


def _one_block(name: str, values: Any, rows: int) -> Cells:
    block = _block(name, values)
    if block.ndim == 0 or len(block) != rows:
        got = "a single value" if block.ndim == 0 else f"{len(block)}"
        raise SchemaError(f"column {name!r} needs {rows} values, one per row of its table, but got {got}")
    return _checked(name, [block], None)


def _per_example(name: str, values: Any, examples: int) -> Cells:
    if not hasattr(values, "__len__") or len(values) != examples:
        got = len(values) if hasattr(values, "__len__") else type(values).__name__
        raise SchemaError(
            f"column {name!r} needs one array per example, {examples} in all, but got {got}; rows of all examples in one array "
            f"need lengths={{{names.split(name)[0]!r}: [...]}}"
        )
    blocks = [_block(name, value) for value in values]
    if any(block.ndim == 0 for block in blocks):
        raise SchemaError(f"column {name!r} needs one array of rows per example, but got single values")
    return _checked(name, blocks, np.array([len(block) for block in blocks], np.int64))


def _block(name: str, values: Any) -> Array:
    if _is_text(values):
        return _text_block(name, values)
    try:
        return dtypes.as_numpy(values)
    except (SchemaError, ValueError, OverflowError) as error:
        raise SchemaError(f"column {name!r}: {error}") from None


def _text_block(name: str, values: Any) -> Array:
    block = np.array(values, dtype=object)
    if block.ndim != 1:
        raise SchemaError(f"column {name!r} holds one text per row, but got texts of shape {block.shape}")
    names.check_text("".join(map(str, block)), f"column {name!r}")
    return block


def counts(table: str, lengths: Any) -> Array:
    """Rows per example as given, int64; SchemaError for anything but whole numbers of at least 0."""
    found = np.asarray(lengths)
    if found.ndim != 1 or found.dtype.kind not in "iu" or (found < 0).any():
        raise SchemaError(f"lengths of table {table!r} must be one count of rows per example; got {lengths!r}")
    return found.astype(np.int64)


def _is_text(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "UT" or (values.dtype == object and all(isinstance(value, str) for value in values.flat))
    return isinstance(values, (list, tuple)) and len(values) > 0 and all(isinstance(value, str) for value in values)


def _checked(name: str, blocks: list[Array], lengths: Array | None) -> Cells:
    filled = [block for block in blocks if len(block)] or blocks[:1]
    kinds = {(_dtype(name, block), block.shape[1:]) for block in filled}
    if len(kinds) > 1:
        raise SchemaError(f"column {name!r} is given with several dtypes or shapes: {sorted(map(str, kinds))}")
    if not kinds:
        return Cells("", (), [], lengths)
    dtype, shape = kinds.pop()
    stored = filled if dtype == dtypes.TEXT else [dtypes.to_stored(block) for block in filled]
    return Cells(dtype, shape, stored, lengths)


def _dtype(name: str, block: Array) -> str:
    try:
        return dtypes.TEXT if block.dtype == object else dtypes.name_of(block)
    except SchemaError as error:
        raise SchemaError(f"column {name!r}: {error}") from None


def text_bytes(block: Array, offset: int) -> tuple[Array, Array]:
    """Text as (UTF-8 bytes [n], end of each text [rows], counted from `offset`)."""
    encoded = [str(text).encode() for text in block]
    ends = offset + np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def lengths_of(given: Mapping[str, Cells], stated: Lengths, examples: int) -> dict[str, Array]:
    """Rows per example of each ragged table; SchemaError where two columns of a table disagree."""
    found: dict[str, tuple[str, Array]] = {}
    for name, column in given.items():
        table = names.split(name)[0]
        if column.lengths is None:
            continue
        if len(column.lengths) != examples:
            raise SchemaError(f"lengths of table {table!r} are {len(column.lengths)}, but there are {examples} examples")
        first, lengths = found.setdefault(table, (name, column.lengths))
        if not np.array_equal(lengths, column.lengths):
            at = int(np.flatnonzero(lengths != column.lengths)[0])
            raise SchemaError(
                f"columns of table {table!r} disagree on example {at}: {first!r} has {lengths[at]} rows, {name!r} has "
                f"{column.lengths[at]}"
            )
    return {table: lengths for table, (_, lengths) in found.items()}
