"""Chunk and shard shapes: pure arithmetic.

A chunk is the smallest verified block, a shard the file that holds many of them. Both count rows of one array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import BudgetError

CHUNK_BYTES = 512 << 10
CHUNK_ROWS = 4096
SPLIT_ROW_BYTES = 8 << 20
SHARD_BYTES = 128 << 20
SMALL_ROW_BYTES = 64
SMALL_SHARD_BYTES = 4 << 20
DEFAULT_BUDGET = 512 << 20


@dataclass(frozen=True)
class Grid:
    """Chunk and shard shape of one array, rows first."""

    chunk: tuple[int, ...]
    shard: tuple[int, ...]


def plan(shape: tuple[int, ...], itemsize: int, shard_bytes: int) -> Grid:
    """The grid of an array whose rows have `shape` and whose shards may take `shard_bytes`."""
    row_bytes = math.prod(shape) * itemsize
    chunk = (chunk_rows(row_bytes), *chunk_features(shape, row_bytes))
    limit = min(shard_bytes, SMALL_SHARD_BYTES) if row_bytes < SMALL_ROW_BYTES else shard_bytes
    chunks = _power_of_two(limit // (chunk[0] * row_bytes))
    return Grid(chunk, (chunk[0] * chunks, *map(_whole, shape, chunk[1:])))


def chunk_rows(row_bytes: int) -> int:
    """Rows per chunk: a power of two, about half a MiB."""
    return _power_of_two(min(CHUNK_BYTES // row_bytes, CHUNK_ROWS))


def chunk_features(shape: tuple[int, ...], row_bytes: int) -> tuple[int, ...]:
    """Feature shape of a chunk: whole rows, except that a row over 8 MiB is cut along its first feature axis."""
    if row_bytes <= SPLIT_ROW_BYTES:
        return shape
    return (max(1, SPLIT_ROW_BYTES // (row_bytes // shape[0])), *shape[1:])


def shard_bytes_for(budget: int, arrays: Sequence[tuple[tuple[int, ...], int]], appended: int = 0) -> int:
    """Bytes one shard may take so that the buffers of all arrays, (feature shape, itemsize) each, fill at most half of the budget.

    Raises:
        BudgetError: not even one chunk of each fits, or the bytes `appended` at once do not; names the budget that is needed.
    """
    share = SHARD_BYTES
    while share and 2 * _buffers(arrays, share) > budget:
        share //= 2
    check(budget, _buffers(arrays, share), appended)
    return share


def least_budget(arrays: Sequence[tuple[tuple[int, ...], int]], appended: int) -> int:
    """The smallest budget, in bytes, with which arrays and what is `appended` at once are not refused."""
    return 2 * max(_buffers(arrays, 0), appended)


def check(budget: int, buffers: int, appended: int) -> None:
    """BudgetError unless half of the budget holds the buffers and half of it what is appended at once."""
    needed = 2 * max(buffers, appended)
    if needed > budget:
        raise BudgetError(
            f"recording needs a memory budget of at least {needed} bytes ({needed / 2**20:.1f} MiB): half for buffers, at least "
            f"{buffers} bytes here, and half for {appended} bytes appended at once; the budget is {budget} bytes. Raise "
            "memory_budget=, record fewer sites or use smaller batches"
        )


def _buffers(arrays: Sequence[tuple[tuple[int, ...], int]], share: int) -> int:
    return sum(math.prod(plan(shape, itemsize, share).shard) * itemsize for shape, itemsize in arrays)


def _power_of_two(limit: int) -> int:
    return 1 << max(limit, 1).bit_length() - 1


def _whole(size: int, chunk: int) -> int:
    return -(-size // chunk) * chunk
