"""Captured rows: how many are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensortape.instrument.capture import nonfinite_rows

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (torch.zeros(4, 3), 0),
        (torch.tensor([[NAN, 1.0], [1.0, 1.0], [INF, -INF]]), 2),
        (torch.tensor([INF, 1.0, -INF]), 2),
        (torch.tensor([[INF], [-INF]]), 2),
        (torch.full((40, 3), 60000.0, dtype=torch.float16), 0),
        (torch.full((40, 3), 3e38, dtype=torch.bfloat16), 0),
        (torch.tensor([[1.0, NAN], [1.0, 2.0]], dtype=torch.float8_e5m2), 1),
        (torch.full((40, 3), 400.0, dtype=torch.float8_e4m3fn), 0),
        (torch.tensor([[1.0, NAN], [1.0, 2.0]], dtype=torch.float8_e4m3fn), 1),
        (torch.empty(0, 3), 0),
        (torch.empty(3, 0), 0),
        (torch.arange(3), 0),
        (torch.tensor([[[1.0, NAN], [2.0, INF]], [[0.0, 1.0], [2.0, 3.0]]]), 1),
    ],
)
def test_rows_that_are_not_finite(rows: Tensor, expected: int) -> None:
    """Rows that hold NaN or infinity, in any dtype; sums that overflow do not count."""
    assert nonfinite_rows(rows) == expected
