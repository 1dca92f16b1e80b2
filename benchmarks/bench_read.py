"""Reading a column in four ways, compressed and not, beside np.memmap, TensorStore, zarr-python and zarrs.

In order, by example, rows at random, and shuffled batches. The others read the same shards as the column does, but for np.memmap,
which always maps a plain file of the same rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import zarr
from activations import FEATURES, like_activations
from report import interleaved, needed, publish, ram_folder, ratio_table, sizes

from tensortape.stores import Column, Run, RunWriter, open_run

SHORTEST, LONGEST = 64, 1024  # rows of an example
ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
AGAINST = ("np.memmap", "TensorStore", "zarr-python")
COLUMN = "token/h"

tensorstore = needed("tensorstore")
needed("zarrs")

Rows = np.ndarray[Any, np.dtype[np.uint16]]
Take = Callable[[Any], object]
Fill = Callable[[Rows, list[slice]], object]


@dataclass(frozen=True)
class Stored:
    """The same rows as a run and as a plain file, which is mapped."""

    path: Path
    mapped: Rows
    edges: np.ndarray[Any, np.dtype[np.int64]]  # where examples begin and end
    warm: Column  # every chunk of which has been touched

    def opened(self) -> Run:
        """The run, nothing of which has been read."""
        return open_run(self.path)

    def column(self) -> Column:
        """The column of a freshly opened run."""
        return self.opened()[COLUMN]

    def arrays(self) -> dict[str, Any]:
        """The column's array, opened by others."""
        path = self.path / self.column().paths[0]
        with zarr.config.set(ZARRS):
            rust = zarr.open_array(path, mode="r")
        return {
            "TensorStore": tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result(),
            "zarr-python": zarr.open_array(path, mode="r"),
            "zarrs": rust,
        }


