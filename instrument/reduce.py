"""Reductions at the time of recording: one row per example instead of one per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

REDUCTIONS = ("mean", "max", "first", "last")


def reduced(rows: torch.Tensor, lengths: Sequence[int], kind: str) -> torch.Tensor:
    """One row per example, [examples, *feature], of packed rows [sum lengths, *feature]; mean and max are taken in float32.

    An example without rows gives NaN.
    """
    counts = torch.as_tensor(lengths, device=rows.device)
    if kind in ("first", "last"):
        return _picked(rows, counts, kind)
    flat = rows.reshape(len(rows), -1).float()
    # segment_reduce gives 0 (mean) or -inf (max) for an empty segment unless told otherwise
    found = torch.segment_reduce(flat, kind, lengths=counts, initial=None, unsafe=True)
    found[counts == 0] = torch.nan
    return found.reshape(len(counts), *rows.shape[1:]).to(rows.dtype)


def _picked(rows: torch.Tensor, counts: torch.Tensor, kind: str) -> torch.Tensor:
    ends = counts.cumsum(0)
    at = (ends - counts if kind == "first" else ends - 1).clamp(0, max(len(rows) - 1, 0))
    found = rows[at].clone()
    found[counts == 0] = torch.nan
    return found
