"""Extension parts: columns added to examples that a run already has."""

from __future__ import annotations

import uuid
from importlib.metadata import version
from typing import Any

import numpy as np

from . import keys, layout, names, runs
from .dtypes import Array
from .errors import SchemaError, UnknownColumnError
from .index import Index
from .part_state import PartState
from .parts import PartWriter, key_columns, start_columns
from .places import Place
from .ragged import Cells, cells
from .schema import PartDocument, RunDocument


def exists(name: str) -> SchemaError:
    """The error for a column that is there already."""
    return SchemaError(f"column {name!r} is already in the run; columns are never rewritten, give it another name")


def add(place: Place, run: RunDocument, index: Index, parts: list[PartState], name: str, values: Any, ids: Any) -> None:
    """Write one column as a part of its own, closed at once."""
    names.refuse_bookkeeping(name)
    if not len(index):
        raise SchemaError("the run holds no example yet, so there is nothing to add a column to")
    chosen = np.arange(len(index)) if ids is None else _numbers(index, keys.normalise(ids))
    document = PartDocument(run=run.uid, session=uuid.uuid4().hex, kind="extension", writer=f"tensortape {version('tensortape')}")
    writer = PartWriter(place, lambda: document, layout.DEFAULT_BUDGET)
    column = _cells(index, name, values, chosen)
    bounds = {} if column.lengths is None else {names.split(name)[0]: column.lengths}
    given = {name: column, **start_columns(bounds), **key_columns(*(column[chosen] for column in index.keys))}
    runs.check_is(place, run.uid, place.root)
    writer.prepare(given, {})
    writer.append(given)
    writer.commit("closed", aligned=_spans(parts, index) if ids is None else ())


def _cells(index: Index, name: str, values: Any, chosen: Array) -> Cells:
    table, _ = names.split(name)
    if not names.is_ragged(table):
        return cells(name, values, len(chosen), {})
    expected = index.lengths(table)[chosen]
    lengths = {table: expected} if _is_packed(values, int(expected.sum())) else {}
    column = cells(name, values, len(chosen), lengths)
    wrong = np.flatnonzero((expected >= 0) & (expected != column.lengths))
    if len(wrong):
        at = int(wrong[0])
        got = (column.lengths if column.lengths is not None else expected)[at]
        raise SchemaError(
            f"column {name!r} has {got} rows for example {index.keys[0][chosen[at]]!r}, which has {expected[at]} in {table!r}"
        )
    return column


def _is_packed(values: Any, rows: int) -> bool:
    return hasattr(values, "shape") and len(values.shape) > 0 and values.shape[0] == rows


def _spans(parts: list[PartState], index: Index) -> list[tuple[str, int, int]]:
    """Which parts' examples, in order, an extension over all examples lines up with; none where the order is not simply that."""
    own = [part for part in parts if not part.aligned]
    fewer = any(part.withdrawn or part.hidden_from is not None for part in parts)
    if fewer or sum(part.examples for part in own) != len(index):
        return []
    return [(part.name, 0, part.examples) for part in own]


def _numbers(index: Index, ids: keys.Ids) -> Array:
    keys.check_unique(ids)
    known: dict[str | int, int] = {}
    for number, id_ in enumerate(index.keys[0].tolist()):
        if known.setdefault(id_, number) != number and id_ in ids:
            raise SchemaError(f"id {id_!r} stands for several examples (at other phases or steps); add the column to all examples")
    missing = [id_ for id_ in ids if id_ not in known]
    if missing:
        raise UnknownColumnError(f"the run has no example {missing[0]!r}")
    return np.array([known[id_] for id_ in ids], np.int64)
