"""generate() and loops with a cache: the rows of all forwards are those of one forward over the whole text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradient_models import IDS, apart, build, eager, per_example
from tiny_models import (
    BATCH,
    HIDDEN,
    LENGTHS,
    PAD,
    VOCABULARY,
    bart,
    batch,
    gpt2,
    hook_count,
    llama_lm,
    observed,
    padding_mask,
    random_tokens,
    sdpa_decoder,
    seeded,
    t5_lm,
)
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from tensortape.instrument import Recorder
from tensortape.instrument.errors import AttentionError, BatchError, ForwardError, InstrumentError
from tensortape.stores import Run

Make = Callable[..., Recorder]
Opened = Callable[[Recorder], Run]
NEW = 32
NEAR = 1e-6
EOS = 2
MASK = padding_mask("left")


def mistral(window: int = 4) -> Any:
    """Mistral that sees four positions back."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 53, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": window}
    special = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": EOS}
    return seeded(lambda: MistralForCausalLM(MistralConfig(**sizes, **heads, **special)))


def small_bart() -> Any:
    """BART with its head."""
    config = BartConfig(**{**bart().config.to_diff_dict(), "max_position_embeddings": 61, "architectures": None})
    return seeded(lambda: BartForConditionalGeneration(config))


MODELS: dict[str, Callable[[], Any]] = {"gpt2": lambda: gpt2(n_positions=64), "llama": llama_lm, "mistral": mistral}
BLOCKS = {"gpt2": "transformer.h.1", "llama": "model.layers.1", "mistral": "model.layers.1"}
ATTENTION = {"gpt2": "transformer.h.1.attn", "llama": "model.layers.1.self_attn", "mistral": "model.layers.1.self_attn"}


class Ends(LogitsProcessor):
    """Lets some rows end at a step of their own, and no other row ever; steps are counted from 0."""

    def __init__(self, prompt: int, ends: dict[int, int], eos: int = EOS) -> None:
        self.prompt, self.ends, self.eos = prompt, ends, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, vocabulary] scores, of which some are set."""
        scores[:, self.eos] = -torch.inf
        for row, step in self.ends.items():
            if input_ids.shape[1] - self.prompt == step:
                scores[row] = -torch.inf
                scores[row, self.eos] = 0.0
        return scores


def generated(model: Any, inputs: dict[str, Tensor], ends: dict[int, int] | None = None, **options: Any) -> Tensor:
    """Greedy text of 32 new tokens."""
    processors = [Ends(options.pop("prompt", inputs["input_ids"].shape[1]), ends or {}, options.get("eos_token_id") or EOS)]
    found: Tensor = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, logits_processor=processors, **options)
    return found


def texts_of(tokens: Tensor, mask: Tensor, ends: dict[int, int] | None = None) -> list[Tensor]:
    """For each row the tokens that the model was fed, [1, T_i]: the prompt without pads, and all new ones but the last."""
    width, found = mask.shape[1], []
    for row in range(len(tokens)):
        last = (ends or {}).get(row, NEW - 2)  # the step of the last new token that was fed
        prompt = tokens[row, :width][mask[row] != 0]
        found.append(torch.cat([prompt, tokens[row, width : width + last + 1]])[None])
    return found


def check_text(run: Run, number: int, model: nn.Module, name: str, text: Tensor) -> None:
    """One example's rows are those of one forward over its text."""
    block, attention = BLOCKS[name], ATTENTION[name]
    states = observed(model, {"input_ids": text}, {block})[block][0][1][0].numpy()
    assert apart([run[f"{block}:out"][number]], [states]) < NEAR
    weights = eager(model, lambda copied: no_grad(copied, input_ids=text))[attention][0][0][0].numpy()
    assert np.abs(run.attention(attention)[number] - weights).max() < NEAR
    assert run["token/input_ids"][number].tolist() == text[0].tolist()
    assert run["token/position"][number].tolist() == list(range(text.shape[1]))


def no_grad(model: nn.Module, **inputs: Any) -> None:
    """One forward without a cache."""
    with torch.no_grad():
        model(**inputs, use_cache=False)


