"""Choosing what to export, and a new folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..columns import Column
from ..errors import OutputExistsError, SchemaError
from ..names import is_bookkeeping
from . import npy, sae_lens, safetensors

if TYPE_CHECKING:
    from ..reader import Run

Write = Callable[["Run", list[Column], Path, dict[str, int]], None]
FORMATS: dict[str, Write] = {"safetensors": safetensors.write, "npy": npy.write, "sae-lens": sae_lens.write}
_OPTIONS = {"safetensors": {"rows_per_file"}, "npy": set(), "sae-lens": {"rows_per_file", "context_size"}}


def export(
    run: Run,
    to: str | os.PathLike[str],
    format: str = "safetensors",
    *,
    sites: str | Sequence[str] | None = None,
    rows_per_file: int | None = None,
    context_size: int | None = None,
) -> Path:
    """Write columns into a new folder. `Run.export` says how."""
    options = {"rows_per_file": rows_per_file, "context_size": context_size}
    given = {name: value for name, value in options.items() if value is not None}
    _check(format, given)
    columns = _columns(run, sites)
    with new_folder(Path(to)) as folder:
        FORMATS[format](run, columns, folder, given)
    return Path(to)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder that gets its name when everything is in it, and is removed if that fails; OutputExistsError for a name taken."""
    if final.exists():
        raise OutputExistsError(f"{final} exists; an export makes a new folder, so give another name or move that one away")
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check(format: str, options: dict[str, int]) -> None:
    if format not in FORMATS:
        raise ValueError(f"runs are exported as {', '.join(map(repr, FORMATS))}, not as {format!r}")
    foreign = sorted(set(options) - _OPTIONS[format])
    if foreign:
        raise ValueError(f"an export as {format!r} has no {' or '.join(foreign)}")
    small = [f"{name}={value}" for name, value in options.items() if value < 1]
    if small:
        raise ValueError(f"{', '.join(small)}: at least 1 is needed")


def _columns(run: Run, sites: str | Sequence[str] | None) -> list[Column]:
    if sites is None:
        every = [column for table in run.tables.values() for column in table.values()]
        return [column for column in every if column.dtype != object and not is_bookkeeping(column.name)]
    columns = run.columns(sites)
    texts = [column.name for column in columns if column.dtype == object]
    if texts:
        raise SchemaError(f"exports hold numbers, but {', '.join(texts)} is text")
    return columns
