"""Projected rows on their way to the run: coordinates, and the norms of what they leave out."""

from __future__ import annotations

from dataclasses import replace

import torch

from .capture import Capture


def split_residual(taken: Capture) -> list[Capture]:
    """Coordinates in the dtype they are stored in and residual norms in float32, each a column; any other capture as it is."""
    if taken.tap.options.project is None:
        return [taken]
    asked, computed = taken.tap.options.dtype, taken.about["computed"]
    # Coordinates may be as long as the whole row, which float16 may have no number for.
    dtype = getattr(torch, asked) if asked is not None else torch.float32 if computed == torch.float16 else computed
    about = {name: said for name, said in taken.about.items() if name != "projection"}
    return [
        replace(taken, rows=taken.rows[:, :-1].to(dtype)),
        replace(taken, rows=taken.rows[:, -1], suffix=f"{taken.suffix}|residual", about=about),
    ]
