"""What must hold of a run after any fault, seen by our reader and by zarr-python alone. Each check says what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from strategies import bits, same_bits

from tensortape.stores import Run, StoreError, open_run

from .recipe import ADDED, ASSETS, Recipe, record


def broken(path: Path, recipe: Recipe, acknowledged: Iterable[int | str]) -> list[str]:
    """P1 and P2: everything acknowledged is there, what is there is whole and right, and the run is sound."""
    return [*_to_our_reader(path, recipe, set(acknowledged)), *torn_to_zarr(path, recipe)]


def broken_after_resuming(path: Path, recipe: Recipe, **options: Any) -> list[str]:
    """P3: a new session completes the run, which is then what an uninterrupted recording makes."""
    everything: list[int | str] = []
    try:
        record(path, recipe, everything.append, **options)
    except Exception as error:
        return [f"cannot be resumed: {error!r}"]
    return [*_to_our_reader(path, recipe, {*range(recipe.appends), *everything}), *_otherwise(open_run(path), recipe)]


def _otherwise(run: Run, recipe: Recipe) -> Iterator[str]:
    """Where a complete run is not the recipe's."""
    if sorted(run.ids) != sorted(recipe.examples):
        yield f"the completed run holds {len(run)} examples instead of {len(recipe.examples)}"
    if {name: run.asset(name) for name in run.assets} != ASSETS:
        yield f"the completed run has the assets {run.assets}"


def _to_our_reader(path: Path, recipe: Recipe, acknowledged: set[int | str]) -> list[str]:
    if not acknowledged and not (path / "zarr.json").exists():
        return []
    try:
        run = open_run(path)
        report = run.verify()
        wrong = [*_lost(run, recipe, acknowledged), *_changed(run, recipe)]
    except Exception as error:
        return [f"cannot be read: {error!r}"]
    return wrong if report.ok else [*wrong, repr(report)]


def changed(path: Path, recipe: Recipe) -> list[str]:
    """What is promised also of a damaged run: whatever can be read is right; what cannot raises one of our errors."""
    try:
        return list(_changed(open_run(path), recipe))
    except StoreError:
        return []
    except Exception as error:
        return [f"not one of our errors: {error!r}"]


def _lost(run: Run, recipe: Recipe, acknowledged: set[int | str]) -> Iterator[str]:
    """Appends that are not there though they were acknowledged, or of which only a part is there."""
    held = set(run.ids)
    for number in range(recipe.appends):
        there = held & set(recipe.append(number))
        if number in acknowledged and not there:
            yield f"append {number} was acknowledged and is lost"
        elif there and len(there) < len(recipe.append(number)):
            yield f"append {number} is torn: only {sorted(there)} are there"
    if len(held) != len(run) or held - set(recipe.examples):
        yield f"ids that nobody gave, or twice: {sorted(held - set(recipe.examples))[:3]}"
    if ADDED in acknowledged and not run[ADDED].present.all():
        yield f"{ADDED} was acknowledged for all examples, but some lack it"


def _changed(run: Run, recipe: Recipe) -> Iterator[str]:
    expected = recipe.examples
    for name in (*recipe.columns, ADDED):
        table, _, short = name.partition("/")
        if short not in run.tables.get(table, {}):
            continue
        column = run[name]
        for number in np.flatnonzero(column.present):
            if not same(column[int(number)], expected[run.ids[number]][name]):
                yield f"{name} of example {run.ids[number]!r} is not what was recorded"


def same(found: Any, expected: Any) -> bool:
    """Whether two values of a cell are the same, bit for bit."""
    if np.asarray(expected).dtype.kind in "UO":
        return np.array_equal(found, expected)
    return same_bits(found, expected)


# By zarr-python alone: arrays are found by their documents, examples by `example/id`; commit records are not looked at.


def torn_to_zarr(path: Path, recipe: Recipe) -> list[str]:
    """P2 for readers that know only Zarr: every example that `example/id` of a part lists is whole in every column of that part."""
    return [wrong for part in sorted(path.glob("parts/p*")) for wrong in _torn(part, recipe)]


def _torn(part: Path, recipe: Recipe) -> Iterator[str]:
    documents = [document for document in part.rglob("zarr.json") if b'"node_type": "array"' in document.read_bytes()]
    arrays = {
        document.parent.relative_to(part).as_posix(): zarr.open_array(document.parent, mode="r", zarr_format=3)
        for document in documents
    }
    listed = arrays["example/id/end"].shape[0] if "example/id/end" in arrays else 0
    if not listed:
        return
    ids = _rows(arrays, "example/id", listed)
    columns = [name for name in (*recipe.columns, ADDED) if {name, f"{name}/end"} & set(arrays)]
    if set(columns) not in ({*recipe.columns}, {ADDED}):
        yield f"{part.name} lists {listed} examples, but to zarr it has only the columns {columns}"
    bounds = list(zip(*(arrays[f"example/{kind}.token"][:listed].tolist() for kind in ("start", "length")), strict=True))
    for name in columns:
        spans = bounds if name.startswith("token/") else [(number, 1) for number in range(listed)]
        rows = _rows(arrays, name, sum(spans[-1]))
        for id_, (start, length) in zip(ids, spans, strict=True):
            if not _same_stored(rows[start : start + length], recipe.examples[id_][name]):
                yield f"to zarr, {name} of the listed example {id_!r} in {part.name} is torn"


def _rows(arrays: dict[str, zarr.Array], name: str, stop: int) -> Any:
    """The first rows of a column; texts as a list."""
    if name in arrays:
        return arrays[name][:stop]
    ends = [0, *arrays[f"{name}/end"][:stop].tolist()]
    utf8 = arrays[f"{name}/utf8"][: ends[-1]].tobytes()
    return [utf8[start:end].decode(errors="replace") for start, end in pairwise(ends)]


def _same_stored(found: Any, expected: Any) -> bool:
    if isinstance(found, list):
        return found == ([expected] if isinstance(expected, str) else expected.tolist())
    rows = np.asarray(expected)
    return np.array_equal(bits(found), bits(rows if rows.ndim else rows[None]))
