"""What is differentiated, and how gradients of it become those of single examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .errors import BatchError

Reduction = Literal["sum", "mean"]
Targets = Mapping[str, Callable[[Any, Any], torch.Tensor]]


@dataclass(frozen=True)
class Target:
    """A scalar that is differentiated.

    Args:
        name: gradients go to columns `...@<name>`.
        reduction: how the scalar joins its examples: `sum`, or `mean` (each gradient is then multiplied with the number of
            examples); None where nobody has said.
        factor: what each example's gradient is multiplied with besides: a number, or one per example.
    """

    name: str = "loss"
    reduction: Reduction | None = None
    factor: float | Sequence[float] | torch.Tensor = 1.0

    def __post_init__(self) -> None:
        if not self.name or any(char in self.name for char in "@|/#"):
            raise ValueError(f"a target's name is text without any of @ | / #; got {self.name!r}")
        if self.reduction not in (None, "sum", "mean"):
            raise ValueError(f"reduction is 'sum', 'mean' or None, not {self.reduction!r}")

    def per_example(self, rows: torch.Tensor, lengths: Sequence[int] | None, examples: int) -> torch.Tensor:
        """Gradients [rows, *feature] of the scalar as those of each example's own part of it."""
        factor = torch.as_tensor(self.factor, dtype=torch.float64)
        if factor.ndim and factor.shape != (examples,):
            raise BatchError(f"factor= is one number, or one per example, {examples} in all; got the shape {list(factor.shape)}")
        factor = factor * (examples if self.reduction == "mean" else 1)
        if not factor.ndim:
            return rows if factor == 1 else rows * float(factor)
        counts = torch.as_tensor([1] * examples if lengths is None else lengths)
        spread = factor.repeat_interleave(counts).to(rows.device, rows.dtype)
        return rows * spread.reshape(-1, *[1] * (rows.ndim - 1))

    def to_json(self) -> dict[str, Any]:
        """What the run says of it."""
        return {"name": self.name, "reduction": self.reduction}
