"""Scalars of what was recorded, for the tracker that a training has anyway. Tensors never go to a tracker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from tensortape.stores import RunWriter

from .attention.summary import summaries
from .capture import Capture
from .progress import TRAINING

PREFIX = "tensortape"
Log = Callable[[dict[str, float], int], Any]


class Metrics:
    """Statistics of each recorded site, means over the batches of a step, and what writing has taken so far.

    `tensortape/<site>/norm` (of a probe set `tensortape/<phase>/<site>/norm`) is the mean Euclidean norm of its rows, `/mean` the
    mean of its numbers and `/zeros` the share of them that are zero. Of attention recorded in whatever form, `/entropy` and `/sink`
    of its module's path are what `attention.summary.summaries` says.
    """

    def __init__(self, log: Log | None) -> None:
        self._log = log
        self._found: dict[str, list[float]] = {}

    def take(self, captures: Collection[Capture], phase: str) -> None:
        """Look at a recorded batch."""
        if self._log is None:
            return
        of = PREFIX if phase == TRAINING else f"{PREFIX}/{phase}"
        for taken in captures:
            if taken.rows.is_floating_point() and taken.rows.numel() and not taken.is_companion:
                self._add(f"{of}/{taken.column.partition('/')[2]}", _statistics(taken.rows))
        for site, found in summaries(captures):
            self._add(f"{of}/{site}", found)

    def send(self, step: int, writer: RunWriter) -> None:
        """Hand the means over the step's batches to the tracker, if anything was recorded."""
        if self._log is None or not self._found:
            return
        found = {name: sum(values) / len(values) for name, values in self._found.items()}
        self._found = {}
        self._log({**found, f"{PREFIX}/written_bytes": float(writer.appended_bytes)}, step)

    def _add(self, of: str, found: Mapping[str, float]) -> None:
        for name, value in found.items():
            self._found.setdefault(f"{of}/{name}", []).append(value)


def _statistics(rows: torch.Tensor) -> Mapping[str, float]:
    values = rows.detach().to(torch.float32).flatten(1) if rows.ndim > 1 else rows.detach().to(torch.float32)[:, None]
    found = torch.stack([torch.linalg.vector_norm(values, dim=1).mean(), values.mean(), (values == 0).float().mean()])
    return dict(zip(("norm", "mean", "zeros"), found.tolist(), strict=True))
