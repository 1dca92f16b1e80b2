"""Streams: which positions of a padded grid belong to which example."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensortape.instrument.errors import BatchError
from tensortape.instrument.streams import MAIN, Stream, keep_mask, segments_of, table_of


def test_tables_of_streams() -> None:
    """The main stream is the token table, others are named after it."""
    assert table_of(MAIN) == "token"
    assert table_of("decoder") == "token.decoder"


def test_without_a_mask_every_position_is_kept() -> None:
    """Every example is as long as the batch is wide."""
    stream = Stream(3, 4)
    assert stream.lengths == [4, 4, 4]
    assert stream.kept == 12
    assert torch.equal(stream.pack(torch.arange(12).reshape(3, 4)), torch.arange(12))


def test_a_mask_drops_positions() -> None:
    """Wherever they are, also all of a row."""
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 1]]).bool()
    stream = Stream(4, 3, mask)
    assert stream.lengths == [2, 0, 2, 3]
    assert stream.pack(torch.arange(12).reshape(4, 3)).tolist() == [1, 2, 6, 8, 9, 10, 11]
    assert stream.pack(torch.arange(24).reshape(4, 3, 2)).tolist()[:2] == [[2, 3], [4, 5]]


def test_segments_split_rows() -> None:
    """Runs of one number in one row are an example each; equal numbers in the next row are another."""
    segments = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 2], [5, 4, 4, 5]])
    assert Stream(3, 4, None, segments).lengths == [2, 2, 3, 1, 1, 2, 1]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    stream = Stream(3, 4, mask, segments)
    assert stream.lengths == [2, 1, 3, 1, 2]
    assert stream.kept == int(mask.sum())


def test_a_packed_tensor_is_a_copy() -> None:
    """Later changes of the grid do not reach it, whichever way the grid lies in memory."""
    for grid in (torch.zeros(3, 4, 2), torch.zeros(4, 3, 2).transpose(0, 1), torch.zeros(1, 4, 2).expand(3, 4, 2).contiguous()):
        for mask in (None, torch.ones(3, 4).tril().bool()):
            rows = Stream(3, 4, mask).pack(grid)
            grid.fill_(1)
            assert not rows.any()
            grid.fill_(0)


def test_masks_become_booleans() -> None:
    """1 and True mean a real position, in any dtype."""
    for mask in (torch.tensor([[1, 0]]), torch.tensor([[True, False]]), torch.tensor([[1.0, 0.0]])):
        assert torch.equal(keep_mask(mask, 1, 2), torch.tensor([[True, False]]))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (6,), (2, 3, 1)])
def test_masks_of_another_shape(shape: tuple[int, ...]) -> None:
    """The error shows both shapes and what to do."""
    with pytest.raises(BatchError, match=r"2 rows of 4 positions.*batch\(mask=\.\.\.\)") as raised:
        keep_mask(torch.ones(shape), 2, 4)
    assert str(list(shape)) in str(raised.value)


@pytest.mark.parametrize(
    ("positions", "segments"),
    [
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([0, 1, 0, 1], [0, 0, 1, 1]),
        ([0, 0, 0, 1], [0, 1, 2, 2]),
        ([5, 6, 2, 3], [0, 0, 1, 1]),
        ([2, 3, 4, 9], [0, 0, 0, 0]),
    ],
)
def test_positions_that_start_anew(positions: list[int], segments: list[int]) -> None:
    """An example ends where position ids do not go on rising."""
    assert segments_of(torch.tensor([positions, positions])).tolist() == [segments, segments]


@st.composite
def rows_of_examples(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """[B, T] segments, which rise within a row, and a mask."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    steps = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    mask = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    return torch.tensor(steps).reshape(rows, width).cumsum(1), torch.tensor(mask).reshape(rows, width)


@settings(deadline=None)
@given(rows_of_examples())
def test_lengths_of_segments_equal_a_loop(drawn: tuple[Tensor, Tensor]) -> None:
    """Whatever the segments and pads: lengths are those of the runs of kept positions."""
    segments, mask = drawn
    kept = [(row, int(segments[row, at])) for row in range(len(mask)) for at in range(mask.shape[1]) if mask[row, at]]
    stream = Stream(*mask.shape, mask, segments)
    assert stream.lengths == [len(list(run)) for _, run in groupby(kept)]
    assert len(stream.pack(segments)) == stream.kept == len(kept)
