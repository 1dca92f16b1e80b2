"""Reductions of packed rows, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortape.instrument.reduce import REDUCTIONS, reduced

BY_HAND = {
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.max(0),
    "first": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
}


def test_there_is_one_of_each() -> None:
    """The names that `Site(reduce=...)` takes."""
    assert set(REDUCTIONS) == set(BY_HAND)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(BY_HAND)),
    st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(0, 2**16),
)
def test_reductions_equal_numpy(kind: str, lengths: list[int], feature: list[int], seed: int) -> None:
    """One row per example; an example without rows is NaN."""
    rows = torch.randn(sum(lengths), *feature, generator=torch.Generator().manual_seed(seed))
    found = reduced(rows.clone(), lengths, kind).numpy()
    assert found.shape == (len(lengths), *feature)
    for got, piece in zip(found, np.split(rows.numpy(), np.cumsum(lengths)[:-1]), strict=True):
        if len(piece):
            np.testing.assert_allclose(got, BY_HAND[kind](piece), rtol=1e-5, atol=1e-6)
        else:
            assert np.isnan(got).all()


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(kind: str, dtype: torch.dtype) -> None:
    """Means of 16-bit floats are taken in float32 and rounded once, those of float64 in float64."""
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = reduced(rows, [4, 5], kind)
    assert found.dtype == dtype
    wide = (rows if dtype == torch.float64 else rows.float()).numpy()
    wanted = torch.tensor(np.stack([BY_HAND[kind](piece) for piece in (wide[:4], wide[4:])])).to(dtype)
    torch.testing.assert_close(found, wanted, rtol=1e-14 if dtype == torch.float64 else 0, atol=0)


@pytest.mark.parametrize("kind", ["max", "first", "last"])
def test_double_precision_stays(kind: str) -> None:
    """Picking a value does not round it."""
    rows = torch.tensor([[1.0 + 2**-40], [1.0], [2.0 - 2**-40], [1.5]], dtype=torch.float64)
    wanted = np.stack([BY_HAND[kind](piece) for piece in (rows[:2].numpy(), rows[2:].numpy())])
    assert np.array_equal(reduced(rows, [2, 2], kind).numpy(), wanted)


@pytest.mark.parametrize("kind", ["max", "first", "last"])
def test_whole_numbers(kind: str) -> None:
    """Integers stay what they are, large ones too."""
    rows = torch.tensor([[3], [2**40 + 1], [7], [5]])
    wanted = np.stack([BY_HAND[kind](piece) for piece in (rows[:2].numpy(), rows[2:].numpy())])
    assert np.array_equal(reduced(rows, [2, 2], kind).numpy(), wanted)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_nothing_at_all(kind: str) -> None:
    """A batch whose examples are all empty."""
    assert reduced(torch.empty(0, 3), [0, 0], kind).isnan().all()


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_nan_passes_through(kind: str) -> None:
    """A NaN among the rows is not hidden, nor does it reach other examples."""
    rows = torch.tensor([[1.0], [float("nan")], [2.0], [4.0]])
    found = reduced(rows, [2, 2], kind)
    assert found[0].isnan().all()
    assert found[1].item() == {"mean": 3.0, "max": 4.0}[kind]


def test_rows_are_not_changed() -> None:
    """Reducing copies."""
    rows = torch.arange(6.0).reshape(3, 2)
    reduced(rows, [0, 3], "last").fill_(-1)
    assert torch.equal(rows, torch.arange(6.0).reshape(3, 2))
