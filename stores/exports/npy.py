"""Columns as one `.npy` file each; bfloat16 and float8, which numpy does not know, as unsigned integers of the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import dtypes, names
from ..columns import Column
from . import index_document

if TYPE_CHECKING:
    from ..reader import Run

BLOCK_BYTES = 32 << 20


def write(run: Run, columns: list[Column], folder: Path, options: dict[str, int]) -> None:
    """`<table>/<column>.npy` [rows, *feature], beside the index, which names the dtype that was recorded."""
    entries = {}
    for column in columns:
        table, short = map(names.to_disk, names.split(column.name))
        (folder / table).mkdir(exist_ok=True)
        name = f"{table}/{short}.npy"
        stored = _write(column, folder / name)
        entries[column.name] = index_document.entry(column, [{"file": name, "rows": [0, len(column)]}], stored_dtype=stored)
    index_document.write(run, folder, entries)


def _write(column: Column, path: Path) -> str:
    """The file, block by block (not through a memory map: a full disk is then an error, not a signal); the dtype in it."""
    dtype = dtypes.to_stored(np.empty(0, column.dtype)).dtype
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": column.shape}
    rows = max(1, BLOCK_BYTES * len(column) // max(column.nbytes, 1))
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in column.blocks(rows):
            dtypes.to_stored(block).tofile(file)
    return dtype.name