# --- generate ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["attention", "weights"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", list(MODELS))
def test_generating_is_one_forward_over_the_whole_text(name: str, cache: str, store: str, make: Make, opened: Opened) -> None:
    """Prompts of several lengths, padded on the left; 32 tokens: hidden states, queries and keys, probabilities, weights."""
    model, inputs = MODELS[name](), batch("left")
    recorder = make(model, ["resid_post", store])
    options = {"cache_implementation": "static"} if cache == "static" else {}
    with recorder.batch(ids=IDS, forwards="generate"):
        tokens = generated(model, inputs, **options)
    assert torch.equal(tokens, generated(MODELS[name](), inputs, **options))
    run = opened(recorder)
    assert run.tables["token"].lengths.tolist() == [length + NEW - 1 for length in LENGTHS]
    for number, text in enumerate(texts_of(tokens, MASK)):
        check_text(run, number, MODELS[name](), name, text)
    assert hook_count(model) == 0


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", list(MODELS))
def test_queries_and_keys_of_generated_tokens(name: str, cache: str, make: Make, opened: Opened) -> None:
    """Each token's query and key are stored once, as one forward gives them."""
    model, inputs = MODELS[name](), batch("left")
    recorder = make(model, "attention")
    options = {"cache_implementation": "static"} if cache == "static" else {}
    with recorder.batch(ids=IDS, forwards="generate"):
        tokens = generated(model, inputs, **options)
    run = opened(recorder)
    for number, text in enumerate(texts_of(tokens, MASK)):
        whole = make(MODELS[name](), "attention")
        with torch.no_grad(), whole.batch(ids=["x"]):
            whole._model(input_ids=text, use_cache=False)
        other = opened(whole)
        for port in ("q", "k"):
            site = f"{ATTENTION[name]}:{port}"
            assert apart([run[site][number]], [other[site][0]]) < NEAR
        assert np.array_equal(run[f"{ATTENTION[name]}:keys"][number], other[f"{ATTENTION[name]}:keys"][0])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", list(MODELS))
def test_an_example_that_ends_early(name: str, cache: str, make: Make, opened: Opened) -> None:
    """What generate() feeds a row after its end is no token of it; its end itself is, once it has been fed."""
    ends = {1: 4, 3: 0}
    model, inputs = MODELS[name](), batch("left")
    recorder = make(model, ["resid_post", "attention"])
    options = {"cache_implementation": "static"} if cache == "static" else {}
    with recorder.batch(ids=IDS, forwards="generate"):
        tokens = generated(model, inputs, ends, **options)
    run, texts = opened(recorder), texts_of(tokens, MASK, ends)
    assert [int(texts[row][0, -1]) for row in ends] == [EOS, EOS]
    for number, text in enumerate(texts):
        check_text(run, number, MODELS[name](), name, text)


def test_an_end_that_only_generate_is_told(make: Make, opened: Opened) -> None:
    """generate(eos_token_id=...) is not seen by the recorder, so it is told the same."""
    ends = {1: 4}
    model, inputs = MODELS["llama"](), batch("left")
    recorder = make(model, "resid_post")
    with recorder.batch(ids=IDS, forwards="generate", ends=90):
        tokens = generated(model, inputs, ends, eos_token_id=90)
    run = opened(recorder)
    for number, text in enumerate(texts_of(tokens, MASK, ends)):
        assert run["token/input_ids"][number].tolist() == text[0].tolist()


def test_an_end_among_the_tokens_of_the_prompt(make: Make, opened: Opened) -> None:
    """A prompt may hold the token that ends a text; the row goes on."""
    model, inputs = MODELS["llama"](), batch("left")
    inputs["input_ids"][0, 3] = EOS
    recorder = make(model, "resid_post")
    with recorder.batch(ids=IDS, forwards="generate"):
        tokens = generated(model, inputs)
    run = opened(recorder)
    for number, text in enumerate(texts_of(tokens, MASK)):
        assert run["token/input_ids"][number].tolist() == text[0].tolist()


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_rows_that_are_not_those_of_the_prompt(settings: dict[str, Any], make: Make) -> None:
    """Beams change places from step to step: refused rather than recorded under another's name."""
    model, inputs = MODELS["llama"](), batch("left")
    recorder = make(model, ["resid_post", "attention"])
    with pytest.raises(BatchError, match="5 ids"), recorder.batch(ids=IDS, forwards="generate"):
        model.generate(**inputs, max_new_tokens=5, **settings)
    assert not recorder.writer.path.exists()


