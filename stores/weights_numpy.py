"""Attention weights in numpy: the same as `weights_torch`, for readers without torch."""

from __future__ import annotations

import numpy as np

from .dtypes import Array


def weights(
    q: Array,
    k: Array,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Array | None = None,
    keep: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """As `weights_torch.weights`, on arrays."""
    wide = np.float64 if q.dtype == np.float64 else np.float32
    scores = np.matmul(q.astype(wide), of_each_head(k, len(q)).astype(wide).swapaxes(1, 2)) * wide(scale)
    if softcap is not None:
        scores = np.tanh(scores / wide(softcap)) * wide(softcap)
    if bias is not None:
        scores = scores + bias.astype(wide)
    if keep is not None:
        scores = np.where(keep, scores, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(sinks.astype(wide)[:, None, None], (*scores.shape[:2], 1))
        return _softmax(np.concatenate([scores, column], -1))[..., :-1]
    return _softmax(scores)


def of_each_head(array: Array, heads: int) -> Array:
    """[H, ...] of an array [Hkv, ...] that groups of heads share."""
    return array if len(array) == heads else np.repeat(array, heads // len(array), 0)


def _softmax(scores: Array) -> Array:
    """Over the last axis; NaN where every score is -inf."""
    with np.errstate(invalid="ignore"):
        grown = np.exp(scores - scores.max(-1, keepdims=True))
    found: Array = grown / grown.sum(-1, keepdims=True)
    return found
