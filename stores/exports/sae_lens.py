"""Columns as the Hugging Face dataset that SAELens reads with `use_cached_activations`.

One row per sequence: a column per hook, float [context, d], and `token_ids`, int32 [context]. SAELens takes sequences of one length
and puts their rows one after another again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import selection
from ..chosen_rows import ChosenRows
from ..columns import Column
from ..dtypes import Array
from ..errors import SchemaError

if TYPE_CHECKING:
    from datasets import Features

    from ..reader import Run

_HOOKS = {"embed": "hook_embed", "final_norm": "ln_final.hook_normalized"}


def write(run: Run, columns: list[Column], folder: Path, options: dict[str, int]) -> None:
    """A dataset, for `datasets.load_from_disk`, of the examples that have all the columns."""
    try:
        from datasets import Dataset
    except ImportError:
        raise ImportError("the format 'sae-lens' needs datasets: pip install 'tensortape[datasets]'") from None
    sources = _sources(run, columns)
    rows = next(iter(sources.values())).count
    context = options.get("context_size") or _common_length(columns[0])
    if rows < context:
        raise SchemaError(f"the examples have {rows} rows, which make no sequence of {context}; give a smaller context_size")
    dataset = Dataset.from_generator(
        _sequences,
        features=_features(sources, context),
        cache_dir=str(folder / "unsaved"),
        gen_kwargs={"sources": sources, "context": context, "count": rows // context},
    )
    per_file = max(1, options["rows_per_file"] // context) if "rows_per_file" in options else None
    dataset.save_to_disk(str(folder), num_shards=None if per_file is None else -(-rows // context // per_file))
    shutil.rmtree(folder / "unsaved")


def hook_name(column: Column) -> str:
    """The TransformerLens name of a site that has one, else the column's own."""
    site = selection.site_name(column)
    named = [alias for alias in selection.aliases_of(column) if not alias.stack and site.base in ("in", "out")]
    if not named or site.is_gradient:
        return column.name.partition("/")[2]
    return _HOOKS.get(named[0].name) or f"blocks.{named[0].layer}.hook_{named[0].name}"


def _sources(run: Run, columns: list[Column]) -> dict[str, ChosenRows]:
    """The rows behind each column of the dataset."""
    tables = {column.table for column in columns}
    if len(tables) != 1 or not columns[0].table.startswith("token"):
        raise SchemaError(f"SAELens reads rows of tokens of one table; the columns chosen are of {', '.join(sorted(tables))}")
    named = {hook_name(column) if column.site else column.name.partition("/")[2]: column for column in columns}
    unfit = [column.name for column in columns if column.dtype.kind not in "fV"]
    if unfit:
        raise SchemaError(f"SAELens reads floats; {', '.join(unfit)} holds none. Token ids are added without being asked for")
    if "input_ids" in run.tables[columns[0].table]:
        named["token_ids"] = run.tables[columns[0].table]["input_ids"]
    chosen = np.logical_and.reduce([column.present for column in named.values()])
    return {name: ChosenRows(column, chosen) for name, column in named.items()}


def _common_length(column: Column) -> int:
    lengths = np.unique(column.lengths[column.lengths > 0])
    if len(lengths) != 1:
        shown = f"{lengths.min()} to {lengths.max()} rows" if len(lengths) else "no rows"
        raise SchemaError(
            f"SAELens reads sequences of one length, but examples of {column.name!r} have {shown}; give context_size=, and the "
            "rows of all examples, one after another, are cut into sequences of that many"
        )
    return int(lengths[0])


def _features(sources: dict[str, ChosenRows], context: int) -> Features:
    from datasets import Array2D, Features, Sequence, Value

    found = {
        name: Array2D(shape=(context, math.prod(source.column.shape[1:])), dtype=_dtype(source.column))
        for name, source in sources.items()
        if name != "token_ids"
    }
    ids = {"token_ids": Sequence(Value("int32"), length=context)} if "token_ids" in sources else {}
    return Features({**found, **ids})


def _sequences(sources: dict[str, ChosenRows], context: int, count: int) -> Iterator[dict[str, Array]]:
    for number in range(count):
        yield {name: _sequence(name, source, number * context, context) for name, source in sources.items()}


def _sequence(name: str, source: ChosenRows, start: int, context: int) -> Array:
    out = np.empty((context, *source.column.shape[1:]), source.column.dtype)
    source.read([(start, start + context)], out)
    return out.astype(np.int32) if name == "token_ids" else out.reshape(context, -1).astype(_dtype(source.column))


def _dtype(column: Column) -> str:
    """Arrow has no bfloat16 and no float8: float32 holds all of their values."""
    return column.dtype.name if column.dtype.kind == "f" else "float32"
