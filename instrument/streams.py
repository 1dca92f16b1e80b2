"""Streams of tokens in a batch: how many positions each input row has, and which of them are kept.

Pads never reach the disk. A stream knows which positions of its padded [rows, width] grid belong to which example; packed rows,
where one input row holds several examples one after another, are the same thing with more examples than rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from .errors import BatchError

MAIN = "token"


def table_of(stream: str) -> str:
    """The table of a stream: `token` for the main one, else `token.<stream>`."""
    return MAIN if stream == MAIN else f"{MAIN}.{stream}"


@dataclass
class Stream:
    """One stream of one batch.

    Args:
        rows: input rows B.
        width: positions T of each row, pads included.
        mask: [B, T] bool, True where a position is kept; None if all are.
        segments: [B, T] integers, which example of its row a position belongs to, for packed rows; None for one example per row.
        tokens: [B, T] input ids, where known.
        positions: [B, T] position ids, where given.
    """

    rows: int
    width: int
    mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    _indices: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> list[int]:
        """Kept positions of each example."""
        if self.segments is not None:
            return _runs(self.segments, self.mask)
        if self.mask is None:
            return [self.width] * self.rows
        counted: list[int] = self.mask.sum(1).tolist()
        return counted

    @cached_property
    def kept(self) -> int:
        """Kept positions in all."""
        return sum(self.lengths)

    def pack(self, grid: torch.Tensor) -> torch.Tensor:
        """The kept rows [kept, ...] of a [B, T, ...] tensor, as a copy."""
        flat = grid.reshape(self.rows * self.width, *grid.shape[2:])
        if self.kept == self.rows * self.width:
            return flat.clone() if flat.data_ptr() == grid.data_ptr() else flat
        return flat.index_select(0, self._index(grid.device))

    def _index(self, device: torch.device) -> torch.Tensor:
        if device not in self._indices:
            mask = self.mask
            if mask is None:
                raise BatchError("a stream without a mask keeps every position")
            self._indices[device] = mask.reshape(-1).nonzero().squeeze(1).to(device)
        return self._indices[device]


def keep_mask(mask: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """A [B, T] mask, 1 or True where a position counts, as bool; BatchError for any other shape."""
    if tuple(mask.shape) != (rows, width):
        raise BatchError(
            f"the mask has the shape {list(mask.shape)}, but the batch has {rows} rows of {width} positions; give a mask of that "
            "shape to batch(mask=...), 1 where a position is a real token"
        )
    return mask.detach() != 0


def segments_of(positions: torch.Tensor) -> torch.Tensor:
    """Which document of its row a position belongs to, in packed rows: position ids start anew with each; [B, T]."""
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    return starts.cumsum(1) - 1


def _runs(segments: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    """Lengths of the runs of equal segments, row after row, over kept positions."""
    row = torch.arange(len(segments), device=segments.device)[:, None].expand_as(segments)
    pairs = torch.stack([row, segments], -1).reshape(-1, 2)
    kept = pairs if mask is None else pairs[mask.reshape(-1)]
    lengths: list[int] = torch.unique_consecutive(kept, dim=0, return_counts=True)[1].tolist()
    return lengths
