"""P10: a run of every released format version stays readable. `python tests/test_golden.py` writes the one of this version anew."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

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
