"""Attention of models written by hand or with torch's modules; masks; weights, reductions of them, and what is stored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_models import BY_HAND, INTERFACE, SIDES, SOFTMAX, SWIN, ByHand, Family, Hand, attentions, kept
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from tiny_models import (
    BATCH,
    HEADS,
    HIDDEN,
    LENGTHS,
    WIDTH,
    Inputs,
    batch,
    batch_with_positions,
    features,
    hook_count,
    observed,
    padding_mask,
    random_tokens,
    seeded,
    torch_decoder,
    torch_encoder,
)
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from tensortape.instrument import Recorder, Site
from tensortape.instrument.errors import AttentionError, InstrumentError
from tensortape.stores import Run, weights_numpy, weights_torch

CLOSE = 1e-5
Recorded = Callable[..., Run]
Make = Callable[..., Recorder]
Opened = Callable[[Recorder], Run]
Matrix = np.ndarray


def check(run: Run, site: str, expected: list[Matrix], first: int = 0) -> None:
    """Every example's matrix at a site."""
    for example, one in enumerate(expected, first):
        found = run.attention(site)[example]
        assert found.shape == one.shape, f"{site} of example {example}"
        np.testing.assert_allclose(found, one, rtol=0, atol=CLOSE, err_msg=f"{site} of example {example}")


# --- written by hand ------------------------------------------------------------------------------------------------------------


def inputs_of(side: str) -> Inputs:
    """Tokens, mask and positions."""
    return batch_with_positions(side)


def check_by_hand(run: Run, model: Hand, hand: ByHand, inputs: Inputs, first: int = 0) -> None:
    """Every block's weights, computed from what goes into its attention module."""
    mask = inputs["attention_mask"]
    paths = [f"h.{layer}.attn" for layer in range(len(model.h))]
    seen = observed(model, inputs, set(paths))
    assert run.attention_sites == paths
    for path in paths:
        weights = hand.weights(model.get_submodule(path), seen[path][0][0], mask)  # type: ignore[arg-type]
        check(run, path, kept(weights, mask, mask), first)


@pytest.mark.parametrize(
    ("name", "side"), [pytest.param(name, side, id=f"{name}-{side}") for name, hand in BY_HAND.items() for side in hand.sides]
)
def test_models_written_by_hand(recorded: Recorded, name: str, side: str) -> None:
    """Masks, scales, groups and imports of scaled_dot_product_attention: a plain softmax of the module's own projections."""
    hand = BY_HAND[name]
    model, inputs = hand.build(), inputs_of(side)
    run = recorded(model, "attention", inputs)
    check_by_hand(run, model, hand, inputs)
    facts = [run.attention(site).facts for site in run.attention_sites]
    assert {fact["tier"] for fact in facts} == {"softmax" if name == "softmax" else "sdpa"}
    assert hand.stored is None or {fact["stored"] for fact in facts} == {hand.stored}


@pytest.mark.parametrize("name", [name for name, hand in BY_HAND.items() if "left" in hand.sides])
@pytest.mark.parametrize("pads", ["first", "later"])
def test_pads_may_come_with_any_batch(make: Make, opened: Opened, name: str, pads: str) -> None:
    """Batches with pads before or after one without: what was decided at the first holds at the second."""
    hand = BY_HAND[name]
    model = hand.build()
    whole = {"input_ids": random_tokens(BATCH, WIDTH), "attention_mask": torch.ones(BATCH, WIDTH, dtype=torch.long)}
    batches = [inputs_of("left"), whole][:: 1 if pads == "first" else -1]
    recorder = make(model, "attention")
    for number, inputs in enumerate(batches):
        with torch.no_grad(), recorder.batch(ids=[BATCH * number + row for row in range(BATCH)]):
            model(**inputs)
    run = opened(recorder)
    for number, inputs in enumerate(batches):
        check_by_hand(run, model, hand, inputs, BATCH * number)


class Fragile(nn.Module):
    """Attends by a module that fails, then by itself; then once more, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fast_attn, self.attn = Failing(), Own()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d]."""
        try:
            x = self.fast_attn(x)
        except NotImplementedError:
            x = by_heads(x, is_causal=True)
        return self.attn(x)


class Failing(nn.Module):
    """Has an inner module that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Kernel()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to nothing."""
        return self.inner(x)


class Kernel(nn.Module):
    """Fails."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to nothing."""
        raise NotImplementedError("no such kernel here")


class Own(nn.Module):
    """Attends to all."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d]."""
        return by_heads(x)


