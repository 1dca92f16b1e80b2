"""What is stored of a parameter, of its gradient or of its update: all of it, or less."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

NORM, ROW_NORM, COSINE, RANDOM = "norm", "row_norm", "cosine", "random"
KINDS = (NORM, ROW_NORM, COSINE, RANDOM)
_BLOCK = 1 << 20  # numbers that are hashed at a time


def norm(values: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm; float32, a scalar."""
    found: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
    return found


def row_norm(values: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each row, over all axes but the first; float32 [rows]."""
    found: torch.Tensor = torch.linalg.vector_norm(values.reshape(len(values), -1), dim=1, dtype=torch.float32)
    return found


def random_projection(name: str, width: int, seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A projection of tensors to `width` numbers that keeps inner products on average; float32 [width].

    A count sketch: every number is added, with a random sign, to one of `width` sums (Charikar, Chen and Farach-Colton 2002), so
    that E[<Sx, Sy>] = <x, y>, with a variance of at most 2 |x|^2 |y|^2 / width (Weinberger et al. 2009, lemma 2). It depends on the
    parameter's name and the seed alone, and is drawn anew each time: nothing of the parameter's size is kept.
    """

    def project(values: torch.Tensor) -> torch.Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # which heeds 32 bits
        out = torch.zeros(width, dtype=torch.float32, device=values.device)
        flat = values.flatten()
        for block in (flat[start : start + _BLOCK] for start in range(0, len(flat), _BLOCK)):
            places = torch.randint(2 * width, (len(block),), generator=draw).to(values.device)
            signed = block.to(torch.float32) * (1 - 2 * (places % 2))
            out.index_add_(0, places // 2, signed)
        return out

    return project


class Cosine:
    """The cosine of each tensor with the one before it; NaN for the first. Keeps one tensor. float32, a scalar."""

    def __init__(self) -> None:
        self._before: torch.Tensor | None = None
        self._now: torch.Tensor | None = None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The cosine with what `keep` was last called for."""
        self._now = values.detach().to(torch.float32).flatten().clone()
        if self._before is None:
            return self._now.new_tensor(float("nan"))
        return torch.nn.functional.cosine_similarity(self._now, self._before, dim=0)

    def keep(self) -> None:
        """The step is over: what was given last is what the next one is compared with."""
        self._before = self._now
