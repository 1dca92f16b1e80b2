"""Columns as safetensors files of bounded size; every dtype as it was recorded, bfloat16 as BF16."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from .. import names
from ..columns import Column
from ..schema import Json
from . import index_document

if TYPE_CHECKING:
    from ..reader import Run

FILE_BYTES = 256 << 20


def write(run: Run, columns: list[Column], folder: Path, options: dict[str, int]) -> None:
    """`<table>/<column>-00000-of-00012.safetensors`, each with one tensor of the column's name, beside the index."""
    entries = {
        column.name: index_document.entry(column, _files(column, folder, options.get("rows_per_file"))) for column in columns
    }
    index_document.write(run, folder, entries)


def _files(column: Column, folder: Path, rows: int | None) -> list[Json]:
    rows = rows or max(1, FILE_BYTES // (math.prod(column.shape[1:]) * column.dtype.itemsize))
    starts = range(0, len(column), rows)
    table, short = map(names.to_disk, names.split(column.name))
    (folder / table).mkdir(exist_ok=True)
    files: list[Json] = []
    for number, start in enumerate(starts):
        stop = min(start + rows, len(column))
        name = f"{table}/{short}-{number:05d}-of-{len(starts):05d}.safetensors"
        save_file({column.name: np.ascontiguousarray(column.rows(slice(start, stop)))}, folder / name)
        files.append({"file": name, "rows": [start, stop]})
    return files