def by_heads(x: Tensor, **options: Any) -> Tensor:
    """Attention of x to itself, with four heads."""
    q = x.unflatten(2, (4, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, **options).transpose(1, 2).flatten(2)


class Nested(nn.Module):
    """Holds a model whose own forward attends."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Fragile()

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d]."""
        return self.body(inputs_embeds)


def test_an_error_that_the_model_catches_leaves_the_stack_clean(recorded: Recorded) -> None:
    """A model that falls back when a kernel is missing: the failed module has left the stack."""
    run = recorded(seeded(Nested), "attention", {"inputs_embeds": features()["src"]})
    assert run.attention_sites == ["body", "body.attn"]


def test_the_root_module_may_attend_itself(recorded: Recorded) -> None:
    """Its path is empty."""
    run = recorded(seeded(Own), "attention", {"x": features()["src"]})
    assert run.attention_sites == [""]
    x = features()["src"].unflatten(2, (4, -1)).transpose(1, 2)
    check(run, "", kept(torch.softmax(x @ x.transpose(2, 3) * 13**-0.5, -1), None, None))


def test_an_exception_leaves_nothing_behind(make: Make, opened: Opened) -> None:
    """A block fails within the forward: no hook, no function mode; the next batch is attributed rightly."""
    hand = BY_HAND["bool"]
    model, inputs = hand.build(), inputs_of("left")
    recorder = make(model, "attention")
    handle = model.h[1].mlp.register_forward_pre_hook(_fail)
    with pytest.raises(ArithmeticError), torch.no_grad(), recorder.batch(ids=list(range(BATCH))):
        model(**inputs)
    handle.remove()
    assert (hook_count(model), len(_get_current_function_mode_stack())) == (0, 0)
    with torch.no_grad(), recorder.batch(ids=list(range(BATCH))):
        model(**inputs)
    check_by_hand(opened(recorder), model, hand, inputs)


def _fail(*_: Any) -> None:
    raise ArithmeticError


class Two(nn.Module):
    """An encoder-decoder written by hand: its cross-attention is called like any other."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.own = name, Own()
        self.add_module(name, Across())

    def forward(self, inputs_embeds: Tensor, memory: Tensor) -> Tensor:
        """[B, T, d] and [B, S, d] to [B, T, d]."""
        return self.get_submodule(self.name)(self.own(inputs_embeds), memory)


class Across(nn.Module):
    """Attends to a memory."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """[B, T, d] and [B, S, d] to [B, T, d]."""
        q, k = (one.unflatten(2, (4, -1)).transpose(1, 2) for one in (x, memory))
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", ["cross_attn", "attn2"])
@pytest.mark.parametrize("width", [5, 13])
def test_cross_attention_by_hand(recorded: Recorded, name: str, width: int) -> None:
    """Fewer and more keys than queries, in a module whose name says so or not."""
    model = seeded(lambda: Two(name))
    x, memory = features()["src"], torch.randn(BATCH, width, HIDDEN, generator=torch.Generator().manual_seed(3))
    run = recorded(model, "attention", {"inputs_embeds": x, "memory": memory})
    with torch.no_grad():
        q, k = (one.unflatten(2, (4, -1)).transpose(1, 2) for one in (model.own(x), memory))
    assert run.attention_sites == ["own", name]
    assert run.attention(name).facts["cross"]
    check(run, name, kept(torch.softmax(q @ k.transpose(2, 3) * 13**-0.5, -1), None, None))


# --- nn.MultiheadAttention ------------------------------------------------------------------------------------------------------


class Multihead(nn.Module):
    """nn.MultiheadAttention with whatever arguments it is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(HIDDEN, 4, **options)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, **options: Any) -> Tensor:
        """To the output alone."""
        key = query if key is None else key
        return self.attn(query, key, key if value is None else value, **options)[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_bool(*shape: int) -> Tensor:
    """Seeded; True means masked, and no row is all masked."""
    mask = random(*shape, seed=5) > 0.3
    mask[..., 0] = False
    return mask


def self_attention(side: str) -> Inputs:
    """A query alone, with pads."""
    return {"query": random(BATCH, WIDTH, HIDDEN), "key_padding_mask": padding_mask(side) == 0}


def cross_attention(side: str) -> Inputs:
    """Keys and values of other widths than the queries, and of other features."""
    return {"query": random(BATCH, WIDTH, HIDDEN), "key": random(BATCH, 11, 23, seed=1), "value": random(BATCH, 11, 31, seed=2)}


CAUSAL = torch.ones(WIDTH, WIDTH).triu(1).bool()
MULTIHEAD: dict[str, tuple[dict[str, Any], Callable[[str], dict[str, Any]]]] = {
    "padding": ({}, self_attention),
    "padding_as_scores": (
        {},
        lambda side: {
            "query": random(BATCH, WIDTH, HIDDEN),
            "key_padding_mask": torch.zeros(BATCH, WIDTH).masked_fill(padding_mask(side) == 0, -torch.inf),
        },
    ),
    "causal": ({}, lambda side: {**self_attention(side), "attn_mask": CAUSAL}),
    "is_causal": ({}, lambda side: {**self_attention(side), "attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "with_weights": ({}, lambda side: {**self_attention(side), "attn_mask": CAUSAL, "need_weights": True}),
    "without_weights": ({}, lambda side: {**self_attention(side), "need_weights": False}),
    "bool": ({}, lambda side: {**self_attention(side), "attn_mask": random_bool(WIDTH, WIDTH) & (padding_mask(side).sum() > 0)}),
    "bool_by_head": ({}, lambda side: {"query": random(BATCH, WIDTH, HIDDEN), "attn_mask": random_bool(BATCH * 4, WIDTH, WIDTH)}),
    "float": (
        {},
        lambda side: {
            "query": random(BATCH, WIDTH, HIDDEN),
            "key_padding_mask": torch.zeros(BATCH, WIDTH).masked_fill(padding_mask(side) == 0, -torch.inf),
            "attn_mask": random(WIDTH, WIDTH, seed=4),
        },
    ),
    "float_by_head": (
        {},
        lambda side: {"query": random(BATCH, WIDTH, HIDDEN), "attn_mask": random(BATCH * 4, WIDTH, WIDTH, seed=4)},
    ),
    "no_bias": ({"bias": False}, self_attention),
    "bias_k": ({"add_bias_kv": True}, self_attention),
    "add_zero": ({"add_zero_attn": True}, self_attention),
    "both": ({"add_bias_kv": True, "add_zero_attn": True}, lambda side: {**self_attention(side), "attn_mask": CAUSAL}),
    "other_features": ({"kdim": 23, "vdim": 31}, cross_attention),
    "other_features_both": ({"kdim": 23, "vdim": 31, "add_bias_kv": True, "add_zero_attn": True}, cross_attention),
    "same_width": ({}, lambda side: {"query": random(BATCH, WIDTH, HIDDEN), "key": random(BATCH, WIDTH, HIDDEN, seed=9)}),
    "dropout": ({"dropout": 0.5}, self_attention),
}


def time_first(inputs: dict[str, Any]) -> dict[str, Any]:
    """[T, B, d] of [B, T, d]."""
    return {name: value.transpose(0, 1) if name in ("query", "key", "value") else value for name, value in inputs.items()}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize(("side", "batch_first"), [("left", True), ("right", False)], ids=["left", "right_time_first"])
@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead_attention(recorded: Recorded, name: str, side: str, batch_first: bool) -> None:
    """What the module itself gives with need_weights=True, average_attn_weights=False, less keys that are no tokens."""
    options, make_inputs = MULTIHEAD[name]
    model = seeded(lambda: Multihead(batch_first=batch_first, **options))
    inputs = make_inputs(side) if batch_first else time_first(make_inputs(side))
    padded = "key_padding_mask" in inputs
    said = padding_mask(side) if padded else torch.ones(BATCH, WIDTH)
    run = recorded(model, "attention", inputs, ids=list("abcde"), mask=said)
    key = inputs.get("key", inputs["query"])
    masks = {name: value for name, value in inputs.items() if "mask" in name}
    with torch.no_grad():
        module = copy.deepcopy(model.attn)
        _, weights = module(inputs["query"], key, inputs.get("value", key), **masks, need_weights=True, average_attn_weights=False)
    assert run.attention_sites == ["attn"]
    weights = weights[..., : key.shape[1 if batch_first else 0]]
    queries = said if padded else None
    check(run, "attn", kept(weights, queries, queries if "key" not in inputs else None))
    assert run.attention("attn").facts["tier"] == "mha"
    assert run.attention("attn").facts["cross"] == ("key" in inputs)


def weights_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Weights [B, H, Tq, Tk] of every nn.MultiheadAttention of a copy of a model, which is asked for them beside its forward.

    Asked for within the forward, or on torch's fast path, rows of pads that see nothing would be NaN and spoil all later layers.
    """
    copied, found = copy.deepcopy(model), {}

    def ask(path: str, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[path] = module.forward(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1]

    for path, module in copied.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_hook(lambda m, args, kwargs, out, path=path: ask(path, m, args, kwargs), with_kwargs=True)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            copied(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("side", "norm_first"), [("left", False), ("right", True)], ids=["left", "right_norm_first"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["full", "causal"])
def test_transformer_encoder(recorded: Recorded, side: str, norm_first: bool, batch_first: bool, mask: Tensor | None) -> None:
    """nn.TransformerEncoder, with its fast path and without, and its outputs the same."""
    model = torch_encoder(batch_first=batch_first, norm_first=norm_first)
    inputs = {**features(side, batch_first=batch_first), "mask": mask}
    expected = weights_of(model, inputs)
    run = recorded(model, "attention", inputs, ids=list("abcde"))
    assert run.attention_sites == list(expected) == [f"layers.{layer}.self_attn" for layer in range(3)]
    for site, weights in expected.items():
        check(run, site, kept(weights, padding_mask(side), padding_mask(side)))
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize(("side", "norm_first"), [("left", False), ("right", True)], ids=["left", "right_norm_first"])
@pytest.mark.parametrize("width", [5, WIDTH, 13])
def test_transformer_decoder(make: Make, opened: Opened, side: str, width: int, norm_first: bool) -> None:
    """Self- and cross-attention with a memory of another and of the same width, in two batches."""
    model = torch_decoder(norm_first=norm_first)
    batches = [
        {
            "tgt": random(BATCH, WIDTH, HIDDEN, seed=seed),
            "memory": random(BATCH, width, HIDDEN, seed=seed + 1),
            "tgt_mask": CAUSAL,
            "tgt_key_padding_mask": padding_mask(side) == 0,
        }
        for seed in (0, 2)
    ]
    recorder = make(model, "attention")
    for number, inputs in enumerate(batches):
        ids = [BATCH * number + row for row in range(BATCH)]
        with torch.no_grad(), recorder.batch(ids=ids, mask=padding_mask(side)):
            model(**inputs)
    run = opened(recorder)
    for number, inputs in enumerate(batches):
        expected = weights_of(model, inputs)
        assert sorted(run.attention_sites) == sorted(expected)
        for site, weights in expected.items():
            cross = site.endswith("multihead_attn")
            assert run.attention(site).facts["cross"] == cross
            check(run, site, kept(weights, padding_mask(side), None if cross else padding_mask(side)), BATCH * number)


def test_transformer_without_a_mask_for_the_recorder(make: Make, opened: Opened) -> None:
    """Nothing of the call shows tokens, in either of two batches: all positions count, and the first stack's are the tokens."""
    model = torch_decoder(norm_first=True)
    recorder = make(model, "attention")
    batches = [{"tgt": random(BATCH, WIDTH, HIDDEN, seed=s), "memory": random(BATCH, 13, HIDDEN, seed=s + 1)} for s in (0, 2)]
    for number, inputs in enumerate(batches):
        with torch.no_grad(), recorder.batch(ids=[BATCH * number + row for row in range(BATCH)]):
            model(**inputs)
    run = opened(recorder)
    for number, inputs in enumerate(batches):
        for site, weights in weights_of(model, inputs).items():
            check(run, site, kept(weights, None, None), BATCH * number)


class Loose(nn.Module):
    """Self-, cross- and self-attention outside of any stack."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True) for _ in range(3))

    def forward(self, inputs_embeds: Tensor, memory: Tensor) -> Tensor:
        """[B, T, d] and [B, S, d] to [B, T, d]."""
        x = self.first(inputs_embeds, inputs_embeds, inputs_embeds)[0]
        x = self.second(x, memory, memory)[0]
        return self.third(x, x, x)[0]


@pytest.mark.parametrize("width", [WIDTH, 13])
def test_multihead_attention_outside_of_a_stack(recorded: Recorded, width: int) -> None:
    """A memory as wide as the queries is not taken for where later queries come from."""
    model = seeded(Loose)
    inputs = {"inputs_embeds": random(BATCH, WIDTH, HIDDEN), "memory": random(BATCH, width, HIDDEN, seed=1)}
    run = recorded(model, "attention", inputs)
    expected = weights_of(model, inputs)
    assert run.attention_sites == ["first", "second", "third"]
    assert [run.attention(site).facts["cross"] for site in expected] == [False, True, False]
    for site, weights in expected.items():
        check(run, site, kept(weights, None, None))


# --- masks ----------------------------------------------------------------------------------------------------------------------

DOCUMENTS = ((2, 5), (4, 3), (7,), (1, 1, 5), (3, 4))  # lengths of the documents in each of five rows


def packed() -> Inputs:
    """Rows that hold several documents."""
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in DOCUMENTS])
    return {"input_ids": random_tokens(BATCH, WIDTH), "position_ids": positions}


def documents(weights: Tensor) -> list[Matrix]:
    """Each document's block of its row's weights."""
    starts = [(row, sum(lengths[:n]), length) for row, lengths in enumerate(DOCUMENTS) for n, length in enumerate(lengths)]
    return [weights[row, :, start : start + length, start : start + length].numpy() for row, start, length in starts]


@pytest.mark.parametrize("site", ["attention", "weights"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_documents(recorded: Recorded, name: str, site: str) -> None:
    """Documents that transformers keeps apart: each has a matrix of its own, whose rows sum to 1."""
    family, inputs = INTERFACE[name], packed()
    eager = {**inputs, "use_cache": False}
    run = recorded(family.build(), site, eager, ids=list(range(sum(map(len, DOCUMENTS)))))
    for path, weights in zip(family.sites(), attentions(family.build("eager"), eager), strict=True):
        check(run, path, documents(weights))
        assert all(np.abs(run.attention(path)[n].sum(-1) - 1).max() < CLOSE for n in range(len(run)))


OF_WEIGHTS = [
    pytest.param("attention", id="attention"),
    pytest.param("weights", id="weights"),
    pytest.param(Site("attention", store="weights"), id="stored"),
    pytest.param(Site("weights", reduce="entropy"), id="entropy"),
    pytest.param(Site("weights", reduce="received"), id="received"),
    pytest.param(Site("weights", queries=[-1]), id="queries"),
]


@pytest.mark.parametrize("site", OF_WEIGHTS)
def test_packed_documents_that_see_each_other_are_refused(recorded: Recorded, site: Any) -> None:
    """With the default use_cache=True transformers does not look for packed rows: no document has attention of its own."""
    with pytest.raises(AttentionError, match="another example"):
        recorded(INTERFACE["llama"].build(), site, packed(), ids=list(range(sum(map(len, DOCUMENTS)))))


@pytest.mark.parametrize("site", OF_WEIGHTS)
@pytest.mark.parametrize("name", ["bert", "mpnet", "multihead", "by_head"])
def test_tokens_that_see_pads_are_refused(recorded: Recorded, name: str, site: Any) -> None:
    """Full attention without a mask, while the recorder is told of pads: weights over the kept tokens would not be the model's."""
    pads = padding_mask("right")
    if name == "multihead":
        model, inputs = seeded(lambda: Multihead(batch_first=True)), {"query": random(BATCH, WIDTH, HIDDEN)}
    elif name == "by_head":  # each head has a window of its own, and pads are on the left
        hand, pads = BY_HAND["by_head"], padding_mask("left")
        model, inputs = hand.build(), {"input_ids": random_tokens(BATCH, WIDTH), "attention_mask": torch.ones(BATCH, WIDTH)}
    else:
        model, inputs = {**INTERFACE, **SOFTMAX}[name].build(), {"input_ids": random_tokens(BATCH, WIDTH)}
    warned = pytest.warns(UserWarning, match="padded on the left") if name == "by_head" else nullcontext()
    with pytest.raises(AttentionError, match="pads"), warned:
        recorded(model, site, inputs, mask=pads)


@pytest.mark.parametrize("site", ["attention", "weights"])
def test_pads_on_the_right_of_causal_attention_need_no_mask(recorded: Recorded, site: str) -> None:
    """No kept token sees them, whether the model is told of them or not; on the left all see them."""
    hand = BY_HAND["is_causal"]
    model, inputs = hand.build(), batch("right")
    check_by_hand(recorded(model, site, inputs), model, hand, inputs)
    with pytest.raises(AttentionError, match="pads"):
        recorded(model, site, inputs_of("left"))


def test_a_family_without_a_mask_is_causal_and_right_with_pads_on_the_right(recorded: Recorded) -> None:
    """Llama called without attention_mask, the recorder told of pads on the right."""
    family, mask = INTERFACE["llama"], padding_mask("right")
    inputs = {"input_ids": batch("right")["input_ids"]}
    run = recorded(family.build(), "attention", inputs, mask=mask)
    for path, weights in zip(family.sites(), attentions(family.build("eager"), inputs), strict=True):
        check(run, path, kept(weights, mask, mask))
    with pytest.raises(AttentionError, match="pads"):
        recorded(family.build(), "attention", inputs, mask=padding_mask("left"))


@pytest.mark.parametrize("mask", ["dilated", "4d"])
def test_four_dimensional_masks(recorded: Recorded, mask: str) -> None:
    """A mask [B, 1, T, T] that the user gives a transformers model: causal, or with holes, which stores the weights."""
    family, pads = INTERFACE["llama"], padding_mask("left")
    keep = BY_HAND["dilated" if mask == "dilated" else "bool"].mask_of(pads)
    assert keep is not None
    inputs = {"input_ids": batch("left")["input_ids"], "attention_mask": keep}
    run = recorded(family.build(), "attention", inputs, mask=pads)
    given = {**inputs, "attention_mask": torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)}
    for path, weights in zip(family.sites(), attentions(family.build("eager"), given), strict=True):
        check(run, path, kept(weights, pads, pads))
        assert run.attention(path).facts["stored"] == ("weights" if mask == "dilated" else "qk")


# --- weights, and what is computed from them ------------------------------------------------------------------------------------


def column_of(run: Run, path: str, suffix: str) -> Any:
    """The column of a path's weights, reduced or of some tokens."""
    return run[f"{path}:weights|{suffix}"]


def per_example(run: Run, path: str, count: int = BATCH) -> list[Matrix]:
    """Full matrices."""
    return [run.attention(path)[example] for example in range(count)]


FAMILIES = [
    pytest.param(INTERFACE["mistral"], id="mistral"),
    pytest.param(INTERFACE["gpt_oss"], id="gpt_oss"),
    pytest.param(INTERFACE["bart"], id="bart"),
    pytest.param(INTERFACE["segformer"], id="segformer"),
    pytest.param(SOFTMAX["bloom"], id="bloom"),
    pytest.param(SWIN, id="swin"),
]
REDUCTIONS: dict[str, tuple[Site, Callable[[Matrix], Matrix]]] = {
    "entropy": (Site("weights", reduce="entropy"), lambda a: -np.where(a > 0, a * np.log(np.where(a > 0, a, 1)), 0).sum(2).T),
    "received": (Site("weights", reduce="received"), lambda a: a.sum(1).T),
    "queries=-1": (Site("weights", queries=[-1]), lambda a: a[:, [-1]].transpose(2, 1, 0)),
    "queries=0,-1": (Site("weights", queries=[0, -1]), lambda a: a[:, [0, -1]].transpose(2, 1, 0)),
    "keys=0": (Site("weights", keys=[0]), lambda a: a[:, :, [0]].transpose(1, 2, 0)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_while_recording(recorded: Recorded, family: Family, name: str) -> None:
    """Entropy, received mass, and some rows or columns: what numpy makes of the full matrices, token by token."""
    site, of_matrix = REDUCTIONS[name]
    inputs = family.inputs("right")
    if family is SWIN and "=" in name:
        with pytest.raises(InstrumentError, match="windows"):
            recorded(family.build(), site, inputs)
        return
    run, full = (recorded(family.build(), chosen, inputs) for chosen in (site, "attention"))
    for path in family.sites():
        for example, matrix in enumerate(per_example(full, path)):
            found = np.asarray(column_of(run, path, name)[example], np.float32)
            np.testing.assert_allclose(found, of_matrix(matrix), atol=2 * CLOSE, err_msg=f"{path} of example {example}")


SEGMENTS = [np.array([0, 1, 1, -1, 2, 2, 0])[:length] for length in LENGTHS]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "bert", "bloom"])
def test_flow_between_segments(recorded: Recorded, name: str, side: str) -> None:
    """Mass from key segments to query segments, [head, query segment, key segment]; tokens of segment -1 count nowhere."""
    family = {**INTERFACE, **SOFTMAX}[name]
    inputs, labels = family.inputs(side), {"token/segment": SEGMENTS}
    run = recorded(family.build(), Site("weights", reduce="flow", segments=3), inputs, labels=labels)
    full = recorded(family.build(), "attention", inputs)
    for path in family.sites():
        for example, matrix in enumerate(per_example(full, path)):
            hot = SEGMENTS[example][:, None] == np.arange(3)
            expected = np.einsum("hij,ik,jl->hkl", matrix, hot, hot)
            np.testing.assert_allclose(column_of(run, path, "flow")[example], expected, atol=2 * CLOSE)
    assert np.concatenate(SEGMENTS).tolist() == np.asarray(run["token/segment"].rows(slice(None))).tolist()


def test_flow_of_cross_attention_is_not_made_up(recorded: Recorded) -> None:
    """Segments are those of one stream: where keys are of another, though as many, there is no flow between them."""
    family = INTERFACE["bart"]
    inner = batch("right", 1)
    inputs = {**batch("right"), "decoder_input_ids": inner["input_ids"], "decoder_attention_mask": inner["attention_mask"]}
    with pytest.raises(InstrumentError, match="flow"):
        recorded(family.build(), Site("weights", reduce="flow", segments=3), inputs, labels={"token/segment": SEGMENTS})


def test_flow_of_an_encoder_beside_a_decoder(recorded: Recorded) -> None:
    """Sites of the stream that the segments are of can be selected."""
    family, site = INTERFACE["bart"], Site("encoder.weights", reduce="flow", segments=3)
    run = recorded(family.build(), site, family.inputs("right"), labels={"token/segment": SEGMENTS})
    assert len(run.sites) == 3
    with pytest.raises(InstrumentError, match="token/segment"):
        recorded(family.build(), site, family.inputs("right"))


def test_tokens_that_an_example_has_not(recorded: Recorded) -> None:
    """An error that says which token was asked for and how many there are."""
    with pytest.raises((InstrumentError, IndexError), match="token 3 was asked for, but an example has 3"):
        recorded(INTERFACE["llama"].build(), Site("weights", queries=[3]), batch("right"))


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_weights_are_rebuilt_weights(recorded: Recorded, family: Family) -> None:
    """`weights`, `attention` with store='weights', and both at once: one and the same matrices."""
    inputs = family.inputs("right")
    rebuilt = recorded(family.build(), "attention", inputs)
    for sites in ("weights", Site("attention", store="weights"), ["weights", "attention"]):
        run = recorded(family.build(), sites, inputs)
        assert sorted(run.attention_sites) == sorted(family.sites())
        for path in family.sites():
            check(run, path, per_example(rebuilt, path))


@pytest.mark.parametrize(("width", "stored"), [(13, "weights"), (15, "qk"), (17, "qk")])
def test_what_takes_fewer_bytes_is_stored(recorded: Recorded, width: int, stored: str) -> None:
    """Llama with 6 heads over 3 of 10 features: q and k are smaller from T = d (H + Hkv) / H = 15 on."""
    family, inputs = INTERFACE["llama"], {"input_ids": random_tokens(BATCH, width)}
    run = recorded(family.build(), Site("attention", store="auto"), inputs)
    for path, weights in zip(family.sites(), attentions(family.build("eager"), inputs), strict=True):
        assert run.attention(path).facts["stored"] == stored
        check(run, path, kept(weights, None, None))


def test_what_is_stored_is_decided_once(make: Make, opened: Opened) -> None:
    """Batches of another width, on the other side of the crossover, are stored like the first."""
    family = INTERFACE["llama"]
    model = family.build()
    recorder = make(model, Site("attention", store="auto"))
    batches = [{"input_ids": random_tokens(BATCH, width, width)} for width in (13, 19, 3)]
    for number, inputs in enumerate(batches):
        with torch.no_grad(), recorder.batch(ids=[BATCH * number + row for row in range(BATCH)]):
            model(**inputs)
    run = opened(recorder)
    assert {run.attention(path).facts["stored"] for path in run.attention_sites} == {"weights"}
    for number, inputs in enumerate(batches):
        for path, weights in zip(family.sites(), attentions(family.build("eager"), inputs), strict=True):
            check(run, path, kept(weights, None, None), BATCH * number)


CHOICES: list[Any] = [None, 0, -1, [1], [2, 0], slice(None, None, 2), np.array([0, 2]), slice(5, 5)]


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[1], FAMILIES[2], FAMILIES[4], FAMILIES[5]])
def test_slices_are_those_of_the_whole(recorded: Recorded, family: Family) -> None:
    """heads=, queries= and keys= of a rebuilt, a biased, a stored and a windowed matrix; a single number keeps its axis."""
    run = recorded(family.build(), "attention", family.inputs("right"))
    path, example = family.sites()[-1], 0
    whole = run.attention(path)[example]
    for axis, name in enumerate(("heads", "queries", "keys")):
        for chosen in CHOICES:
            if axis == 0 and whole.shape[0] < 3 and np.ndim(chosen) and max(chosen) > 1:
                continue
            if axis == 1 and whole.shape[1] < 3:
                continue
            expected = np.take(whole, np.atleast_1d(np.arange(whole.shape[axis])[() if chosen is None else chosen].ravel()), axis)
            found = run.attention(path, **{name: chosen})[example]
            assert found.shape == expected.shape, (name, chosen)
            np.testing.assert_allclose(found, expected, atol=1e-6)
    part = run.attention(path, heads=[1, 0], queries=slice(1, None), keys=-1)[example]
    np.testing.assert_allclose(part, whole[[1, 0]][:, 1:, -1:], atol=1e-6)
    for name, count in zip(("heads", "queries", "keys"), whole.shape, strict=True):
        with pytest.raises(IndexError, match=f"{name}={count}|{name}=.{count}.|{name}"):
            run.attention(path, **{name: count})[example]


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_are_pieces_of_the_whole(recorded: Recorded, family: Family) -> None:
    """However few queries fit a tile, together they are the matrix."""
    run = recorded(family.build(), "attention", family.inputs("right"))
    attention = run.attention(family.sites()[0])
    for example in range(BATCH):
        numbers, tiles = zip(*attention.tiles(example, tile_bytes=1), strict=True)
        assert np.concatenate(numbers).tolist() == list(range(attention[example].shape[1]))
        assert {tile.shape[1] for tile in tiles} == {1}
        np.testing.assert_allclose(np.concatenate(tiles, 1), attention[example], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_dtypes(recorded: Recorded, dtype: str) -> None:
    """Queries and keys, or weights, may be stored in a dtype of their own; the matrix is float32."""
    family, inputs = INTERFACE["gpt_oss"], batch("right")
    expected = attentions(family.build("eager"), inputs)[1]
    for site in (Site("attention", dtype=dtype), Site("weights", dtype=dtype)):
        run = recorded(family.build(), site, inputs)
        ports = [column for column in run.sites if column.site["port"] in ("q", "k", "weights") and not column.site["reduce"]]
        assert {str(column.dtype) for column in ports} == {dtype}
        for example, one in enumerate(kept(expected, *[inputs["attention_mask"]] * 2)):
            found = run.attention(1)[example]
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, one, atol={"float16": 5e-3, "bfloat16": 5e-2, "float32": CLOSE}[dtype])


