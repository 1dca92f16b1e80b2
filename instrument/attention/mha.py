"""Tier 2: nn.MultiheadAttention, whose q, k and v are computed once more from its own projections.

The kernel stays what it is. The gradient of z follows from that of the module's output, which is a linear function of z.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .facts import Attended, Turn
from .masks import MASKED, Mask


def attended(module: nn.MultiheadAttention, arguments: dict[str, Any], output: Any) -> Attended | None:
    """What a call was; None for parameters that cannot be multiplied with here (sharded or quantised ones)."""
    query, key, value = (_batched(arguments[name], module) for name in ("query", "key", "value"))
    weights, biases = _projections(module)
    if any(type(weight) not in (torch.Tensor, nn.Parameter) for weight in weights):
        return None
    q, k, v = (
        functional.linear(tensor, weight, bias) for tensor, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    k, v, extra = _with_extra_keys(module, k, v)
    q, k, v = (_by_head(tensor, module.num_heads) for tensor in (q, k, v))
    mask = _mask(module, arguments, query.shape[0], query.shape[1], key.shape[1])
    dropout = module.dropout if module.training else 0.0
    return Attended(
        tier="mha",
        implementation="torch",
        q=q,
        k=k,
        v=v,
        z=_z(q, k, v, mask, extra),
        mask=mask,
        scale=module.head_dim**-0.5,
        dropout=dropout,
        extra_keys=extra,
        cross=_is_cross(arguments),
        source=output[0],
        turn=_turn(module),
    )


def _is_cross(arguments: dict[str, Any]) -> bool | None:
    """Keys made of another tensor are of another sequence, unless they have pads, which may be those of the queries."""
    if arguments["key"] is arguments["query"]:
        return False
    return True if arguments.get("key_padding_mask") is None else None


def _batched(tensor: torch.Tensor, module: nn.MultiheadAttention) -> torch.Tensor:
    """[B, T, E], whichever way it was given."""
    if tensor.ndim == 2:
        return tensor[None]
    return tensor if module.batch_first else tensor.transpose(0, 1)


def _projections(module: nn.MultiheadAttention) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Weights and biases of q, k and v."""
    if module._qkv_same_embed_dim:
        weights = list(module.in_proj_weight.chunk(3))
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    bias = module.in_proj_bias
    return weights, [None, None, None] if bias is None else list(bias.chunk(3))


def _with_extra_keys(module: nn.MultiheadAttention, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    extra = 0
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(len(k), -1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(len(v), -1, -1)], 1)
        extra += 1
    if module.add_zero_attn:
        k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
        extra += 1
    return k, v, extra


def _mask(module: nn.MultiheadAttention, arguments: dict[str, Any], rows: int, queries: int, keys: int) -> Mask:
    """Both masks in one. In contrast to scaled_dot_product_attention, True means masked here."""
    scores: torch.Tensor | None = None
    padding, attention = arguments.get("key_padding_mask"), arguments.get("attn_mask")
    if padding is not None:
        scores = _added(padding.reshape(rows, 1, 1, keys))
    if attention is not None:
        shaped = attention if attention.ndim == 2 else attention.reshape(rows, module.num_heads, queries, keys)
        added = _added(shaped[None, None] if attention.ndim == 2 else shaped)
        scores = added if scores is None else scores + added
    if scores is None:
        return Mask()
    keep = scores > MASKED
    bias = torch.where(keep, scores, 0)
    return Mask(None if bool(keep.all()) else keep, bias if bool(bias.any()) else None)


def _added(mask: torch.Tensor) -> torch.Tensor:
    """A mask as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask.detach().float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -torch.inf)


def _z(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, extra: int) -> torch.Tensor:
    """What the module computes inside; extra keys are seen by every query."""
    added = None
    if mask.keep is not None or mask.bias is not None:
        zero = torch.zeros((), device=q.device, dtype=q.dtype)
        added = zero if mask.bias is None else mask.bias.to(q.dtype)
        added = added if mask.keep is None else torch.where(mask.keep, added, -torch.inf)
        added = functional.pad(added.expand(-1, -1, -1, k.shape[2] - extra), (0, extra))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=added)


def _turn(module: nn.MultiheadAttention) -> Turn:
    """output = z W^T + b, so dL/dz = dL/doutput W."""
    weight, heads = module.out_proj.weight, module.num_heads

    def turned(gradient: torch.Tensor) -> torch.Tensor:
        return _by_head(_batched(gradient, module) @ weight.detach().to(gradient.dtype), heads)

    return turned


def _by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, H, T, d] of [B, T, H d]."""
    return tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2)
