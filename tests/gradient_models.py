"""What gradients, weights and saliency are, by plain autograd on a copy of a model, without the code under test."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from tiny_models import CASES, Case, seeded, tensors
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BloomConfig,
    BloomModel,
    DeepseekV3Config,
    DeepseekV3Model,
    GPTNeoConfig,
    GPTNeoModel,
    GptOssConfig,
    GptOssModel,
)

IDS = list("abcde")
Run = Callable[[nn.Module], Any]


# --- models --------------------------------------------------------------------------------------------------------------------


def bloom() -> nn.Module:
    """Bloom, which computes its weights with a softmax of its own, and ALiBi."""
    return seeded(lambda: BloomModel(BloomConfig(vocab_size=97, hidden_size=52, n_layer=2, n_head=2)))


def gpt_neo() -> nn.Module:
    """GPT-Neo: a layer with full and one with local attention, by a softmax of its own."""
    sizes = {"vocab_size": 97, "hidden_size": 52, "num_layers": 2, "num_heads": 2, "intermediate_size": 53}
    config = GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=3, max_position_embeddings=19)
    return seeded(lambda: GPTNeoModel(config))


def gpt_oss() -> nn.Module:
    """GPT-OSS: sinks, and a window in every other layer."""
    sizes = {"vocab_size": 97, "hidden_size": 52, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return seeded(lambda: GptOssModel(GptOssConfig(**sizes, **experts, num_key_value_heads=2, head_dim=26, sliding_window=3)))


def deepseek() -> nn.Module:
    """DeepSeek-V3 without experts: heads of values are narrower than those of keys."""
    sizes = {"vocab_size": 97, "hidden_size": 52, "intermediate_size": 53, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "q_lora_rank": 11, "kv_lora_rank": 13, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10}
    return seeded(lambda: DeepseekV3Model(DeepseekV3Config(**sizes, **heads, v_head_dim=9, first_k_dense_replace=2)))


def without_dropout(model: Any) -> Any:
    """A model with every dropout set to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def build(name: str) -> Any:
    """A model of `tiny_models.CASES` that is ready for training without dropout; still in eval mode."""
    return without_dropout(CASES[name].build())


def checkpointing(model: Any, *, reentrant: bool) -> Any:
    """A transformers model in train mode that computes its blocks once more in backward."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model.train()


# --- losses --------------------------------------------------------------------------------------------------------------------


def per_example(output: Any, mask: Tensor, seed: int = 0, *, time_first: bool = False) -> Tensor:
    """[B]: something of every real position of a model's first floating output, and of no pad."""
    states = next(tensor for tensor in tensors(output) if tensor.is_floating_point())
    states = states.transpose(0, 1) if time_first else states
    weights = torch.randn(states.shape[1:], generator=torch.Generator().manual_seed(seed)).to(states.dtype)
    return (torch.tanh(states) * weights * mask[..., None].to(states.dtype)).flatten(1).sum(1)


def loss_of(case: Case, model: nn.Module, side: str = "right", seed: int = 0) -> Tensor:
    """The loss of every example of a case's batch, [B]."""
    stack = next(reversed(case.blocks))
    inputs = {name: value.requires_grad_() if value.is_floating_point() else value for name, value in case.inputs(side).items()}
    return per_example(model(**inputs), case.mask(stack, side), seed, time_first=case.time_first)


# --- gradients -----------------------------------------------------------------------------------------------------------------


def retained(model: nn.Module, sites: Sequence[str], run: Run) -> dict[str, list[Tensor]]:
    """Gradients at the inputs and outputs of modules, `path:out` or `path:in`, one per call, by retain_grad on a copy."""
    copied, kept = copy.deepcopy(model), defaultdict(list)

    def keep(site: str, value: Any) -> None:
        tensor = next(tensor for tensor in tensors(value) if tensor.is_floating_point())
        tensor.retain_grad()
        kept[site].append(tensor)

    for site in sites:
        path, _, port = site.partition(":")
        module = copied.get_submodule(path)
        if port == "in":
            module.register_forward_pre_hook(lambda m, args, kwargs, site=site: keep(site, [args, kwargs]), with_kwargs=True)
        else:
            module.register_forward_hook(lambda m, args, output, site=site: keep(site, output))
    run(copied)
    return {site: [tensor.grad for tensor in found] for site, found in kept.items()}


