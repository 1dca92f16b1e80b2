"""Attention weights in torch; imported only where torch is wanted."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def weights(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention probabilities of some queries, in the order of operations that transformers' models use.

    softmax(softcap(q k^T scale) + bias) over the kept keys and, where there is one, a sink whose column is dropped. Computed in
    float32 (float64 for float64); queries that may attend to nothing give NaN.

    Args:
        q: [H, R, d]. k: [Hkv, K, d]; head h uses key head h // (H / Hkv).
        bias: [H or 1, R, K] added to the scores. keep: [H or 1, R, K] bool. sinks: [H].

    Returns:
        [H, R, K].
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.matmul(q.to(wide), of_each_head(k, len(q)).to(wide).transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.to(wide)
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    if sinks is None:
        return torch.softmax(scores, -1)
    column = sinks.to(wide)[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]


def of_each_head(tensor: Tensor, heads: int) -> Tensor:
    """[H, ...] of a tensor [Hkv, ...] that groups of heads share."""
    return tensor if len(tensor) == heads else tensor.repeat_interleave(heads // len(tensor), 0)
