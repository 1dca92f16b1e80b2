"""Writing: RunWriter beside raw files and zarr-python."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from report import interleaved, publish, ram_folder, ratio_table
from zarr.codecs import Crc32cCodec

from tensortape.stores import RunWriter

COLUMNS, APPENDS, ROWS, FEATURES = 12, 8, 8192, 768
LENGTHS = [512] * (ROWS // 512)
Write = Callable[[Path, list[np.ndarray]], None]


def raw_files(folder: Path, data: list[np.ndarray]) -> None:
    """One file per column, one write per append."""
    files = [(folder / f"{number}.raw").open("wb", buffering=0) for number in range(COLUMNS)]
    for _ in range(APPENDS):
        for file, rows in zip(files, data, strict=True):
            file.write(rows.data)
    for file in files:
        file.close()


def run_writer(folder: Path, data: list[np.ndarray]) -> None:
    """Default settings but for fsync, which the others do not do either."""
    with RunWriter(folder / "run.zarr", durability="rename") as writer:
        for append in range(APPENDS):
            ids = [f"{append}-{number}" for number in range(len(LENGTHS))]
            columns = {f"token/h{number}": rows for number, rows in enumerate(data)}
            writer.append(ids=ids, columns=columns, lengths={"token": LENGTHS})


def zarr_python(folder: Path, data: list[np.ndarray]) -> None:
    """The same chunks, shards and checksums; every append writes whole shards."""
    group = zarr.open_group(folder / "plain.zarr", mode="w")
    arrays = [
        group.create_array(
            f"h{number}",
            shape=(APPENDS * ROWS, FEATURES),
            chunks=(256, FEATURES),
            shards=(ROWS, FEATURES),
            dtype="float16",
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
        for number in range(COLUMNS)
    ]
    for append in range(APPENDS):
        for array, rows in zip(arrays, data, strict=True):
            array[append * ROWS : (append + 1) * ROWS] = rows


def _clear(folder: Path) -> None:
    """Give the pages back that the next one is going to fill."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    """Measure and publish."""
    random = np.random.default_rng(0)
    data = [random.normal(size=(ROWS, FEATURES)).astype(np.float16) for _ in range(COLUMNS)]
    gigabytes = APPENDS * sum(rows.nbytes for rows in data) / 1e9
    competitors = {"raw files": raw_files, "RunWriter": run_writer, "zarr-python": zarr_python}
    with ram_folder() as folder:
        runs = {name: partial(write, folder, data) for name, write in competitors.items()}
        times = interleaved(runs, repetitions=7, clear=partial(_clear, folder))
    table = ratio_table(times, against="raw files", amount=gigabytes, unit="GB/s")
    publish("write", "Writing", {f"{COLUMNS} columns of [{ROWS}, {FEATURES}] fp16, {APPENDS} appends, {gigabytes:.2f} GB": table})


if __name__ == "__main__":
    main()
