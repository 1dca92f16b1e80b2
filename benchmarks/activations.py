"""Rows that compress as activations do."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

FEATURES = 768


def like_activations(rows: int, random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """[rows, FEATURES]: the bits of bfloat16 values, normally distributed in each feature, at a scale of the feature's own."""
    scales = random.lognormal(size=FEATURES).astype(np.float32)
    return (random.standard_normal((rows, FEATURES), np.float32) * scales).astype(ml_dtypes.bfloat16).view(np.uint16)