def test_beams_with_an_id_each(make: Make, opened: Opened) -> None:
    """One id per beam does not help where beams change places: an error, or rows that are those of the tokens beside them."""
    model, inputs = MODELS["llama"](), batch("left")
    recorder = make(model, ["resid_post"])
    try:
        with recorder.batch(ids=range(2 * BATCH), forwards="generate"):
            model.generate(**inputs, max_new_tokens=8, num_beams=2, do_sample=False)
    except InstrumentError:
        return
    run = opened(recorder)
    for number in range(2 * BATCH):
        text = torch.from_numpy(run["token/input_ids"][number].copy())[None]
        states = observed(MODELS["llama"](), {"input_ids": text}, {"model.layers.1"})["model.layers.1"][0][1][0]
        assert apart([run["model.layers.1:out"][number]], [states.numpy()]) < NEAR, number


def test_without_pads(make: Make, opened: Opened) -> None:
    """Prompts of one length, and no mask."""
    model, prompt = MODELS["mistral"](), random_tokens(BATCH, 6)
    recorder = make(model, ["resid_post", "attention"])
    with recorder.batch(ids=IDS, forwards="generate"):
        tokens = generated(model, {"input_ids": prompt})
    run = opened(recorder)
    for number, text in enumerate(texts_of(tokens, torch.ones_like(prompt))):
        check_text(run, number, MODELS["mistral"](), "mistral", text)


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_about_as_long_as_the_window(cache: str, prompt: int, make: Make, opened: Opened) -> None:
    """The first step after the prompt is where a sliding cache begins to forget."""
    model, given = MODELS["mistral"](), random_tokens(7, prompt)
    recorder = make(model, ["resid_post", "attention"])
    options = {"cache_implementation": "static"} if cache == "static" else {}
    with recorder.batch(ids=range(7), forwards="generate"):
        tokens = generated(model, {"input_ids": given}, **options)
    run = opened(recorder)
    for number, text in enumerate(texts_of(tokens, torch.ones_like(given))):
        check_text(run, number, MODELS["mistral"](), "mistral", text)


def test_reductions_of_weights_over_steps(make: Make, opened: Opened) -> None:
    """Entropy is one number per query, whichever forward it comes from; what needs the whole matrix says so."""
    from tensortape.instrument import Site

    model, inputs = MODELS["llama"](), batch("left")
    recorder = make(model, [Site("weights", reduce="entropy"), "attention"])
    with recorder.batch(ids=IDS, forwards="generate"):
        generated(model, inputs)
    run = opened(recorder)
    for number in range(BATCH):
        weights = run.attention(ATTENTION["llama"])[number].astype(np.float64)
        entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1).T
        assert np.abs(run[f"{ATTENTION['llama']}:weights|entropy"][number] - entropy).max() < 1e-5
    other = make(model, Site("weights", reduce="received"))
    with pytest.raises(ForwardError, match="several forwards"), other.batch(ids=IDS, forwards="generate"):
        generated(model, inputs)


def test_several_batches_of_generated_text(make: Make, opened: Opened) -> None:
    """Texts of other lengths, one after another, in one run."""
    model = MODELS["llama"]()
    recorder, texts = make(model, ["resid_post", "attention"]), []
    for part, lengths in enumerate([(7, 3, 5, 1, 6), (2, 9)]):
        inputs = batch("left", part, lengths)
        with recorder.batch(ids=[f"{part}.{row}" for row in range(len(lengths))], forwards="generate"):
            tokens = generated(model, inputs)
        texts += texts_of(tokens, inputs["attention_mask"])
    run = opened(recorder)
    for number, text in enumerate(texts):
        check_text(run, number, MODELS["llama"](), "llama", text)


