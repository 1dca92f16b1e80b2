"""Tier 3: modules that call scaled_dot_product_attention themselves."""

from __future__ import annotations

from typing import Any

import torch

from .facts import Attended
from .masks import Mask, Readings


def attended(args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor, readings: Readings) -> Attended | None:
    """What a call was; None unless its tensors are [B, H, T, d]."""
    given = _arguments(*args, **kwargs)
    q, k, v = given["query"], given["key"], given["value"]
    if not q.ndim == k.ndim == v.ndim == output.ndim == 4:
        return None
    mask = given["attn_mask"]
    return Attended(
        tier="sdpa",
        implementation="sdpa",
        q=q,
        k=k,
        v=v,
        z=output,
        mask=Mask(causal=True) if given["is_causal"] else Mask() if mask is None else readings.read(mask).first_keys(k.shape[2]),
        scale=float(given["scale"]) if given["scale"] is not None else q.shape[-1] ** -0.5,
        dropout=float(given["dropout_p"]),
        source=output,
    )


def _arguments(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    return dict(locals())
