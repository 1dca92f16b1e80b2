"""Label words isolated, re-weighted and compressed to, against eager copies of the model that are told the same by plain means."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from gradient_models import gpt_neo
from tiny_models import _ROTARY as ROTARY
from tiny_models import LAYERS, VOCABULARY, albert, batch, batch_with_positions, gpt2, llama_lm, seeded, t5_lm
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from tensortape.instrument import Recorder
from tensortape.instrument.anchors import AnchorWeights, Prompt, answers, compress, isolated, label_loyalty, word_loyalty
from tensortape.instrument.anchors.compression import from_cache, from_text, only
from tensortape.instrument.errors import AttentionError, BatchError, CompiledModelError, UnsupportedModelError
from tensortape.stores import Run

NEAR = 1e-4
MASKED = torch.finfo(torch.float32).min


def mistral() -> Any:
    return seeded(lambda: MistralForCausalLM(MistralConfig(**ROTARY, sliding_window=3)))


def gemma2() -> Any:
    sizes = {**ROTARY, "head_dim": 26}
    return seeded(lambda: Gemma2ForCausalLM(Gemma2Config(**sizes, sliding_window=5, attn_logit_softcapping=5.0)))


MODELS: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "llama": llama_lm, "mistral": mistral, "gemma2": gemma2}


def inputs_of(name: str, side: str) -> dict[str, Tensor]:
    return batch_with_positions(side) if name == "gpt2" else batch(side)


def label_positions(inputs: dict[str, Tensor]) -> list[list[int]]:
    """Two positions of every row that has as many tokens, one of them the last; none of a row with one token."""
    found = []
    for mask in inputs["attention_mask"]:
        real = mask.nonzero()[:, 0].tolist()
        found.append([real[len(real) // 2], real[-1]] if len(real) > 1 else [])
    return found


def eager_copy(model: Any) -> Any:
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    return copied


@contextmanager
def cut_by_mask(model: Any, positions: list[list[int]], layers: Sequence[int]) -> Iterator[None]:
    """The attention modules of some layers are given masks with the cut in them, by hooks of the test's own."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask = kwargs["attention_mask"].clone().expand(len(positions), -1, -1, -1).clone()
        for row, chosen in enumerate(positions):
            for position in chosen:
                mask[row, :, position, :position] = MASKED
        return args, {**kwargs, "attention_mask": mask}

    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    modules = [getattr(blocks[layer], "attn", None) or blocks[layer].self_attn for layer in layers]
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    yield
    for handle in handles:
        handle.remove()


# --- isolation -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[0], [1, 2], None], ids=["first", "last", "all"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_isolation_is_a_mask(name: str, side: str, layers: list[int] | None) -> None:
    """Logits are those of an eager copy with a mask for each layer; and they are not those of the model as it is."""
    model, inputs = MODELS[name](), inputs_of(name, side)
    positions = label_positions(inputs)
    copied = eager_copy(model)
    real = inputs["attention_mask"] != 0
    with torch.no_grad():
        with cut_by_mask(copied, positions, range(LAYERS) if layers is None else layers):
            wanted = copied(**inputs, use_cache=False).logits[real]
        with isolated(model, positions, layers):
            found = model(**inputs, use_cache=False).logits[real]
        plain = model(**inputs, use_cache=False).logits[real]
    size = wanted.abs().max()
    assert (found - wanted).abs().max() <= NEAR * size
    assert (found - plain).abs().max() > 100 * NEAR * size


def test_gradients_go_through_isolated_rows() -> None:
    """What is computed anew is part of the graph."""
    model, inputs = llama_lm(), batch()
    positions, copied = label_positions(inputs), eager_copy(llama_lm())
    with cut_by_mask(copied, positions, [1]):
        copied(**inputs).logits.square().mean().backward()
    with isolated(model, positions, [1]):
        model(**inputs).logits.square().mean().backward()
    for name, parameter in copied.named_parameters():
        found = model.get_parameter(name).grad
        assert (found - parameter.grad).abs().max() <= NEAR * parameter.grad.abs().max(), name


def test_the_first_token_has_nothing_to_lose() -> None:
    model, inputs = gpt2(), {"input_ids": batch()["input_ids"]}
    with torch.no_grad(), isolated(model, [[0]] * len(inputs["input_ids"])):
        found = model(**inputs).logits
    assert torch.allclose(found, model(**inputs).logits, atol=1e-5)


def test_nothing_is_left_behind() -> None:
    """After the block, also after one that raised, the model gives what it gave before, bit for bit."""
    model, inputs = llama_lm(), batch()
    before = model(**inputs).logits
    with isolated(model, label_positions(inputs)):
        model(**inputs)
    with pytest.raises(KeyError), isolated(model, label_positions(inputs)):
        raise KeyError
    assert torch.equal(model(**inputs).logits, before)