# --- encoder and decoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [{}, {1: 4}])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generating_with_an_encoder(name: str, ends: dict[int, int], make: Make, opened: Opened) -> None:
    """The decoder's own tokens; keys of cross-attention are those of the encoder's tokens, stored once."""
    # In float64: T5 does not scale its scores, so that in float32 steps and a whole forward differ by more than 1e-6.
    new = {"t5": lambda: t5_lm().double(), "bart": lambda: small_bart().double()}[name]
    model, inputs = new(), batch()
    block, own, cross = {
        "t5": ("decoder.block.1", "decoder.block.1.layer.0.SelfAttention", "decoder.block.1.layer.1.EncDecAttention"),
        "bart": ("model.decoder.layers.1", "model.decoder.layers.1.self_attn", "model.decoder.layers.1.encoder_attn"),
    }[name]
    recorder = make(model, ["decoder.resid_post", "decoder.attention", "cross_attention"])
    with recorder.batch(ids=IDS, forwards="generate"):
        tokens = generated(model, inputs, ends, prompt=1)
    assert torch.equal(tokens, generated(new(), inputs, ends, prompt=1))
    run = opened(recorder)
    for number, length in enumerate(LENGTHS):
        text = tokens[number : number + 1, : ends.get(number, NEW - 2) + 2]
        whole = {"input_ids": inputs["input_ids"][number : number + 1, :length], "decoder_input_ids": text}
        states = observed(new(), whole, {block})[block][0][1][0].numpy()
        assert apart([run[f"{block}:out"][number]], [states]) < NEAR
        found = eager(new(), lambda copied, whole=whole: no_grad(copied, **whole))
        for path in (own, cross):
            assert np.abs(run.attention(path)[number] - found[path][0][0][0].numpy()).max() < NEAR
        assert run["token.decoder/input_ids"][number].tolist() == text[0].tolist()
        assert len(run[f"{cross}:k"][number]) == length
        assert len(run[f"{own}:k"][number]) == text.shape[1]


# --- loops by hand -------------------------------------------------------------------------------------------------------------


def test_two_forwards_without_a_cache(make: Make) -> None:
    """The error says how many there were, and what to do."""
    model = MODELS["llama"]()
    recorder = make(model, ["resid_post", "attention"])
    with pytest.raises(ForwardError, match=r"2 times.*forwards='generate'"), recorder.batch(ids=IDS):
        [no_grad(model, **batch(seed=seed)) for seed in range(2)]
    assert not recorder.writer.path.exists()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [(7, 1, 1, 1), (3, 4, 2), (6, 5)])
def test_a_loop_with_a_cache(chunks: tuple[int, ...], kind: str, make: Make, opened: Opened) -> None:
    """Forwards that are given the cache of the one before continue it; nobody needs to say so."""
    model, tokens = MODELS["llama"](), random_tokens(BATCH, sum(chunks))
    recorder = make(model, ["resid_post", "attention", "weights"])
    with torch.no_grad(), recorder.batch(ids=IDS):
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
        for start, end in zip(np.cumsum((0, *chunks)), np.cumsum(chunks), strict=False):
            model(input_ids=tokens[:, start:end], past_key_values=cache, position_ids=torch.arange(start, end)[None])
    run = opened(recorder)
    for number in range(BATCH):
        check_text(run, number, MODELS["llama"](), "llama", tokens[number : number + 1])


def test_a_loop_with_the_cache_that_a_model_returns(make: Make, opened: Opened) -> None:
    """`past_key_values=output.past_key_values`, with a mask over all positions so far, as generate() gives it."""
    model, inputs = MODELS["llama"](), batch("left")
    tokens, mask, cache = inputs["input_ids"], inputs["attention_mask"], None
    recorder, fed = make(model, ["resid_post", "attention"]), []
    with torch.no_grad(), recorder.batch(ids=IDS):
        for _ in range(6):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            output = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            fed.append(tokens)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones(BATCH, 1, dtype=mask.dtype)], 1)
    run, whole = opened(recorder), torch.cat(fed, 1)
    for number in range(BATCH):
        text = whole[number : number + 1][:, -(LENGTHS[number] + 5) :]
        check_text(run, number, MODELS["llama"](), "llama", text)


