"""Labels as users give them, packed like the tokens they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tensortape.stores.dtypes import Array, as_numpy
from tensortape.stores.names import is_ragged, split

from .errors import BatchError
from .streams import Stream

_RECORDED = ("input_ids", "position")


def label_columns(labels: Mapping[str, Any], streams: Mapping[str, Stream], examples: int) -> dict[str, Any]:
    """Columns of labels: one value per example, or one array [T_i] per example.

    Args:
        labels: `example/<name>` to one value per example; `token/<name>` (or another stream's table) to values [B, T] as padded as
            the tokens, or to one sequence of T_i values per example.
        streams: streams of the batch by table.
        examples: number of examples.
    """
    for name in labels:
        if name.partition("/")[2] in _RECORDED and is_ragged(name.partition("/")[0]):
            raise BatchError(f"labels {name!r} would take the place of what is recorded of the tokens; give them another name")
    return {name: _column(name, values, streams, examples) for name, values in labels.items()}


def _column(name: str, values: Any, streams: Mapping[str, Stream], examples: int) -> Any:
    table, _ = split(name)
    if not is_ragged(table):
        return _per_example(name, values, examples)
    if table not in streams:
        raise BatchError(f"labels {name!r}: this batch has no tokens of table {table!r}, only {', '.join(streams) or 'none'}")
    return _per_token(name, values, streams[table])


def _per_example(name: str, values: Any, examples: int) -> Any:
    if not hasattr(values, "__len__") or isinstance(values, str) or len(values) != examples:
        got = len(values) if hasattr(values, "__len__") and not isinstance(values, str) else repr(values)
        raise BatchError(f"labels {name!r} must be one value per example, {examples} in all; got {got}")
    return _row(name, values)


def _per_token(name: str, values: Any, stream: Stream) -> list[Any]:
    try:
        lengths = [len(row) for row in values]
    except TypeError:
        raise BatchError(f"labels {name!r} must be one sequence per example, or padded [B, T]; got {values!r}") from None
    if lengths == stream.lengths:
        return [_row(name, row) for row in values]
    if lengths == [stream.width] * stream.rows:
        return _unpadded(name, values, stream)
    raise BatchError(
        f"labels {name!r} must be given per kept token (lengths {_short(stream.lengths)}) or padded like the batch "
        f"({stream.rows} x {stream.width}); got lengths {_short(lengths)}"
    )


def _unpadded(name: str, values: Any, stream: Stream) -> list[Any]:
    grid = _row(name, [value for row in values for value in row]) if not hasattr(values, "shape") else as_numpy(values)
    flat = np.asarray(grid, object) if isinstance(grid, list) else grid.reshape(stream.rows * stream.width, *_rest(values))
    keep = np.ones(len(flat), bool) if stream.mask is None else stream.mask.reshape(-1).cpu().numpy()
    pieces = np.split(flat[keep], np.cumsum(stream.lengths)[:-1])
    return [piece.tolist() if piece.dtype == object else piece for piece in pieces]


def _rest(values: Any) -> tuple[int, ...]:
    """Axes beyond [B, T]."""
    return tuple(values.shape[2:]) if hasattr(values, "shape") else ()


def _row(name: str, values: Any) -> list[str] | Array:
    """A copy: whoever gave the values may change them, while they wait to be written."""
    if _is_text(values):
        return list(values)
    try:
        return as_numpy(values).copy()
    except ValueError as error:
        raise BatchError(f"labels {name!r}: {error}") from None


def _is_text(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and len(values) > 0 and isinstance(values[0], str)


def _short(lengths: Sequence[int]) -> str:
    return str(list(lengths)) if len(lengths) <= 8 else f"[{', '.join(map(str, lengths[:8]))}, ...]"
