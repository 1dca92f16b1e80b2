"""Reading: a column beside np.memmap, TensorStore and zarr-python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore
import zarr
from report import interleaved, publish, ram_folder, ratio_table

from tensortape.stores import RunWriter, open_run

ROWS, FEATURES, GATHERED, REPETITIONS = 49152, 768, 4096, 9


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


def main() -> None:
    """Measure and publish."""
    random = np.random.default_rng(1)
    with ram_folder() as folder:
        chosen = readers(folder, prepare(folder))
        chosen["column, warm"](slice(None))  # the first touch of every chunk
        gathered = measure(chosen, lambda: random.integers(0, ROWS, GATHERED))
        sequential = measure(chosen, lambda: slice(None))
    sections = {
        f"{GATHERED} random rows of [{ROWS}, {FEATURES}] bf16": ratio_table(
            gathered, against="np.memmap", amount=GATHERED / 1e6, unit="million rows/s"
        ),
        "All rows in order": ratio_table(sequential, against="np.memmap", amount=ROWS * FEATURES * 2 / 1e9, unit="GB/s"),
    }
    publish("read", "Reading", sections)


if __name__ == "__main__":
    main()
