"""Tier 4: modules that materialise their weights with a softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .facts import Attended


def attended(output: torch.Tensor, rows: int, widths: Sequence[int]) -> Attended | None:
    """The weights of a call; None unless they are [B, H, Tq, Tk], or [B * H, Tq, Tk] with B input rows.

    Args:
        widths: what Tq may be, where the batch's streams are known: attention modules use softmax for other things, too.
    """
    if not output.is_floating_point() or output.ndim not in (3, 4):
        return None
    if output.ndim == 3:
        if not rows or len(output) % rows:
            return None
        shape = (rows, len(output) // rows, *output.shape[1:])
    else:
        shape = tuple(output.shape)
    if widths and shape[2] not in widths:
        return None
    weights = output.reshape(shape)
    return Attended(
        tier="softmax",
        implementation="softmax",
        weights=weights,
        source=output,
        turn=lambda gradient: gradient.reshape(shape),
    )