def test_negative_layers_count_from_the_end() -> None:
    model, inputs = llama_lm(), batch()
    positions = label_positions(inputs)
    with isolated(model, positions, [-1]):
        last = model(**inputs).logits
    with isolated(model, positions, [LAYERS - 1]):
        assert torch.equal(model(**inputs).logits, last)
    with pytest.raises(ValueError, match="layer 3 of a model with 3"), isolated(model, positions, [3]):
        pass


def test_no_forward_is_an_error() -> None:
    with pytest.raises(AttentionError, match=r"layers \[0, 1, 2\] called no attention"), isolated(llama_lm(), [[1]]):
        pass


def test_models_that_cannot_be_edited() -> None:
    """Two stacks, shared blocks, attention of their own, compiled: each says so."""
    for model, message in ((t5_lm(), "2 stacks"), (albert(), "1 different blocks in 3 layers")):
        with pytest.raises(UnsupportedModelError, match=message), isolated(model, [[1]]):
            pass
    neo = gpt_neo()
    with pytest.raises(AttentionError, match="called no attention function"), isolated(neo, [[1]] * 5):
        neo(**batch_with_positions())
    with pytest.raises(CompiledModelError), isolated(torch.compile(llama_lm(), backend="eager"), [[1]]):
        pass


def test_calls_that_cannot_be_edited() -> None:
    """Positions outside the batch, a filled cache, active dropout."""
    model, inputs = llama_lm(), batch()
    for positions in ([[1]], [[7]] * 5, [[-1]] * 5):
        with pytest.raises(BatchError, match="5 rows of 7 tokens"), isolated(model, positions):
            model(**inputs)
    filled = model(input_ids=inputs["input_ids"][:, :3], use_cache=True).past_key_values
    with pytest.raises(AttentionError, match="2 queries to 5 keys"), isolated(model, [[1]] * 5):
        model(input_ids=inputs["input_ids"][:, 3:5], past_key_values=filled)
    dropping = gpt2(attn_pdrop=0.3).train()
    with pytest.raises(AttentionError, match="eval mode"), isolated(dropping, [[1]] * 5):
        dropping(**batch_with_positions())


# --- re-weighting --------------------------------------------------------------------------------------------------------------