def parameter_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies of what is in `.grad`."""
    return {name: None if one.grad is None else one.grad.clone() for name, one in model.named_parameters()}


def same_gradients(one: nn.Module, other: nn.Module) -> bool:
    """Whether `.grad` of all parameters is bit for bit the same."""
    mine, others = parameter_gradients(one), parameter_gradients(other)
    return mine.keys() == others.keys() and all(_same(mine[name], others[name]) for name in mine)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


# --- weights and saliency ------------------------------------------------------------------------------------------------------


def eager(model: nn.Module, run: Run) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    """(A, dL/dA) of every attention call, [B, H, Tq, Tk], by module path: of a copy that materialises all weights."""
    copied = copy.deepcopy(model)
    if hasattr(copied, "set_attn_implementation"):
        copied.set_attn_implementation("eager")
    found: dict[str, list[Tensor]] = defaultdict(list)
    frames: list[str] = []
    for path, module in copied.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(_with_weights, with_kwargs=True)
        module.register_forward_pre_hook(lambda m, args, path=path: frames.append(path))
        module.register_forward_hook(lambda m, args, output: (frames.pop(), None)[1])
    with _softmax_shown(lambda weights: found[frames[-1]].append(weights)):
        run(copied)
    return {path: [(one.detach(), one.grad) for one in weights] for path, weights in found.items()}


def saliency_of(found: dict[str, list[tuple[Tensor, Tensor | None]]], path: str, call: int = 1) -> Tensor:
    """A * dL/dA, 0 where there is no weight; [B, H, Tq, Tk], or [B * H, Tq, Tk] of nn.MultiheadAttention."""
    weights, gradient = found[path][call - 1]
    assert gradient is not None
    return torch.where(weights == 0, 0, weights * gradient)


def real_parts(grid: Tensor, queries: Tensor, keys: Tensor | None = None) -> list[np.ndarray[Any, Any]]:
    """[H, real queries, real keys] of each example, of a [B, H, Tq, Tk] (or [B * H, Tq, Tk]) tensor and masks [B, T]."""
    keys = queries if keys is None else keys
    grid = grid.reshape(len(queries), -1, *grid.shape[-2:])
    return [grid[row][:, queries[row] != 0][:, :, keys[row] != 0].detach().numpy() for row in range(len(queries))]


def apart(mine: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The largest difference, relative to the largest wanted magnitude, over all examples of a site."""
    assert len(mine) == len(wanted)
    assert [np.shape(one) for one in mine] == [np.shape(one) for one in wanted]
    largest = max(float(np.abs(one).max(initial=0)) for one in wanted)
    assert largest > 0
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0)) for a, b in zip(mine, wanted, strict=True)) / largest


def _with_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "need_weights": True, "average_attn_weights": False}


@contextmanager
def _softmax_shown(show: Callable[[Tensor], None]) -> Iterator[None]:
    softmax = functional.softmax

    def shown(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights = softmax(given, *args, **kwargs)
        if weights.ndim in (3, 4):
            if weights.requires_grad:
                weights.retain_grad()
            show(weights)
        return weights

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Tensor:
        return explicit_attention(shown, q, k, v, attn_mask, **options)

    patches = [(functional, "softmax", shown), (torch, "softmax", shown), (functional, "scaled_dot_product_attention", attention)]
    with mock.patch.object(*patches[0]), mock.patch.object(*patches[1]), mock.patch.object(*patches[2]):
        yield


def explicit_attention(
    softmax: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention as its documentation writes it."""
    if enable_gqa:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        added = attn_mask if attn_mask.dtype != torch.bool else torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
        scores = scores + added
    return softmax(scores, -1) @ v
