"""Streams of tokens in a batch: how many positions each input row has, and which of them are kept.

Pads never reach the disk. A stream knows which positions of its padded [rows, width] grid belong to which example; packed rows,
where one input row holds several examples one after another, are the same thing with more examples than rows.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        group: input rows of each example, where one example is cut into several windows.
    """

    rows: int
    width: int
    mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    group: int = 1
    _indices: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> list[int]:
        """Kept positions of each example."""
        if self.segments is not None:
            return _runs(self.segments, self.mask)
        if self.mask is None:
            return [self.width * self.group] * (self.rows // self.group)
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

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each kept token lies in the flattened grid: row * width + position; int64 [kept]."""
        if self.mask is None:
            return torch.arange(self.rows * self.width)
        return self.mask.reshape(-1).nonzero().squeeze(1)

    @cached_property
    def kept_before(self) -> torch.Tensor:
        """Kept positions of a row before each of its positions, and in all of it; int64 [B, T + 1] on the host."""
        mask = torch.ones(self.rows, self.width, dtype=torch.long) if self.mask is None else self.mask.cpu().long()
        return torch.nn.functional.pad(mask.cumsum(1), (1, 0))

    @cached_property
    def spans(self) -> list[tuple[int, torch.Tensor]]:
        """For each example (or window) its input row and the positions of its kept tokens in it, on the host."""
        pieces = torch.split(self.places.cpu(), self.lengths if self.group == 1 else [self.width] * self.rows)
        rows = [int(piece[0]) // self.width if len(piece) else number for number, piece in enumerate(pieces)]
        return [(row, piece % self.width) for row, piece in zip(rows, pieces, strict=True)]

    def _index(self, device: torch.device) -> torch.Tensor:
        if device not in self._indices:
            self._indices[device] = self.places.to(device)
        return self._indices[device]


def joined(streams: Sequence[Stream]) -> Stream:
    """Streams of forwards that continue one another, side by side: [B, T_1 + T_2 + ...]."""
    if len(streams) == 1:
        return streams[0]
    masks = [torch.ones(s.rows, s.width, dtype=torch.bool) if s.mask is None else s.mask.cpu() for s in streams]
    tokens, positions = ([getattr(stream, name) for stream in streams] for name in ("tokens", "positions"))
    return Stream(
        streams[0].rows,
        sum(stream.width for stream in streams),
        torch.cat(masks, 1),
        tokens=_side_by_side(tokens),
        positions=_side_by_side(positions),
    )


def in_order(rows: Sequence[torch.Tensor], lengths: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of forwards that continue one another, packed anew so that all rows of an example follow one another.

    Args:
        rows: [sum lengths, *feature] of each forward.
        lengths: rows per example of each forward.
    """
    owners = torch.cat([torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) for counts in lengths])
    return torch.cat(list(rows))[owners.argsort(stable=True).to(rows[0].device)]


def _side_by_side(grids: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """[B, T_1 + T_2 + ...]; None if any is not known."""
    known = [grid for grid in grids if grid is not None]
    return torch.cat(known, 1) if len(known) == len(grids) else None


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
