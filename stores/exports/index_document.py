"""The index of an export: which file holds which rows of which column, and which rows are whose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import dtypes
from ..columns import Column
from ..schema import Json

if TYPE_CHECKING:
    from ..reader import Run

INDEX, EXAMPLES = "index.json", "examples.jsonl"
VERSION = 1


def write(run: Run, folder: Path, columns: dict[str, Json]) -> None:
    """`index.json`, and `examples.jsonl` with one line per example: its key, and how many rows it has in each table."""
    texts = [column.name for table in run.tables.values() for column in table.values() if column.dtype == object]
    document = {
        "format": "tensortape-export",
        "version": VERSION,
        "run": run.uid,
        "model": run.model,
        "examples": EXAMPLES,
        "columns": columns,
        "text_left_out": texts,
    }
    (folder / INDEX).write_text(json.dumps(document, indent=1))
    with (folder / EXAMPLES).open("w") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in _examples(run))


def entry(column: Column, files: list[Json], **more: str) -> Json:
    """What the index says of a column. `examples` lists those that have it, by line of `examples.jsonl`; null for all of them."""
    present = column.present
    return {
        "dtype": dtypes.name_of(np.empty(0, column.dtype)),
        **more,
        "shape": list(column.shape),
        "axes": list(column.axes),
        "table": column.table,
        "examples": None if present.all() else np.flatnonzero(present).tolist(),
        "site": column.site,
        "attributes": column.attributes,
        "files": files,
    }


def _examples(run: Run) -> Iterator[Json]:
    lengths = {name: table.lengths.tolist() for name, table in run.tables.items() if name.startswith(("token", "pair"))}
    for number, (id_, phase, step) in enumerate(run.keys):
        rows = {name: counts[number] for name, counts in lengths.items() if counts[number] >= 0}
        yield {"id": id_, "phase": phase, "step": step, "rows": rows}