@pytest.mark.parametrize("sites", [["attention"], ["resid_post", "attention"]])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_begun_outside(kind: str, masked: bool, sites: list[str], make: Make) -> None:
    """Keys that the run does not hold are noticed; nothing is recorded."""
    model, tokens = MODELS["llama"](), random_tokens(BATCH, 9)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
    recorder = make(model, sites)
    given = {"attention_mask": torch.ones(BATCH, 9, dtype=torch.long)} if masked else {}
    with torch.no_grad():
        model(input_ids=tokens[:, :6], past_key_values=cache)
        with pytest.raises(AttentionError, match="cache"), recorder.batch(ids=IDS):
            model(input_ids=tokens[:, 6:], past_key_values=cache, position_ids=torch.arange(6, 9)[None], **given)
    assert not recorder.writer.path.exists()


def test_a_cache_that_is_not_continued(make: Make) -> None:
    """A second prompt with an empty cache of its own is another forward."""
    model = MODELS["llama"]()
    recorder = make(model, ["resid_post", "attention"])
    with pytest.raises(ForwardError, match="2 times"), torch.no_grad(), recorder.batch(ids=IDS):
        [model(**batch(seed=seed), past_key_values=DynamicCache(config=model.config)) for seed in range(2)]


@pytest.mark.parametrize("sites", ["resid_post:out.grad", "attention.grad"])
@pytest.mark.parametrize("chunks", [(4, 4), (5, 3)])
def test_gradients_over_several_forwards(chunks: tuple[int, int], sites: str, make: Make, opened: Opened) -> None:
    """Gradients of a text that a cache cuts in two are those of one forward, or refused; never added to one another."""
    model, plain, tokens = MODELS["llama"](), MODELS["llama"](), random_tokens(BATCH, sum(chunks))

    def run_of(model: Any, cache: Any) -> None:
        outputs = []
        for start, end in zip((0, chunks[0]), np.cumsum(chunks), strict=True):
            given = {"past_key_values": cache, "position_ids": torch.arange(start, end)[None]}
            outputs.append(model(input_ids=tokens[:, start:end], **given).logits)
        per_example(torch.cat(outputs, 1), torch.ones_like(tokens)).sum().backward()

    recorder = make(model, sites)
    try:
        with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
            run_of(model, DynamicCache(config=model.config))
    except ForwardError:
        return
    run = opened(recorder)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        found.append(output)

    plain.model.layers[1].register_forward_hook(keep)
    per_example(plain(input_ids=tokens, use_cache=False).logits, torch.ones_like(tokens)).sum().backward()
    if sites == "attention.grad":
        wanted = eager(MODELS["llama"](), lambda copied: whole_loss(copied, tokens))[ATTENTION["llama"]][0]
        parts = (wanted[0] * wanted[1]).numpy()
        assert apart([run.saliency(ATTENTION["llama"])[number] for number in range(BATCH)], list(parts)) < 1e-5
    else:
        gradients = found[0].grad
        assert gradients is not None
        assert apart([run["model.layers.1:out.grad@loss"][number] for number in range(BATCH)], list(gradients.numpy())) < 1e-5


def whole_loss(model: Any, tokens: Tensor) -> None:
    """The loss of one forward over the whole text, and its backward."""
    per_example(model(input_ids=tokens, use_cache=False).logits, torch.ones_like(tokens)).sum().backward()


def test_an_unknown_kind_of_batch(make: Make) -> None:
    """Refused where it is written."""
    recorder = make(build("llama"), "resid_post")
    with pytest.raises(ValueError, match="'many'"), recorder.batch(ids=IDS, forwards="many"):  # type: ignore[arg-type]
        pass


def test_several_forwards_of_a_model_without_a_cache(make: Make, opened: Opened) -> None:
    """forwards='generate' where nothing is continued: each forward sees its own tokens alone, and that is what is recorded."""
    model = sdpa_decoder()
    recorder, tokens = make(model, ["attention"]), random_tokens(BATCH, 13)
    with torch.no_grad(), recorder.batch(ids=IDS, forwards="generate"):
        model(tokens[:, :6])
        model(tokens[:, 6:])
    run = opened(recorder)
    for start, end in ((0, 6), (6, 13)):
        wanted = eager(sdpa_decoder(), lambda copied, start=start, end=end: copied(tokens[:, start:end]).detach())
        for number in range(BATCH):
            found = run.attention("blocks.1.attention")[number]
            own = wanted["blocks.1.attention"][0][0][number].detach().numpy()
            assert np.abs(found[:, start:end, start:end] - own).max() < NEAR
            assert not found[:, start:end, :start].any()
