"""Chunk and shard shapes follow the rule of the design; the budget is hard."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import writer_at

from tensortape.stores import layout, open_run
from tensortape.stores.errors import BudgetError

KIB, MIB = 1 << 10, 1 << 20


def largest_power_of_two_up_to(limit: float) -> int:
    power = 1
    while 2 * power <= limit:
        power *= 2
    return power


def expected_chunk_rows(row_bytes: int) -> int:
    """2^floor(log2(clamp(512 KiB / row bytes, 1, 4096))), by counting up."""
    return largest_power_of_two_up_to(min(max(512 * KIB / row_bytes, 1), 4096))


def expected_shard_rows(chunk_rows: int, row_bytes: int, shard_bytes: int) -> int:
    """A power of two times the chunk with at most B bytes, and at most 4 MiB for rows under 64 bytes; at least one chunk."""
    limit = min(shard_bytes, 4 * MIB) if row_bytes < 64 else shard_bytes
    return chunk_rows * largest_power_of_two_up_to(limit / (chunk_rows * row_bytes))


shapes = st.lists(st.integers(1, 300), max_size=3).map(tuple)
itemsizes = st.sampled_from([1, 2, 4, 8])


@settings(deadline=None, max_examples=120)
@given(shapes, itemsizes, st.integers(0, 256 * MIB))
def test_grids_follow_the_rule(shape, itemsize, shard_bytes):
    row_bytes = math.prod(shape) * itemsize
    assume(row_bytes <= 8 * MIB)
    grid = layout.plan(shape, itemsize, shard_bytes)
    rows = expected_chunk_rows(row_bytes)
    assert grid.chunk == (rows, *shape)
    assert grid.shard == (expected_shard_rows(rows, row_bytes, shard_bytes), *shape)


@pytest.mark.parametrize(
    ("shape", "itemsize", "chunk", "shard"),
    [
        ((), 1, 4096, 4 * MIB),
        ((), 8, 4096, 512 * KIB),
        ((63,), 1, 4096, 16 * 4096),  # rows under 64 bytes: 4 MiB
        ((64,), 1, 4096, 128 * MIB // 64),  # rows of 64 bytes: 128 MiB
        ((768,), 2, 256, 65536),
        ((4096,), 2, 64, 16384),
        ((128 * KIB + 1,), 4, 1, 128),  # just over 512 KiB
        ((2 * MIB,), 4, 1, 16),  # exactly 8 MiB: not cut
    ],
)
def test_grids_of_common_rows(shape, itemsize, chunk, shard):
    assert layout.plan(shape, itemsize, 128 * MIB) == layout.Grid((chunk, *shape), (shard, *shape))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 4 * MIB), itemsizes)
def test_rows_over_8_mib_are_cut_along_their_first_feature_axis(first, more, itemsize):
    """Pieces hold as many slices as fit into 8 MiB, at least one; a shard is padded to whole pieces and holds whole rows."""
    rest = 8 * MIB // (first * itemsize) + more
    row_bytes = first * rest * itemsize
    assert row_bytes > 8 * MIB
    grid = layout.plan((first, rest), itemsize, 128 * MIB)
    width = max(1, 8 * MIB // (rest * itemsize))
    assert grid.chunk == (1, width, rest)
    assert grid.shard[1:] == (math.ceil(first / width) * width, rest)
    assert grid.shard[0] == expected_shard_rows(1, row_bytes, 128 * MIB)


def buffers(arrays: list[tuple[tuple[int, ...], int]], share: int) -> int:
    return sum(math.prod(layout.plan(shape, itemsize, share).shard) * itemsize for shape, itemsize in arrays)


@pytest.mark.parametrize("wide", [1, 3, 40])
@pytest.mark.parametrize("budget", [100 * MIB, 1 << 30, 1 << 50])
def test_shards_are_as_large_as_half_the_budget_allows_and_at_most_128_mib(budget, wide):
    arrays = [((), 8)] * 7 + [((768,), 2)] * wide
    share = layout.shard_bytes_for(budget, arrays)
    assert buffers(arrays, share) <= budget // 2
    assert share == 128 * MIB or buffers(arrays, 2 * share) > budget // 2


def columns_of(sizes: dict[str, int]) -> dict[str, list[np.ndarray]]:
    return {f"token/{name}": [np.ones((1, size), np.float32)] for name, size in sizes.items()}


def number_needed(error: BudgetError) -> int:
    return int(re.search(r"at least (\d+)", str(error))[1])


def refused(path, budget: int, sizes: dict[str, int]) -> BudgetError:
    with writer_at(path, memory_budget=budget) as writer, pytest.raises(BudgetError) as caught:
        writer.append(ids=["a"], columns=columns_of(sizes))
    return caught.value


def test_a_budget_that_cannot_hold_one_chunk_each_is_refused_with_the_number_needed(tmp_path):
    error = refused(tmp_path / "run.zarr", 100_000, {"h": 5000})
    assert number_needed(error) >= 2 * 16 * 20_000  # twice a chunk of 16 rows of 20 kB, and a little for the example table
    assert "100000 bytes" in str(error)
    assert "memory_budget=" in str(error)


@pytest.mark.parametrize("sizes", [{"h": 5000}, {f"h{number}": 7 * number for number in range(1, 9)}])
@pytest.mark.parametrize("budget", [0, 1_500_000])
def test_the_number_that_a_refusal_names_is_enough(tmp_path, sizes, budget):
    """Whoever does what the message says is not refused again."""
    try:
        with writer_at(tmp_path / "first.zarr", memory_budget=budget) as writer:
            writer.append(ids=["a"], columns=columns_of(sizes))
    except BudgetError as error:
        budget = number_needed(error)
    with writer_at(tmp_path / "second.zarr", memory_budget=budget) as writer:
        writer.append(ids=["a"], columns=columns_of(sizes))
    assert len(open_run(tmp_path / "second.zarr")) == 1


@pytest.mark.parametrize("budget", [360_448, 700_000, 1_000_000])
def test_a_budget_that_holds_one_chunk_of_every_array_twice_is_not_refused(tmp_path, budget):
    """16-bit scalars with text ids: chunks of 8 + 3 * 32 + 2 * 4 + 2 * 32 KiB; twice that, 352 KiB, is all that is needed."""
    with writer_at(tmp_path / "run.zarr", memory_budget=budget) as writer:
        writer.append(ids=["a"], columns={"token/h": [np.ones(3, np.float16)]})
    assert len(open_run(tmp_path / "run.zarr")) == 1


def test_after_a_refused_budget_a_larger_one_records(tmp_path):
    """The refusal leaves nothing in the way: the same path can be created with more."""
    error = refused(tmp_path / "run.zarr", 100_000, {"h": 5000})
    assert number_needed(error) < layout.DEFAULT_BUDGET
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=["a"], columns=columns_of({"h": 5000}))
    assert open_run(tmp_path / "run.zarr").ids == ["a"]


def test_after_a_refused_budget_the_writer_still_takes_what_fits(tmp_path):
    with writer_at(tmp_path / "run.zarr", memory_budget=2 * MIB) as writer:
        with pytest.raises(BudgetError):
            writer.append(ids=["a"], columns=columns_of({f"h{n}": 5000 for n in range(9)}))
        writer.append(ids=["a"], columns={"token/h": [np.ones(3, np.float16)]})
    assert open_run(tmp_path / "run.zarr").ids == ["a"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(shapes, itemsizes), min_size=1, max_size=20), st.integers(0, 1 << 32))
def test_planned_shards_fit_in_half_the_budget_or_are_one_chunk(columns, budget):
    """All buffers together fill at most half of the budget; it is refused only if one chunk of each does not fit."""
    smallest = sum(math.prod(layout.plan(shape, itemsize, 0).shard) * itemsize for shape, itemsize in columns)
    if 2 * smallest > budget:
        with pytest.raises(BudgetError):
            layout.shard_bytes_for(budget, columns)
        return
    share = layout.shard_bytes_for(budget, columns)
    assert 2 * sum(math.prod(layout.plan(shape, itemsize, share).shard) * itemsize for shape, itemsize in columns) <= budget


def test_an_append_that_is_larger_than_half_the_budget_is_refused_with_the_number_needed(tmp_path):
    """Nothing is written, and a writer with that number takes it; in parts it fits as it is."""
    rows = np.ones((150_000, 2), np.float32)
    with writer_at(tmp_path / "run.zarr", memory_budget=1 << 20) as writer:
        with pytest.raises(BudgetError, match="appended at once") as caught:
            writer.append(ids=["a"], columns={"token/h": [rows]})
        assert not (tmp_path / "run.zarr").exists()
        for number, part in enumerate(np.split(rows, 3)):
            writer.append(ids=[f"{number}"], columns={"token/h": [part]})
    assert len(open_run(tmp_path / "run.zarr")["token/h"]) == 150_000
    with writer_at(tmp_path / "second.zarr", memory_budget=number_needed(caught.value)) as writer:
        writer.append(ids=["a"], columns={"token/h": [rows]})
    assert len(open_run(tmp_path / "second.zarr")["token/h"]) == 150_000
