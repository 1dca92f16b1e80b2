"""Writing: RunWriter beside raw files, np.save, safetensors, h5py, zarr-python and TensorStore; compressed, beside the last two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import zarr
from activations import FEATURES, like_activations
from report import clear, interleaved, needed, publish, ram_folder, ratio_table, sizes
from safetensors.numpy import save_file
from zarr.codecs import Crc32cCodec

from tensortape.stores import RunWriter
from tensortape.stores.codecs import zarr_codecs

EXAMPLE, CHUNK = 512, 256  # rows

h5py, tensorstore = needed("h5py"), needed("tensorstore")


@dataclass(frozen=True)
class Load:
    """What is written: `appends` times the same rows [rows, FEATURES] of each column, the bits of bfloat16."""

    columns: list[np.ndarray[Any, np.dtype[np.uint16]]]
    appends: int
    codec: str = "none"

    @property
    def rows(self) -> int:
        """Rows of a column per append."""
        return len(self.columns[0])

    @property
    def nbytes(self) -> int:
        """Bytes of everything, not compressed."""
        return self.appends * sum(rows.nbytes for rows in self.columns)


Write = Callable[[Path, Load], None]


def raw_files(folder: Path, load: Load) -> None:
    """One file per column, one write per append."""
    files = [(folder / f"{number}.raw").open("wb", buffering=0) for number in range(len(load.columns))]
    for _ in range(load.appends):
        for file, rows in zip(files, load.columns, strict=True):
            file.write(rows.data)
    for file in files:
        file.close()


def run_writer(folder: Path, load: Load) -> None:
    """Default settings but for fsync, which the others do not do either."""
    with RunWriter(folder / "run.zarr", durability="rename", compress=load.codec) as writer:
        lengths = [EXAMPLE] * (load.rows // EXAMPLE)
        columns = {f"token/h{number}": rows.view(ml_dtypes.bfloat16) for number, rows in enumerate(load.columns)}
        for append in range(load.appends):
            ids = [f"{append}-{number}" for number in range(len(lengths))]
            writer.append(ids=ids, columns=columns, lengths={"token": lengths})


def np_save(folder: Path, load: Load) -> None:
    """A file per column and append: .npy files do not grow."""
    for append in range(load.appends):
        for number, rows in enumerate(load.columns):
            np.save(folder / f"{number}-{append}.npy", rows)


def safetensors(folder: Path, load: Load) -> None:
    """A file of all columns per append: these do not grow either."""
    for append in range(load.appends):
        save_file({f"h{number}": rows for number, rows in enumerate(load.columns)}, folder / f"{append}.safetensors")


def hdf5(folder: Path, load: Load) -> None:
    """Datasets that grow, of the same chunks, without checksums."""
    with h5py.File(folder / "plain.h5", "w") as file:
        shape = {"shape": (0, FEATURES), "maxshape": (None, FEATURES), "chunks": (CHUNK, FEATURES)}
        datasets = [file.create_dataset(f"h{number}", dtype="uint16", **shape) for number in range(len(load.columns))]
        for append in range(load.appends):
            for dataset, rows in zip(datasets, load.columns, strict=True):
                dataset.resize((append + 1) * load.rows, axis=0)
                dataset[append * load.rows :] = rows


def zarr_python(folder: Path, load: Load) -> None:
    """The same chunks, shards, codecs and checksums; every append writes whole shards."""
    group = zarr.open_group(folder / "plain.zarr", mode="w")
    arrays = [
        group.create_array(
            f"h{number}",
            shape=(load.appends * load.rows, FEATURES),
            chunks=(CHUNK, FEATURES),
            shards=(load.rows, FEATURES),
            dtype="uint16",
            filters=None,
            compressors=[*zarr_codecs(load.codec, 2), Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
        for number in range(len(load.columns))
    ]
    for append in range(load.appends):
        for array, rows in zip(arrays, load.columns, strict=True):
            array[append * load.rows : (append + 1) * load.rows] = rows


def tensor_store(folder: Path, load: Load) -> None:
    """The same again, the columns of an append all at once."""
    stores = [tensorstore.open(_tensorstore_spec(folder / f"{number}", load), create=True) for number in range(len(load.columns))]
    opened = [store.result() for store in stores]
    for append in range(load.appends):
        place = slice(append * load.rows, (append + 1) * load.rows)
        for written in [store[place].write(rows) for store, rows in zip(opened, load.columns, strict=True)]:
            written.result()


def _tensorstore_spec(path: Path, load: Load) -> dict[str, Any]:
    plain, checked = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    inner = [plain, *zarr_codecs(load.codec, 2), checked]
    shard = {"chunk_shape": [CHUNK, FEATURES], "codecs": inner, "index_codecs": [plain, checked]}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path), "file_io_sync": False},
        "metadata": {
            "shape": [load.appends * load.rows, FEATURES],
            "data_type": "uint16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [load.rows, FEATURES]}},
            "codecs": [{"name": "sharding_indexed", "configuration": shard}],
        },
    }


GROWING: dict[str, Write] = {"RunWriter": run_writer, "zarr-python": zarr_python, "TensorStore": tensor_store}
ALL: dict[str, Write] = {"raw files": raw_files, **GROWING, "np.save": np_save, "safetensors": safetensors, "h5py": hdf5}


def table(competitors: Mapping[str, Write], load: Load, against: list[str], repetitions: int) -> list[str]:
    """One load's rows."""
    with ram_folder() as folder:
        runs = {name: partial(write, folder, load) for name, write in competitors.items()}
        times = interleaved(runs, repetitions, clear=partial(clear, folder))
    return ratio_table(times, against=against, amount=load.nbytes / 1e9, unit="GB/s")


def stored(competitors: Mapping[str, Write], load: Load) -> str:
    """A sentence on what is on disk."""
    shares = []
    for name, write in competitors.items():
        with ram_folder() as folder:
            write(folder, load)
            found = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shares.append(f"{name} {100 * found / load.nbytes:.1f} %")
    return f"On disk, of the bytes that were given: {', '.join(shares)}."


def main() -> None:
    """Measure and publish."""
    size = sizes(columns=12, rows=8192, appends=8, compressed_appends=1, repetitions=7)
    random = np.random.default_rng(0)
    load = Load([like_activations(size.rows, random) for _ in range(size.columns)], size.appends)
    sections = {heading(load): table(ALL, load, ["raw files", "zarr-python"], size.repetitions)}
    for codec in ("lz4", "zstd"):
        small = replace(load, appends=size.compressed_appends, codec=codec)
        rows = table({"raw files": raw_files, **GROWING}, small, ["zarr-python", "TensorStore"], size.repetitions)
        sections[heading(small)] = [*rows, "", stored(GROWING, replace(small, appends=1))]
    publish("write", "Writing", sections, ("tensorstore", "h5py", "safetensors", "numcodecs"))


def heading(load: Load) -> str:
    """What a table is of."""
    what = f"{len(load.columns)} columns of [{load.rows}, {FEATURES}] bf16, appends: {load.appends}, {load.nbytes / 1e9:.2f} GB"
    return what if load.codec == "none" else f"{what}, {load.codec}"


if __name__ == "__main__":
    main()
