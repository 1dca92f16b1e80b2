"""Reductions at the time of recording: one row per example instead of one per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

REDUCTIONS = ("mean", "max", "first", "last")


def reduced(rows: torch.Tensor, lengths: Sequence[int], kind: str) -> torch.Tensor:
    """One row per example, [examples, *feature], of packed rows [sum lengths, *feature], in their dtype.

    Means of 16-bit floats are taken in float32. An example without rows gives NaN, or -1 for integers.
    """
    counts = torch.as_tensor(lengths, device=rows.device, dtype=torch.long)
    found = _mean(rows, counts) if kind == "mean" else _max(rows, counts) if kind == "max" else _picked(rows, counts, kind)
    found[counts == 0] = torch.nan if rows.is_floating_point() else -1
    return found


def at_positions(rows: torch.Tensor, lengths: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """Some tokens of each example, [examples, chosen, *feature]; NaN, or -1 for integers, where an example has no such token."""
    counts = torch.as_tensor(lengths, device=rows.device, dtype=torch.long)[:, None]
    wanted = torch.as_tensor(positions, device=rows.device, dtype=torch.long)[None, :]
    place = torch.where(wanted < 0, wanted + counts, wanted)
    there = (place >= 0) & (place < counts)
    found = rows.new_full((len(lengths), len(positions), *rows.shape[1:]), torch.nan if rows.is_floating_point() else -1)
    found[there] = rows[(counts.cumsum(0) - counts + place)[there]]
    return found


def _mean(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    wide = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    sums = wide.new_zeros(len(counts), *rows.shape[1:]).index_add_(0, _owners(counts), wide)
    return (sums / counts.clamp(min=1).reshape(-1, *[1] * (rows.ndim - 1))).to(rows.dtype)


def _max(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    owners = _owners(counts).reshape(-1, *[1] * (rows.ndim - 1)).expand_as(rows)
    return rows.new_zeros(len(counts), *rows.shape[1:]).scatter_reduce_(0, owners, rows, "amax", include_self=False)


def _owners(counts: torch.Tensor) -> torch.Tensor:
    """The example of every row."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _picked(rows: torch.Tensor, counts: torch.Tensor, kind: str) -> torch.Tensor:
    ends = counts.cumsum(0)
    found = rows.new_zeros(len(counts), *rows.shape[1:])
    some = counts > 0
    found[some] = rows[(ends - counts if kind == "first" else ends - 1)[some]]
    return found
