"""Reading: a column, and shuffled batches of it, beside np.memmap, TensorStore, zarr-python and zarrs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore
import zarr
from report import interleaved, publish, ram_folder, ratio_table

from tensortape.stores import RunWriter, open_run

ROWS, FEATURES, GATHERED, REPETITIONS = 49152, 768, 4096, 9
BATCH, BUFFER = 4096, 16384
ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
Fill = Callable[[np.ndarray, list[slice]], None]


def prepare(folder: Path) -> np.ndarray:
    """The same rows as a run and as a plain file, both on the RAM disk."""
    rows = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype(ml_dtypes.bfloat16)
    with RunWriter(folder / "run.zarr", durability="rename") as writer:
        for start in range(0, ROWS, 8192):
            writer.append(ids=[start], columns={"token/h": [rows[start : start + 8192]]})
    rows.view(np.uint16).tofile(folder / "rows.raw")
    return np.memmap(folder / "rows.raw", np.uint16, "r", shape=(ROWS, FEATURES))


def readers(folder: Path, mapped: np.ndarray) -> dict[str, Callable[[object], object]]:
    """Functions that return the rows of an index as an array in memory."""
    column = open_run(folder / "run.zarr")["token/h"]
    path = folder / "run.zarr" / column.paths[0]
    store = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result()
    plain = zarr.open_array(path, mode="r")
    return {
        "np.memmap": lambda index: np.array(mapped[index]),
        "column, warm": column.rows,
        "column, cold": lambda index: open_run(folder / "run.zarr")["token/h"].rows(index),
        "TensorStore": lambda index: store[index].read().result(),
        "zarr-python": lambda index: plain.oindex[index] if isinstance(index, np.ndarray) else plain[index],
    }


def measure(chosen: dict[str, Callable[[object], object]], index: Callable[[], object]) -> dict[str, list[float]]:
    """Times of all readers on the same indices, a new one for each repetition."""
    indices = [index() for _ in range(REPETITIONS + 1)]
    turns = {name: iter(indices) for name in chosen}
    return interleaved({name: lambda name=name: chosen[name](next(turns[name])) for name in chosen}, REPETITIONS)


def shufflers(folder: Path, mapped: np.ndarray) -> dict[str, Callable[[object], object]]:
    """Functions that visit all rows in shuffled batches: chunks in random order, mixed in a buffer."""
    run = open_run(folder / "run.zarr")
    chunk = int(run["token/h"].edges("chunk")[1])
    path = folder / "run.zarr" / run["token/h"].paths[0]
    store = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result()
    with zarr.config.set(ZARRS):
        rust = zarr.open_array(path, mode="r")

    def from_tensorstore(buffer: np.ndarray, blocks: list[slice]) -> None:
        reads = [store[block].read() for block in blocks]  # all of them at once
        for number, read in enumerate(reads):
            buffer[number * chunk : (number + 1) * chunk] = read.result()

    def one_by_one(source: object, buffer: np.ndarray, blocks: list[slice]) -> None:
        for number, block in enumerate(blocks):
            buffer[number * chunk : (number + 1) * chunk] = source[block]

    held = run.batches("token/h", BATCH, buffer_rows=BUFFER)
    fills: dict[str, Fill] = {
        "np.memmap": partial(one_by_one, mapped),
        "TensorStore": from_tensorstore,
        "zarr-python": partial(one_by_one, zarr.open_array(path, mode="r")),
        "zarrs": partial(one_by_one, rust),
    }
    buffer = np.empty((BUFFER, FEATURES), np.uint16)
    epochs: dict[str, Callable[[int], Iterable[np.ndarray]]] = {
        **{name: partial(epoch, fill, buffer, chunk) for name, fill in fills.items()},
        "run.batches, warm": lambda seed: held,
        "run.batches, cold": lambda seed: open_run(run.path).batches("token/h", BATCH, seed=seed, buffer_rows=BUFFER),
    }
    return {name: partial(drain, batches) for name, batches in epochs.items()}


def epoch(fill: Fill, buffer: np.ndarray, chunk: int, seed: int) -> Iterator[np.ndarray]:
    """All rows once, as anyone would shuffle them who has blocks of rows to read; the buffer is used again and again."""
    random = np.random.default_rng(seed)
    for group in random.permutation(ROWS // chunk).reshape(-1, BUFFER // chunk):
        fill(buffer, [slice(number * chunk, (number + 1) * chunk) for number in group])
        mixing = random.permutation(BUFFER)
        for start in range(0, BUFFER, BATCH):
            yield buffer.take(mixing[start : start + BATCH], axis=0)


def drain(batches: Callable[[int], Iterable[np.ndarray]], seed: object) -> None:
    """A training loop that does nothing."""
    for _ in batches(seed):
        pass


def main() -> None:
    """Measure and publish."""
    random = np.random.default_rng(1)
    with ram_folder() as folder:
        mapped = prepare(folder)
        chosen = readers(folder, mapped)
        chosen["column, warm"](slice(None))  # the first touch of every chunk
        gathered = measure(chosen, lambda: random.integers(0, ROWS, GATHERED))
        sequential = measure(chosen, lambda: slice(None))
        shuffled = measure(shufflers(folder, mapped), lambda: int(random.integers(1 << 30)))
    sections = {
        f"{GATHERED} random rows of [{ROWS}, {FEATURES}] bf16": ratio_table(
            gathered, against="np.memmap", amount=GATHERED / 1e6, unit="million rows/s"
        ),
        "All rows in order": ratio_table(sequential, against="np.memmap", amount=ROWS * FEATURES * 2 / 1e9, unit="GB/s"),
        f"An epoch of batches of {BATCH} rows, shuffled by chunks in a buffer of {BUFFER} rows": ratio_table(
            shuffled, against="np.memmap", amount=ROWS / 1e6, unit="million rows/s"
        ),
    }
    publish("read", "Reading", sections)


if __name__ == "__main__":
    main()
