"""A row buffer hands out full shards, and keeps nothing that its caller may change."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortape.stores.buffers import RowBuffer
from tensortape.stores.layout import Grid
from tensortape.stores.schema import ArraySchema

SHARD = 8


def buffer() -> RowBuffer:
    return RowBuffer(ArraySchema("values", "token/h", "int16", (3,), Grid((4, 3), (SHARD, 3))))


def take(rows: RowBuffer, block: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Full shards, as they are at the moment when they have to be written."""
    return [(number, shard.copy()) for number, shard in rows.take(block)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=12))
def test_rows_come_out_as_full_shards_in_order(sizes):
    rows = buffer()
    every = np.arange(sum(sizes) * 3, dtype=np.int16).reshape(-1, 3)
    blocks = np.split(every, np.cumsum(sizes))[: len(sizes)]
    shards = [shard for block in blocks for shard in take(rows, block)]
    assert [number for number, _ in shards] == list(range(sum(sizes) // SHARD))
    assert all(len(block) == SHARD for _, block in shards)
    assert rows.rows == sum(sizes)
    assert (rows.shard, rows.held) == divmod(sum(sizes), SHARD)
    assert rows.held_bytes == rows.held * 6
    assert np.array_equal(np.concatenate([every[:0], *(block for _, block in shards), rows.tail()]), every)


def test_kept_rows_are_copies():
    """The caller may change what it has appended."""
    rows, block = buffer(), np.ones((11, 3), np.int16)
    take(rows, block)
    block[:] = 7
    assert rows.tail().tolist() == [[1, 1, 1]] * 3


def test_rows_that_fill_a_shard_by_themselves_pass_through_without_a_copy():
    block = np.ones((2 * SHARD + 1, 3), np.int16)
    shards = [shard for _, shard in buffer().take(block)]
    assert [np.shares_memory(shard, block) for shard in shards] == [True, True]


def test_memory_is_taken_once():
    """However many shards pass through: the process does not grow with the recording."""
    rows = buffer()
    take(rows, np.ones((5, 3), np.int16))
    first = rows.tail()
    for _ in range(5):
        take(rows, np.ones((SHARD, 3), np.int16))
    assert np.shares_memory(rows.tail(), first)
