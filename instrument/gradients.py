"""Gradients on their way to the run: added up, made those of single examples, and scaled where 16 bits would lose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .capture import Capture
from .targets import Target


def added(before: Capture | None, taken: Capture, target: Target, examples: int) -> Capture:
    """A gradient, on top of what an earlier backward of the same target gave."""
    if before is not None and before.tap is not taken.tap:
        return before  # another tap, of this target or of any, takes the same
    if taken.suffix == "identity":
        return taken
    half = taken.rows.dtype == torch.float16
    rows = target.per_example(taken.rows.float() if half else taken.rows, taken.lengths, examples)
    total = rows if before is None else before.rows + rows
    return replace(taken, rows=total, about={**taken.about, "target": target.to_json(), "half": half})


def split_scale(taken: Capture) -> list[Capture]:
    """A gradient as it is stored: cast if asked, and as float16 (also where the model computed it so) with a scale per example.

    Gradients are often smaller than float16's smallest number. Each example's rows are divided by a power of two that
    brings the largest value near 1; float16 then keeps them to 11 bits, and readers multiply the scale back.
    """
    asked = taken.tap.options.dtype or ("float16" if taken.about.get("half") else None)
    if asked is None or taken.suffix == "identity":
        return [taken]
    dtype = getattr(torch, asked)
    if dtype != torch.float16:
        return [replace(taken, rows=taken.rows.to(dtype))]
    lengths = taken.lengths if taken.lengths is not None else [1] * len(taken.rows)
    scale = torch.stack([_scale(piece) for piece in torch.split(taken.rows, list(lengths))])
    rows = taken.rows.float() / _spread(scale, lengths, taken.rows)
    about = {**taken.about, "scaled": True}
    suffix = "scale" if taken.suffix is None else f"{taken.suffix}|scale"
    return [replace(taken, rows=rows.to(dtype), about=about), replace(taken, rows=scale, lengths=None, suffix=suffix, keys=None)]


def _scale(rows: torch.Tensor) -> torch.Tensor:
    """The power of two at or above the largest finite magnitude, float32; 1 for nothing but zeros."""
    largest = torch.nan_to_num(rows.float().abs(), nan=0.0, posinf=0.0).max() if rows.numel() else torch.zeros(())
    return torch.exp2(torch.ceil(torch.log2(largest))) if largest > 0 else torch.ones((), device=rows.device)


def _spread(scale: torch.Tensor, lengths: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
    spread = scale.repeat_interleave(torch.as_tensor(lengths, device=scale.device))
    return spread.to(rows.device).reshape(-1, *[1] * (rows.ndim - 1))
