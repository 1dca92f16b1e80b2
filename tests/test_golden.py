"""P10: a run of every released format version stays readable. `python tests/test_golden.py` writes the one of this version anew."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from strategies import small_chunks

from tensortape.stores import RunWriter, open_run
from tensortape.stores.schema import VERSION

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = (3, 0, 5)


def values(dtype: str, length: int, seed: int) -> np.ndarray:
    """Any bits, NaNs among them, in rows of three."""
    bits = np.random.default_rng([seed, length]).integers(0, 256, length * 3 * np.dtype(kind(dtype)).itemsize, np.uint8)
    return bits.view(kind(dtype)).reshape(length, 3)


def kind(dtype: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, dtype)) if hasattr(ml_dtypes, dtype) else np.dtype(dtype)


DTYPES = ("bfloat16", "float16", "float32", "int64", "uint8")


def write(path: Path) -> None:
    """Two commits, a resumed part, and an added column."""
    for session in range(2):
        with RunWriter(path, mode="resume") as writer:
            columns = {f"token/{dtype}": [values(dtype, length, session) for length in LENGTHS] for dtype in DTYPES}
            tags = [["é"] * length for length in LENGTHS]
            ids = [f"{session}-{number}" for number in range(len(LENGTHS))]
            writer.append(ids=ids, columns={**columns, "token/tag": tags, "example/y": [1, 2, -100]})
            writer.commit()
            writer.append(
                ids=[f"{session}-last"],
                columns={**{name: c[:1] for name, c in columns.items()}, "token/tag": tags[:1], "example/y": [4]},
            )
    open_run(path).add_column("example/split", ["train"] * 6 + ["test"] * 2)


SMALLER = {"lz4": ("lz4", None), "zstd": ("zstd", None), "int8": (None, "int8"), "int8-zstd": ("zstd", "int8")}


def smooth(session: int) -> np.ndarray:
    """Rows that compress, one feature far from the others, and rows that hold no numbers."""
    rows = np.arange(40 * 101, dtype=np.int64).reshape(40, 101) * (7 + session) % 23 / np.float32(8)
    rows[:, 17] += 300
    rows[3, 5], rows[3, 6], rows[9, 7] = np.nan, np.inf, -np.inf
    return rows.astype(np.float32)


def write_smaller(path: Path) -> None:
    """Compressed and quantised columns, in two parts of two commits and several shards."""
    for session in range(2):
        with small_chunks(rows=8, chunk_bytes=4096, shard_bytes=8192), RunWriter(path, mode="resume") as writer:
            for name, (compress, quantize) in SMALLER.items():
                writer.describe(f"token/{name}", compress=compress, quantize=quantize)
            for number, rows in enumerate(np.split(smooth(session), [13])):
                writer.append(ids=[f"{session}-{number}"], columns={f"token/{name}": [rows] for name in SMALLER})
                writer.commit()


@pytest.mark.parametrize("name", SMALLER)
def test_P10_compressed_and_quantised_columns_stay_readable(name: str) -> None:
    run = open_run(GOLDEN / "smaller-v1")
    assert run.verify().ok
    column, values = run[f"token/{name}"], np.concatenate([smooth(0), smooth(1)])
    if SMALLER[name][1] is None:
        assert column.rows().tobytes() == values.tobytes()
        return
    finite = np.isfinite(values)
    assert np.array_equal(column.rows()[~finite], values[~finite], equal_nan=True)
    assert np.array_equal(column.rows()[:, 17], values[:, 17])
    assert np.abs(column.rows()[finite] - values[finite]).max() <= 22 / 8 / 126 / 2 * (1 + 1e-6)
    assert column.quantization is not None
    assert 0 < column.quantization.relative_rms < 0.01


@pytest.mark.parametrize("version", [path.name for path in sorted(GOLDEN.glob("v*"))])
def test_P10_a_run_of_an_earlier_format_reads_as_it_was_written(version: str) -> None:
    run = open_run(GOLDEN / version)
    assert run.verify().ok
    assert run.ids == [f"{session}-{name}" for session in range(2) for name in ("0", "1", "2", "last")]
    for dtype in DTYPES:
        for number, length in enumerate(LENGTHS):
            for session in range(2):
                found = run[f"token/{dtype}"][session * 4 + number]
                assert found.dtype == kind(dtype)
                assert found.tobytes() == values(dtype, length, session).tobytes()
    assert run["token/tag"].rows().tolist() == ["é"] * 22
    assert run["example/y"].rows().tolist() == [1, 2, -100, 4] * 2
    assert run["example/split"][6] == "test"


def test_there_is_a_golden_run_of_this_version() -> None:
    assert (GOLDEN / f"v{VERSION}" / "zarr.json").exists()


if __name__ == "__main__":
    write(GOLDEN / f"v{VERSION}")
    write_smaller(GOLDEN / f"smaller-v{VERSION}")
