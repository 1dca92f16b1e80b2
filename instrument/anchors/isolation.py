"""Label words that read nothing before them (Wang et al., EMNLP 2023, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import BatchError
from .edits import Rows, edited


@contextmanager
def isolated(model: nn.Module, positions: Sequence[Sequence[int]], layers: Sequence[int] | None = None) -> Iterator[None]:
    """Within the block, tokens at some positions see no token before them: their scores are -inf before the softmax, in all heads.

    Args:
        model: see `edited`.
        positions: for each row of the batch, those of the label words (or of others, to compare), counted from its first column.
        layers: in which; negative numbers count from the end; all if not given.

    Raises:
        BatchError: positions that do not fit the batch. What `edited` raises.
    """

    def change(layer: int, shape: tuple[int, int, int, int], device: torch.device) -> list[Rows]:
        check_rows(positions, shape)
        return [_cut(row, list(chosen), shape[3], device) for row, chosen in enumerate(positions) if len(chosen)]

    with edited(model, change, layers):
        yield


def check_rows(positions: Sequence[Sequence[int]], shape: tuple[int, int, int, int]) -> None:
    """BatchError unless there are positions for each row of a batch, all of them within it."""
    rows, _, width, _ = shape
    if len(positions) != rows or any(not 0 <= position < width for row in positions for position in row):
        raise BatchError(
            f"a batch of {rows} rows of {width} tokens needs positions for each row, from 0 to {width - 1}; got {positions}"
        )


def _cut(row: int, positions: list[int], keys: int, device: torch.device) -> Rows:
    queries = torch.tensor(positions, device=device)
    return Rows(row, queries, keep=torch.arange(keys, device=device)[None] >= queries[:, None])
