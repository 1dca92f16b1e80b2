"""What several tests share: random values of every dtype, small chunks, and runs to write."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from tensortape.stores import RunWriter, layout
from tensortape.stores.geometry import Geometry
from tensortape.stores.layout import Grid

FAULTS = os.environ.get("TENSORTAPE_FAULTS", "quick")  # how thoroughly: `quick`, `long` (make faults) or `endless`


def step(quick: int) -> int:
    """Take every so many of a list of cases; all of them in a thorough run."""
    return quick if FAULTS == "quick" else 1


DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "int64", "int8", "uint8", "bool")},
}

# NaNs with payloads (quiet and signalling), both infinities, -0.0, the smallest and the largest subnormal.
SPECIAL_BITS = {
    "bfloat16": (0x7FC1, 0xFFA5, 0x7F80, 0xFF80, 0x8000, 0x0001, 0x007F),
    "float16": (0x7E01, 0xFD55, 0x7C00, 0xFC00, 0x8000, 0x0001, 0x03FF),
    "float32": (0x7FC00001, 0xFFA55555, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001, 0x007FFFFF),
    "float64": (0x7FF8 << 48 | 1, 0xFFF5 << 48 | 5, 0x7FF0 << 48, 0xFFF0 << 48, 1 << 63, 1, (1 << 52) - 1),
}


def random_values(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Values of any bit pattern, a quarter of them special where the dtype has special ones."""
    kind = DTYPES[dtype]
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    values = np.frombuffer(rng.bytes(math.prod(shape) * kind.itemsize), f"<u{kind.itemsize}").reshape(shape).copy()
    if dtype in SPECIAL_BITS:
        special = rng.choice(np.array(SPECIAL_BITS[dtype], values.dtype), shape)
        values = np.where(rng.random(shape) < 0.25, special, values)
    return values.view(kind)


def bits(values: Any) -> np.ndarray:
    """The bits of an array, as unsigned integers of the same width."""
    array = np.ascontiguousarray(values)
    return array.view(f"u{array.dtype.itemsize}")


def same_bits(found: Any, expected: Any) -> bool:
    """Whether two arrays have one shape, one width and the same bits."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape or found.dtype.itemsize != expected.dtype.itemsize:
        return False
    return np.array_equal(bits(found), bits(expected))


@contextmanager
def small_chunks(rows: int = 8, chunk_bytes: int = 256, shard_bytes: int = 1024) -> Iterator[None]:
    """Chunks of a few rows, so that a kilobyte fills a shard. Grids are part of a run: reading needs nothing of this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_ROWS", rows)
        patch.setattr(layout, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(layout, "SHARD_BYTES", shard_bytes)
        yield


@dataclass(frozen=True)
class Feature:
    """A column to be drawn: its name, dtype and feature shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def ragged(self) -> bool:
        """Whether an example owns any number of rows."""
        return not self.name.startswith("example/")

    def values(self, rng: np.random.Generator, lengths: Sequence[int]) -> Any:
        """What `append` takes: one array per example, or one array over the examples."""
        if self.ragged:
            return [random_values(rng, self.dtype, (length, *self.shape)) for length in lengths]
        return random_values(rng, self.dtype, (len(lengths), *self.shape))


feature_shapes = st.one_of(st.lists(st.integers(1, 7), max_size=2), st.lists(st.integers(1, 3), min_size=3, max_size=3)).map(tuple)


def features(tables: Sequence[str] = ("token", "token.image", "example")) -> st.SearchStrategy[list[Feature]]:
    """One to six columns of any dtype and feature shape."""
    parts = st.tuples(st.sampled_from(tables), st.sampled_from(sorted(DTYPES)), feature_shapes)
    return st.lists(parts, min_size=1, max_size=6).map(
        lambda drawn: [Feature(f"{table}/c{number}", dtype, shape) for number, (table, dtype, shape) in enumerate(drawn)]
    )


def stored_values(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random bits of the dtype that a shard holds: bfloat16 as uint16."""
    values = random_values(np.random.default_rng(seed), dtype, shape)
    return bits(values) if dtype == "bfloat16" else values


@st.composite
def whole_rows(draw):
    """Rows of a shard whose chunks hold whole rows: geometry and at least one row."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=2)))
    chunk, chunks = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4]))
    count = draw(st.integers(1, chunk * chunks))
    rows = stored_values(draw(st.sampled_from(sorted(DTYPES))), (count, *shape), draw(seeds))
    return Geometry(Grid((chunk, *shape), (chunk * chunks, *shape)), shape, rows.dtype), rows


@st.composite
def cut_rows(draw):
    """Rows that are cut along their first feature axis: one row per chunk row, the last piece padded."""
    shape = (draw(st.integers(2, 9)), *draw(st.lists(st.integers(1, 3), max_size=1)))
    width, shard_rows = draw(st.integers(1, shape[0] - 1)), draw(st.sampled_from([1, 2, 4]))
    count = draw(st.integers(1, shard_rows))
    rows = stored_values(draw(st.sampled_from(sorted(DTYPES))), (count, *shape), draw(seeds))
    whole = -(-shape[0] // width) * width
    return Geometry(Grid((1, width, *shape[1:]), (shard_rows, whole, *shape[1:])), shape, rows.dtype), rows


drawn_shards = st.one_of(whole_rows(), cut_rows())


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6)
seeds = st.integers(0, 2**32 - 1)
unicode_names = st.text(min_size=1, max_size=120)


opened: list[RunWriter] = []  # closed after each test (stores/conftest.py), while their folders are still there


def writer_at(path: Path, mode: str = "create", **options: Any) -> RunWriter:
    """A writer that does not sync: tests that are not about power losses use it."""
    writer = RunWriter(path, mode=mode, **{"durability": "rename", **options})
    opened.append(writer)
    return writer


def files_below(path: Path) -> dict[str, bytes]:
    """Every file of a folder and what it holds."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def put(path: Path, content: bytes) -> None:
    """Give a file other content, as a new file: what is mapped of the old one stays as it is."""
    other = path.with_name(f"{path.name}.other")
    other.write_bytes(content)
    other.replace(path)


def flip(path: Path, position: int, mask: int = 0x01) -> bytes:
    """Change bits of one byte of a file; the file's bytes as they were, to put back."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[position] ^= mask
    put(path, bytes(changed))
    return before


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change the document in a file."""
    document = json.loads(path.read_bytes())
    change(document)
    put(path, json.dumps(document).encode())