@contextmanager
def weighed(model: Any, beta: Tensor, labels: Sequence[Sequence[int]], targets: Sequence[int]) -> Iterator[None]:
    """The softmax of an eager model, one call per layer, with exp(beta) on its results."""
    softmax, calls = functional.softmax, []

    def shown(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights = softmax(scores, *args, **kwargs)
        factor = torch.ones_like(weights)
        for row, (chosen, target) in enumerate(zip(labels, targets, strict=True)):
            for number, position in enumerate(chosen):
                factor[row, :, target, position] = beta[len(calls), :, number].exp()
        calls.append(scores)
        return weights * factor

    with mock.patch.object(functional, "softmax", shown):
        yield
    assert len(calls) == LAYERS


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_reweighting_multiplies_weights(name: str) -> None:
    """Logits, and the gradient of beta through all layers, are those of an eager copy."""
    model, tokens = MODELS[name](), batch(seed=3)["input_ids"]
    labels, targets = [[1, 3], [0, 2], [2, 4], [1, 2], [0, 5]], [6, 5, 6, 4, 6]
    anchors = AnchorWeights.of(model, 2)
    beta = torch.randn(anchors.beta.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        anchors.beta.copy_(beta)
    with anchors.applied(model, labels, targets):
        found = model(input_ids=tokens, use_cache=False).logits
    beta.requires_grad_()
    copied = eager_copy(model)
    with weighed(copied, beta, labels, targets):
        wanted = copied(input_ids=tokens, use_cache=False).logits
    assert (found - wanted).abs().max() <= NEAR * wanted.abs().max()
    for logits in (found, wanted):
        logits[range(5), targets, 7].sum().backward()
    assert beta.grad is not None
    assert anchors.beta.grad is not None
    assert (anchors.beta.grad - beta.grad).abs().max() <= NEAR * beta.grad.abs().max()


def test_no_beta_changes_nothing() -> None:
    model, tokens = llama_lm(), batch()["input_ids"]
    with torch.no_grad(), AnchorWeights.of(model, 1).applied(model, [[1]] * 5, [4] * 5):
        found = model(input_ids=tokens).logits
    assert torch.allclose(found, model(input_ids=tokens).logits, atol=1e-5)


def test_learning_beta_leaves_the_model_alone() -> None:
    """The loss falls; no parameter changes, and none gets a gradient. The same seed learns the same."""
    model, given = llama_lm(), prompts(7)
    before = copy.deepcopy(model.state_dict())
    learnt = []
    for _ in range(2):
        anchors = AnchorWeights.of(model, 3)
        losses = anchors.fit(model, given, [number % 2 for number in range(7)], [5, 6], epochs=5, rate=0.1, seed=1)
        learnt.append(anchors.beta.detach())
        assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(*learnt)
    assert learnt[0].shape == (LAYERS, 2, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_need_their_label_words() -> None:
    anchors = AnchorWeights(LAYERS, 2, 2)
    with pytest.raises(BatchError, match="2 label words"), anchors.applied(llama_lm(), [[1]], [4]):
        pass


# --- compression ---------------------------------------------------------------------------------------------------------------


def prompts(count: int, seed: int = 0, length: int = 4) -> list[Prompt]:
    """Three demonstrations of `text text label newline`, more text in some prompts, and a query of three tokens."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        size = length + number % 2
        spans = tuple((start * size, (start + 1) * size) for start in range(3))
        tokens = tuple(torch.randint(3, VOCABULARY, (3 * size + 3,), generator=draw).tolist())
        found.append(Prompt(tokens, spans, tuple(last - 2 for _, last in spans), tuple(last - 1 for _, last in spans)))
    return found


def masked_to(model: Any, tokens: Tensor, context: int, kept: Tensor) -> Tensor:
    """Logits of the last token where queries of the query see no token of the context but the kept ones; an eager copy."""
    width = tokens.shape[1]
    mask = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(tokens), 1, 1)
    for row, chosen in enumerate(kept.tolist()):
        mask[row, context:, [column for column in range(context) if column not in chosen]] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, MASKED)[:, None]
    return eager_copy(model)(input_ids=tokens, attention_mask=added, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_anchors_in_the_cache_are_the_only_keys_that_are_seen(name: str) -> None:
    """Two references: a mask over the whole prompt, and a cache sliced by hand."""
    model = MODELS[name]()
    given = prompts(5)[::2]
    tokens, context = torch.tensor([prompt.tokens for prompt in given]), given[0].context
    kept = torch.tensor([[0, 2, 7], [1, 2, 3], [5, 9, 11]])
    with torch.no_grad():
        found, _ = from_cache(model, tokens, context, kept)
        wanted = masked_to(model, tokens, context, kept)
        assert (found - wanted).abs().max() <= NEAR * wanted.abs().max()
        for row, at in enumerate(kept.tolist()):
            whole = model(input_ids=tokens[row : row + 1, :context], use_cache=True).past_key_values
            sliced = DynamicCache([(layer.keys[:, :, at], layer.values[:, :, at]) for layer in whole.layers])
            places = torch.arange(context, tokens.shape[1])[None]
            query = tokens[row : row + 1, context:]
            by_hand = model(input_ids=query, past_key_values=sliced, position_ids=places).logits[0, -1]
            assert (found[row] - by_hand).abs().max() <= NEAR * by_hand.abs().max()
        whole_prompt = model(input_ids=tokens).logits[:, -1]
    assert (found - whole_prompt).abs().max() > 100 * NEAR


def test_text_anchors_are_a_prompt_of_their_own() -> None:
    model, prompt = llama_lm(), prompts(1)[0]
    tokens = torch.tensor([prompt.tokens])
    short = [prompt.tokens[position] for position in (*prompt.anchors, *range(12, 15))]
    with torch.no_grad():
        found, _ = from_text(model, tokens, 12, torch.tensor([prompt.anchors]))
        assert torch.equal(found, model(input_ids=torch.tensor([short]), use_cache=False).logits[:, -1])


def test_compress_scores_every_method() -> None:
    """Loyalties and accuracy are those of answers given one prompt at a time by the references above, whatever the batch."""
    model, given, tokens = llama_lm(), prompts(9), [5, 6, 7]
    gold = [number % 3 for number in range(9)]
    rows = compress(model, given, tokens, gold=gold, draws=3, seed=4, batch_size=2)
    assert [(row.method, row.draw) for row in rows] == [
        ("full", 0),
        ("hidden_anchor", 0),
        ("text_anchor", 0),
        *(("hidden_random", draw) for draw in range(3)),
    ]
    with torch.no_grad():
        whole = [model(input_ids=torch.tensor([one.tokens])).logits[0, -1] for one in given]
        anchors = [masked_to(model, torch.tensor([one.tokens]), one.context, torch.tensor([one.anchors]))[0] for one in given]
    same, words, right = [], [], []
    for full, found, label in zip(whole, anchors, gold, strict=True):
        one, other = (set(logits.topk(5).indices.tolist()) for logits in (full, found))
        same.append(full[tokens].argmax() == found[tokens].argmax())
        words.append(len(one & other) / len(one | other))
        right.append(int(found[tokens].argmax()) == label)
    assert rows[1].label_loyalty == pytest.approx(sum(same) / 9)
    assert rows[1].word_loyalty == pytest.approx(sum(words) / 9)
    assert rows[1].accuracy == pytest.approx(sum(right) / 9)
    assert rows[1].kept == pytest.approx(sum(6 for _ in given) / sum(one.context for one in given))
    assert (rows[0].label_loyalty, rows[0].word_loyalty, rows[0].kept, rows[0].speed_up) == (1, 1, 1, 1)
    assert {row.kept for row in rows[1:]} == {rows[1].kept}
    again = compress(model, given, tokens, gold=gold, draws=3, seed=4, batch_size=7)
    assert [(row.label_loyalty, row.word_loyalty) for row in again] == [(row.label_loyalty, row.word_loyalty) for row in rows]


def test_random_draws_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draw keeps the format tokens and one other token of each demonstration, and no draw what an earlier one kept."""
    from tensortape.instrument.anchors import compression

    seen: list[list[list[int]]] = []
    original = compression.from_cache

    def shown(model: nn.Module, tokens: Tensor, context: int, kept: Tensor) -> Any:
        seen.append(kept.tolist())
        return original(model, tokens, context, kept)

    monkeypatch.setattr(compression, "from_cache", shown)
    [prompt] = prompts(1, length=9)
    compress(llama_lm(), [prompt], [5, 6], methods=["hidden_random"], draws=17)
    drawn = [tuple(sorted(set(kept[0]) - set(prompt.format))) for kept in seen]
    assert len(seen) == 17
    assert all(set(kept[0]) > set(prompt.format) for kept in seen)
    assert all(
        first < position < last - 2
        for kept in drawn
        for position, (first, last) in zip(kept, ((-1, 9), (8, 18), (17, 27)), strict=True)
    )
    assert len(set(drawn)) > 12


def test_caches_and_prompts_that_do_not_fit() -> None:
    """A sliding window's cache, a demonstration of anchors alone, prompts without sense."""
    sliding = mistral()
    with pytest.raises(UnsupportedModelError, match="DynamicSlidingWindowLayer"):
        compress(sliding, prompts(1), [5, 6])
    with pytest.raises(UnsupportedModelError, match="NoneType"):
        only(None, torch.tensor([[1]]))
    bare = Prompt((3, 4, 5, 6), ((0, 2),), (0,), (1,))
    with pytest.raises(BatchError, match="no other token"):
        compress(llama_lm(), [bare], [5, 6])
    with pytest.raises(BatchError, match="methods among"):
        compress(llama_lm(), [bare], [5, 6], methods=["hidden"])
    for arguments in (((3, 4), ((0, 2),), (0,)), ((3, 4, 5), ((0, 2),), (2,)), ((3, 4, 5), ((0, 2), (1, 2)), (0, 1))):
        with pytest.raises(BatchError):
            Prompt(*arguments)
    with pytest.raises(BatchError, match="format tokens"):
        Prompt((3, 4, 5), ((0, 2),), (0,), (0,))


def test_loyalty_is_counting() -> None:
    """By Python's sets."""
    one, other = (torch.randn(11, 13, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found, original = answers(one, [3, 8, 9], top=4), answers(other, [3, 8, 9], top=4)
    same = [a[[3, 8, 9]].argmax() == b[[3, 8, 9]].argmax() for a, b in zip(one, other, strict=True)]
    tops = [(set(a.topk(4).indices.tolist()), set(b.topk(4).indices.tolist())) for a, b in zip(one, other, strict=True)]
    assert label_loyalty(found, original) == pytest.approx(sum(map(bool, same)) / 11)
    assert word_loyalty(found, original) == pytest.approx(sum(len(a & b) / len(a | b) for a, b in tops) / 11)
    assert label_loyalty(original, original) == word_loyalty(original, original) == 1
    with pytest.raises(BatchError):
        label_loyalty(found, answers(one[:3], [3, 8, 9]))


def test_what_is_recorded_meanwhile_is_what_was_changed(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """Hidden states are those of the changed model; attention is refused, for queries and keys do not explain changed outputs."""
    model, inputs = llama_lm(), batch()
    positions = label_positions(inputs)
    recorder = make(model, "resid_post[1]")
    with torch.no_grad(), isolated(model, positions, [0]), recorder.batch(ids=list(range(5))):
        changed = model(**inputs, output_hidden_states=True).hidden_states[2]
    plain = model(**inputs, output_hidden_states=True).hidden_states[2]
    assert (changed - plain).abs().max() > 1e-2
    assert np.array_equal(opened(recorder)["resid_post[1]"][0], changed[0].numpy())
    refusing = make(model, "attention")
    with pytest.raises(AttentionError, match="cannot be rebuilt"), isolated(model, positions), refusing.batch(ids=list(range(5))):
        model(**inputs)
