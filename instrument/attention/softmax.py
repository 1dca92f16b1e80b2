"""Tier 4: modules that materialise their weights with a softmax."""

from __future__ import annotations

from typing import Any

import torch

from .facts import Attended


def attended(args: tuple[Any, ...], output: torch.Tensor, rows: int) -> Attended | None:
    """The weights of a call; None unless they are [B, H, Tq, Tk], or [B * H, Tq, Tk] with B input rows."""
    if not output.is_floating_point() or output.ndim not in (3, 4):
        return None
    if output.ndim == 3:
        if not rows or len(output) % rows:
            return None
        shape = (rows, len(output) // rows, *output.shape[1:])
    else:
        shape = tuple(output.shape)
    weights = output.reshape(shape)
    return Attended(
        tier="softmax",
        implementation="softmax",
        weights=weights,
        source=output,
        turn=lambda gradient: gradient.reshape(shape),
    )
