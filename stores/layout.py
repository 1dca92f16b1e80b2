"""Chunk and shard shapes: pure arithmetic.

A chunk is the smallest verified block, a shard the file that holds many of them. Both count rows of one array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import BudgetError, DamagedError

CHUNK_BYTES = 512 << 10
CHUNK_ROWS = 4096
SPLIT_ROW_BYTES = 8 << 20
SHARD_BYTES = 128 << 20
SMALL_ROW_BYTES = 64
SMALL_SHARD_BYTES = 4 << 20
DEFAULT_BUDGET = 512 << 20
MOST_BYTES = 1 << 62  # of a shard
MOST_CHUNKS = 1 << 20  # of a shard: its index has 16 bytes for each


@dataclass(frozen=True)
class Grid:
    """Chunk and shard shape of one array, rows first."""

    chunk: tuple[int, ...]
    shard: tuple[int, ...]


NO_GRID = Grid((), ())


def check_grid(grid: Grid, shape: tuple[int, ...], itemsize: int, what: str) -> None:
    """DamagedError unless this may be the grid of rows of `shape`: whole shards of whole chunks, which cut no axis but rows' first.

    Chunks of rows that are cut hold one row.
    """
    chunk, shard = grid.chunk, grid.shard
    if len(chunk) != len(shape) + 1 or len(shard) != len(chunk):
        raise DamagedError(
            f"{what} has chunks of {list(chunk)[:17]} and shards of {list(shard)[:17]} for rows of shape {list(shape)}"
        )
    split = bool(shape) and chunk[1] != shape[0]
    right = shard[0] % chunk[0] == 0 and chunk[2:] == shard[2:] == shape[1:]
    if shape:
        right = right and chunk[1] <= shape[0] and shard[1] == _whole(shape[0], chunk[1]) and (chunk[0] == 1 or not split)
    slots = math.prod(shard) // math.prod(chunk)
    if not right or slots > MOST_CHUNKS or math.prod(shard) * itemsize > MOST_BYTES:
        raise DamagedError(
            f"{what} has chunks of {list(chunk)} and shards of {list(shard)}, which do not fit rows of {list(shape)}"
        )


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