@pytest.mark.parametrize("name", ["gpt_oss", "t5", "llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_models_of_other_dtypes(recorded: Recorded, name: str, dtype: torch.dtype) -> None:
    """Rebuilt from what was stored, as near to the weights that are stored themselves as float32 and rounding allow."""
    family = INTERFACE[name]
    inputs = family.inputs("right")
    run, stored = (recorded(family.build(dtype=dtype), site, inputs) for site in ("attention", "weights"))
    for path in family.sites():
        for example in range(BATCH):
            found, expected = run.attention(path)[example], stored.attention(path)[example]
            assert found.dtype == expected.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=4e-3 if dtype.itemsize == 2 else 1e-6)


def test_parts_of_attention(recorded: Recorded) -> None:
    """q, k, v and z on their own: z is the weights times v of each head's group, and q and k give the weights."""
    inputs, family = batch("left"), INTERFACE["llama"]
    run = recorded(family.build(), [f"layers.1.self_attn:{port}" for port in "qkvz"], inputs)
    full = recorded(family.build(), "attention[1]", inputs)
    assert run.attention_sites == ["layers.1.self_attn"]
    for example, length in enumerate(LENGTHS):
        q, k, v, z = (run[f"layers.1.self_attn:{port}"][example] for port in "qkvz")
        assert (q.shape, k.shape, v.shape, z.shape) == ((length, 6, 10), (length, 3, 10), (length, 3, 10), (length, 6, 10))
        weights = full.attention(1)[example]
        np.testing.assert_allclose(np.einsum("hij,jhd->ihd", weights, np.repeat(v, 2, 1)), z, atol=CLOSE)


# --- the softmax itself ---------------------------------------------------------------------------------------------------------

Case = dict[str, Any]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Queries [H, R, d] and keys [Hkv, K, d] with any of the facts."""
    groups, group, queries, keys, size = (draw(st.integers(1, most)) for most in (3, 3, 6, 7, 5))
    rng = np.random.default_rng(draw(seeds))
    heads, dtype = groups * group, draw(st.sampled_from(["float32", "float64"]))
    found: Case = {
        "q": (3 * rng.standard_normal((heads, queries, size))).astype(dtype),
        "k": (3 * rng.standard_normal((groups, keys, size))).astype(dtype),
        "scale": draw(st.floats(0.05, 2)),
        "softcap": draw(st.none() | st.floats(0.5, 60)),
    }
    shape = (draw(st.sampled_from([1, heads])), queries, keys)
    if draw(st.booleans()):
        found["bias"] = rng.standard_normal(shape).astype("float32")
    if draw(st.booleans()):
        found["keep"] = rng.random(shape) < draw(st.sampled_from([0.2, 0.8]))
    if draw(st.booleans()):
        found["sinks"] = rng.standard_normal(heads).astype("float32")
    return found


def in_torch(case: Case) -> Case:
    """Arrays as tensors."""
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in case.items()}


def plain(q: Tensor, k: Tensor, scale: float, softcap: float | None, **options: Tensor) -> Matrix:
    """Head by head, query by query."""
    heads, queries, keys = len(q), q.shape[1], k.shape[1]
    bias, keep = options.get("bias", torch.zeros(1, 1, 1)), options.get("keep", torch.ones(1, 1, 1).bool())
    bias, keep = (tensor.expand(heads, queries, keys) for tensor in (bias, keep))
    found = torch.zeros(heads, queries, keys, dtype=torch.float64)
    for head in range(heads):
        for query in range(queries):
            scores = k[head // (heads // len(k))].double() @ q[head, query].double() * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            scores = torch.where(keep[head, query], scores + bias[head, query].double(), -torch.inf)
            sink = [options["sinks"][head].double()[None]] if "sinks" in options else []
            found[head, query] = torch.softmax(torch.cat([scores, *sink]), 0)[:keys]
    return found.numpy()


@settings(deadline=None, max_examples=200)
@given(cases())
def test_numpy_and_torch_agree_with_a_plain_softmax(case: Case) -> None:
    """Groups, masks, biases, sinks and softcaps; a query that sees nothing is NaN, or 0 where there is a sink."""
    expected = plain(**in_torch(case))
    by_numpy, by_torch = weights_numpy.weights(**case), weights_torch.weights(**in_torch(case)).numpy()
    assert by_numpy.dtype == by_torch.dtype == case["q"].dtype
    tolerance = 1e-5 if case["q"].dtype == np.float32 else 1e-6
    for found in (by_numpy, by_torch):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert not np.isnan(expected).any() or "sinks" not in case