def prepare(folder: Path, count: int, codec: str) -> Stored:
    """Write `count` rows, of examples of any length between two, on the RAM disk."""
    random = np.random.default_rng(0)
    rows = like_activations(count, random)
    edges = np.concatenate([[0], np.cumsum(random.integers(SHORTEST, LONGEST, count // SHORTEST))])
    edges = np.append(edges[edges < count], count)
    with RunWriter(folder / "run.zarr", durability="rename", compress=codec) as writer:
        for number, (start, stop) in enumerate(pairwise(edges)):
            writer.append(ids=[number], columns={COLUMN: [rows[start:stop].view(ml_dtypes.bfloat16)]})
    rows.tofile(folder / "rows.raw")
    warm = open_run(folder / "run.zarr")[COLUMN]
    warm.rows()
    return Stored(folder / "run.zarr", np.memmap(folder / "rows.raw", np.uint16, "r", shape=rows.shape), edges, warm)


def readers(stored: Stored) -> dict[str, Take]:
    """Functions that return the rows of a slice, or of an array of row numbers, as an array in memory."""
    arrays = stored.arrays()
    store = arrays.pop("TensorStore")
    return {
        "np.memmap": lambda index: np.array(stored.mapped[index]),
        "column, warm": stored.warm.rows,
        "column, cold": lambda index: stored.column().rows(index),
        "TensorStore": lambda index: store[index].read().result(),
        **{name: partial(zarr_rows, array) for name, array in arrays.items()},
    }


def zarr_rows(array: Any, index: Any) -> object:
    """Rows of a Zarr array; numbers in any order take its `oindex`."""
    return array.oindex[index] if isinstance(index, np.ndarray) else array[index]


def example_readers(stored: Stored) -> dict[str, Take]:
    """Functions that copy examples, one after another, to where somebody needs them."""
    arrays = stored.arrays()
    store = arrays.pop("TensorStore")
    slices = [slice(int(start), int(stop)) for start, stop in pairwise(stored.edges)]
    needed_at = np.empty((LONGEST, FEATURES), np.uint16)

    def copy(rows: Iterable[Any]) -> None:
        for example in rows:
            needed_at[: len(example)] = example.view(np.uint16)

    def from_tensorstore(numbers: list[int]) -> None:
        reads = [store[slices[number]].read() for number in numbers]  # all of them at once
        copy(read.result() for read in reads)

    def from_array(array: Any, numbers: list[int]) -> None:
        copy(array[slices[number]] for number in numbers)

    def from_column(column: Callable[[], Column], numbers: list[int]) -> None:
        opened = column()
        copy(opened[number] for number in numbers)

    return {
        "np.memmap": partial(from_array, stored.mapped),
        "column, warm": partial(from_column, lambda: stored.warm),
        "column, cold": partial(from_column, stored.column),
        "TensorStore": from_tensorstore,
        **{name: partial(from_array, array) for name, array in arrays.items()},
    }


def shufflers(stored: Stored, batch: int, buffer_rows: int) -> dict[str, Take]:
    """Functions that visit all rows in shuffled batches: chunks in random order, mixed in a buffer."""
    run = stored.opened()
    chunk = int(run[COLUMN].edges("chunk")[1])
    arrays = stored.arrays()
    store = arrays.pop("TensorStore")

    def from_tensorstore(buffer: Rows, blocks: list[slice]) -> None:
        reads = [store[block].read() for block in blocks]  # all of them at once
        for number, read in enumerate(reads):
            buffer[number * chunk : (number + 1) * chunk] = read.result()

    def one_by_one(source: Any, buffer: Rows, blocks: list[slice]) -> None:
        for number, block in enumerate(blocks):
            buffer[number * chunk : (number + 1) * chunk] = source[block]

    held = run.batches(COLUMN, batch, buffer_rows=buffer_rows)
    fills: dict[str, Fill] = {
        "np.memmap": partial(one_by_one, stored.mapped),
        "TensorStore": from_tensorstore,
        **{name: partial(one_by_one, array) for name, array in arrays.items()},
    }
    buffer = np.empty((buffer_rows, FEATURES), np.uint16)
    epochs: dict[str, Callable[[int], Iterable[object]]] = {
        **{name: partial(epoch, fill, buffer, len(stored.mapped) // chunk, chunk, batch) for name, fill in fills.items()},
        "run.batches, warm": lambda seed: held,
        "run.batches, cold": lambda seed: stored.opened().batches(COLUMN, batch, seed=seed, buffer_rows=buffer_rows),
    }
    return {name: partial(drain, batches) for name, batches in epochs.items()}


def epoch(fill: Fill, buffer: Rows, chunks: int, chunk: int, batch: int, seed: int) -> Iterator[Rows]:
    """All rows once, as anyone would shuffle them who has blocks of rows to read; the buffer is used again and again."""
    random = np.random.default_rng(seed)
    for group in random.permutation(chunks).reshape(-1, len(buffer) // chunk):
        fill(buffer, [slice(number * chunk, (number + 1) * chunk) for number in group])
        mixing = random.permutation(len(buffer))
        for start in range(0, len(buffer), batch):
            yield buffer.take(mixing[start : start + batch], axis=0)


def drain(batches: Callable[[int], Iterable[object]], seed: int) -> None:
    """A training loop that does nothing."""
    for _ in batches(seed):
        pass


def measure(chosen: dict[str, Take], index: Callable[[], object], repetitions: int) -> dict[str, list[float]]:
    """Times of all readers on the same indices, a new one for each repetition."""
    indices = [index() for _ in range(repetitions + 1)]
    turns = {name: iter(indices) for name in chosen}
    return interleaved({name: lambda name=name: chosen[name](next(turns[name])) for name in chosen}, repetitions)


def tables(size: argparse.Namespace, codec: str, repetitions: int) -> dict[str, list[str]]:
    """All four ways to read one run."""
    random = np.random.default_rng(1)
    with ram_folder() as folder:
        stored = prepare(folder, size.rows, codec)
        chosen, by_example = readers(stored), example_readers(stored)
        whole = measure(chosen, lambda: slice(None), repetitions)
        numbers = partial(random.integers, len(stored.edges) - 1)
        examples = measure(by_example, lambda: numbers(size=size.examples).tolist(), repetitions)
        rows = measure(chosen, lambda: random.integers(0, size.rows, size.gathered), repetitions)
        shuffled = measure(shufflers(stored, size.batch, size.buffer), lambda: int(random.integers(1 << 30)), repetitions)
    table, length = partial(ratio_table, against=AGAINST), f"{SHORTEST} to {LONGEST - 1} rows"
    of = "" if codec == "none" else f", {codec}"
    mixed = f"shuffled by chunks in a buffer of {size.buffer} rows"
    return {
        f"All rows of [{size.rows}, {FEATURES}] bf16 in order{of}": table(whole, amount=size.rows * FEATURES * 2e-9, unit="GB/s"),
        f"{size.examples} examples of {length}{of}": table(examples, amount=size.examples, unit="examples/s"),
        f"{size.gathered} random rows{of}": table(rows, amount=size.gathered / 1e6, unit="million rows/s"),
        f"An epoch of batches of {size.batch} rows, {mixed}{of}": table(shuffled, amount=size.rows / 1e6, unit="million rows/s"),
    }


def main() -> None:
    """Measure and publish."""
    size = sizes(
        rows=49152, examples=64, gathered=4096, batch=4096, buffer=16384, repetitions=7, compressed_repetitions=5
    )  # rows are a multiple of the buffer's, and that of the batch's
    sections = tables(size, "none", size.repetitions)
    for codec in ("lz4", "zstd"):
        sections |= tables(size, codec, size.compressed_repetitions)
    publish("read", "Reading", sections, ("tensorstore", "zarrs"))


if __name__ == "__main__":
    main()
