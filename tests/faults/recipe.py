"""What the fault suite records: examples that follow from a seed, so that any process can say what a run must hold.

One append is five examples in five columns: token rows of two dtypes, token texts, a label and a title. Nothing here knows how a
run lies on disk.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import random_values

from tensortape.stores import RunWriter, open_run
from tensortape.stores.errors import BrokenWriterError

EXAMPLES = 5  # per append
BUDGET = 1 << 20  # shards of one chunk each, so that a few appends fill them
COLUMNS = ("token/h", "token/u", "token/word", "example/label", "example/title")
ADDED = "token/added"
Acknowledge = Callable[[int | str], object]
ASSETS = {"tokenizer.json": b'{"a": 0, "b": 1}', "Special Tokens.txt": b"<s> </s> <pad>"}


@dataclass(frozen=True)
class Recipe:
    """A recording: its seed, how many appends it has, the most token rows an example may have, and its columns."""

    seed: int
    appends: int
    rows: int
    columns: tuple[str, ...] = COLUMNS

    def append(self, number: int) -> dict[str, dict[str, Any]]:
        """The examples of one append: id to column to value."""
        return _append(self.seed, number, self.rows)

    def given(self, number: int) -> dict[str, Any]:
        """The same as arguments of `RunWriter.append`."""
        examples = self.append(number)
        return {"ids": list(examples), "columns": {name: [cells[name] for cells in examples.values()] for name in self.columns}}

    @property
    def examples(self) -> dict[str, dict[str, Any]]:
        """All examples, in order."""
        return {id_: cells for number in range(self.appends) for id_, cells in self.append(number).items()}


@lru_cache(maxsize=4096)
def _append(seed: int, number: int, rows: int) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng([seed, number])
    lengths = rng.integers(0, rows, EXAMPLES, endpoint=True)
    return {f"{number}-{n}{'é' * (n % 2)}": _example(rng, int(length)) for n, length in enumerate(lengths)}


def _example(rng: np.random.Generator, length: int) -> dict[str, Any]:
    return {
        "token/h": random_values(rng, "bfloat16", (length, 7)),
        "token/u": random_values(rng, "float32", (length, 3)),
        "token/word": np.array([f"wört{n}" for n in rng.integers(0, 999, length)], object),
        "example/label": np.int64(rng.integers(0, 1 << 40)),
        "example/title": f"title {rng.integers(0, 1 << 40)}",
        ADDED: random_values(rng, "float16", (length,)),
    }


@contextmanager
def writing(path: Path, mode: str = "resume", **options: Any) -> Iterator[RunWriter]:
    """A writer that nobody closes in the end; once anything has failed it must refuse to go on."""
    writer = RunWriter(path, mode=mode, **{"memory_budget": BUDGET, "durability": "rename", **options})
    try:
        yield writer
    except BaseException:
        with pytest.raises(BrokenWriterError):
            writer.commit()
        raise
    finally:
        atexit.unregister(writer.close)


def record(path: Path, recipe: Recipe, acknowledge: Acknowledge, every: int = 1, mode: str = "resume", **options: Any) -> None:
    """Append what a run lacks, commit after every so many appends, close, add a column; what is committed is acknowledged.

    Acknowledged are the numbers of appends and the name of the added column.
    """
    with writing(path, mode, **options) as writer:
        append(writer, recipe, acknowledge, every)
    run = open_run(path)
    if "added" not in run.tables["token"]:
        run.add_column(ADDED, [recipe.examples[id_][ADDED] for id_ in run.ids])
    acknowledge(ADDED)


def append(writer: RunWriter, recipe: Recipe, acknowledge: Acknowledge, every: int = 1, share: slice = slice(None)) -> None:
    """The part of `record` that a writer does, or its share of the appends."""
    for name, content in ASSETS.items():
        writer.add_asset(name, content)
    waiting: list[int] = []
    for number in range(recipe.appends)[share]:
        if next(iter(recipe.append(number))) not in writer.committed_ids:
            writer.append(**recipe.given(number))
            waiting.append(number)
        if len(waiting) == every:
            writer.commit()
            _pass_on(waiting, acknowledge)
    writer.close()
    _pass_on(waiting, acknowledge)


def _pass_on(waiting: list[int], acknowledge: Acknowledge) -> None:
    while waiting:
        acknowledge(waiting.pop(0))
