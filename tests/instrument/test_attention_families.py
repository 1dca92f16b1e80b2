"""Attention of transformers models: what a run rebuilds is what an eager copy of the model says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from attention_models import (
    ABSOLUTE,
    FALCON,
    INTERFACE,
    SIDES,
    SOFTMAX,
    SWIN,
    SWIN_V2,
    Family,
    attentions,
    kept,
)
from tiny_models import (
    BATCH,
    DECODER_LENGTHS,
    HIDDEN,
    INNER,
    PAD,
    VOCABULARY,
    Inputs,
    batch,
    hook_count,
    in_dtype,
    random_tokens,
    seeded,
    tensors,
)
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers.modeling_utils import AttentionInterface

from tensortape.instrument import Recorder
from tensortape.instrument.errors import InstrumentError
from tensortape.stores import Run
from tensortape.stores.errors import AttentionNotRecordedError

ALL = {**INTERFACE, **SOFTMAX, **FALCON}
EXACT, CLOSE = 0.0, 1e-5
Recorded = Callable[..., Run]
Make = Callable[..., Recorder]


def named(*names: str) -> list[Any]:
    """Some families."""
    return [pytest.param(ALL[name], id=name) for name in names]


@contextmanager
def warned(family: Family, side: str) -> Iterator[None]:
    """Pads on the left move positions where they are absolute and cannot be given."""
    expects = family.warns and side == "left"
    with pytest.warns(UserWarning, match="padded on the left") if expects else nullcontext():
        yield


def check(run: Run, family: Family, side: str, tolerance: float, first: int = 0) -> None:
    """Every attention call of every example, against an eager copy."""
    expected = attentions(family.build("eager"), family.inputs(side))
    assert run.attention_sites == family.sites()
    assert len(expected) == len(family.sites())
    for number, (site, weights) in enumerate(zip(family.sites(), expected, strict=True)):
        assert run.attention(site).facts["cross"] == family.is_cross(number) or weights.shape[2] != weights.shape[3]
        for example, one in enumerate(kept(weights, *family.masks(number, side)), first):
            check_matrix(run.attention(site)[example], one, tolerance, f"{site} of example {example}")
            assert family.sinks or np.abs(run.attention(site)[example].sum(-1) - 1).max() < CLOSE


def check_matrix(found: np.ndarray, expected: np.ndarray, tolerance: float, where: str) -> None:
    """Equal shapes, and values as close as that."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape, where
    assert np.abs(found - expected).max() <= tolerance, where


def returned(model: nn.Module, inputs: Inputs, paths: tuple[str, ...]) -> list[Tensor]:
    """What attention modules return beside their output, for models whose outputs hold only some of it."""
    found: list[Tensor] = []
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda module, args, output: found.append(output[1]))
    with torch.no_grad():
        model(**inputs, output_attentions=True)
    return found


# --- whole families ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tier", "tolerance"),
    [
        pytest.param(family, tier, tolerance, id=name)
        for families, tier, tolerance in ((INTERFACE, "interface", CLOSE), (FALCON, "sdpa", CLOSE), (SOFTMAX, "softmax", EXACT))
        for name, family in families.items()
    ],
)
def test_weights_are_those_of_an_eager_copy(
    make: Make, opened: Callable[[Recorder], Run], family: Family, tier: str, tolerance: float
) -> None:
    """Recorded under the default implementation, pads on either side, two batches in a run; materialised weights bit for bit."""
    model = family.build()
    recorder = make(model, "attention")
    for side in SIDES:
        with warned(family, side), torch.no_grad(), recorder.batch(ids=[f"{side} {row}" for row in range(BATCH)]):
            model(**family.inputs(side))
    run = opened(recorder)
    for first, side in zip((0, BATCH), SIDES, strict=True):
        check(run, family, side, tolerance, first)
    facts = [run.attention(site).facts for site in run.attention_sites]
    assert {(fact["tier"], fact["stored"]) for fact in facts} == {(tier, "weights" if tier == "softmax" else "qk")}


@pytest.mark.parametrize(("family", "tolerance"), [(SWIN, CLOSE), (SWIN_V2, EXACT)], ids=["swin", "swinv2"])
def test_windows_are_blocks_of_an_images_matrix(
    make: Make, opened: Callable[[Recorder], Run], family: Family, tolerance: float
) -> None:
    """The windows of an image lie on the diagonal of its matrix, in their own order; nothing is outside of them."""
    model, inputs = family.build(), family.inputs("right")
    recorder = make(model, "attention")
    for first in (0, BATCH):
        with torch.no_grad(), recorder.batch(ids=list(range(first, first + BATCH))):
            model(**inputs)
    run = opened(recorder)
    assert run.attention_sites == family.sites()
    for site, weights in zip(family.sites(), returned(family.build("eager"), inputs, family.paths), strict=True):
        windows = weights.unflatten(0, (BATCH, -1))
        for example, blocks in enumerate(windows):
            expected = np.stack([torch.block_diag(*blocks[:, head]).numpy() for head in range(blocks.shape[1])])
            for again in (example, BATCH + example):
                check_matrix(run.attention(site)[again], expected, tolerance, f"{site} of image {again}")


@pytest.mark.parametrize("family", named("gpt2", "gemma2", "bloom", "falcon", "t5", "vit"))
def test_single_tokens_and_no_mask(recorded: Recorded, family: Family) -> None:
    """A batch without a mask, and one of one token per example: causality is what it would be."""
    inputs = {name: value for name, value in family.inputs("right").items() if "mask" not in name}
    for given in [inputs, *([{name: value[:, :1] for name, value in inputs.items()}] if family.masked else [])]:
        run = recorded(family.build(), "attention", given)
        for site, weights in zip(family.sites(), attentions(family.build("eager"), given), strict=True):
            for example in range(BATCH):
                check_matrix(run.attention(site)[example], weights[example].numpy(), CLOSE, site)


def test_an_example_without_tokens(recorded: Recorded) -> None:
    """A row that is all pads has a matrix of no queries and no keys, and leaves the others as they are."""
    family, inputs = INTERFACE["llama"], batch("right")
    inputs["attention_mask"][3] = 0
    run = recorded(family.build(), "attention", inputs)
    assert run.attention(1)[3].shape == (6, 0, 0)
    weights = attentions(family.build("eager"), inputs)[1]
    check_matrix(run.attention(1)[4], kept(weights, *[inputs["attention_mask"]] * 2)[4], CLOSE, "after it")


# --- cross-attention -----------------------------------------------------------------------------------------------------------


def of_equal_widths(side: str) -> Inputs:
    """As many decoder positions as encoder positions, but other pads."""
    inner = batch(side, 1, (2, 7, 4, 6, 3))
    return {**batch(side), "decoder_input_ids": inner["input_ids"], "decoder_attention_mask": inner["attention_mask"]}


def longer_encoder(side: str) -> Inputs:
    """More encoder positions than decoder positions."""
    inner = batch(side, 1, (2, 5, 4, 1, 3))
    return {**batch(side), "decoder_input_ids": inner["input_ids"], "decoder_attention_mask": inner["attention_mask"]}


def longer_decoder(side: str) -> Inputs:
    """More decoder positions than encoder positions."""
    inner = batch(side, 1, DECODER_LENGTHS)
    return {**batch(side), "decoder_input_ids": inner["input_ids"], "decoder_attention_mask": inner["attention_mask"]}


class Bert2Bert(Family):
    """An encoder-decoder made of two BERTs, whose cross-attention is called `crossattention.self`."""

    def build(self, implementation: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """The model, always the same."""
        encoder = hf.BertConfig(**ABSOLUTE)
        decoder = hf.BertConfig(**ABSOLUTE, is_decoder=True, add_cross_attention=True)
        config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        config.pad_token_id, config.decoder_start_token_id = PAD, 2
        model = seeded(lambda: hf.EncoderDecoderModel(config))
        if implementation is not None:
            model.set_attn_implementation(implementation)
        return model

    def is_cross(self, number: int) -> bool:
        """Whether a site is cross-attention."""
        return "crossattention" in self.paths[number]


_DECODER_LAYER = "decoder.bert.encoder.layer.{}"
BERT2BERT = Bert2Bert(
    None,
    None,
    {},
    (
        *(f"encoder.encoder.layer.{layer}.attention.self" for layer in range(3)),
        *(_DECODER_LAYER.format(layer) + f".{name}.self" for layer in range(3) for name in ("attention", "crossattention")),
    ),
    longer_decoder,
)


@pytest.mark.parametrize("inputs", [longer_decoder, of_equal_widths, longer_encoder])
@pytest.mark.parametrize("family", [*named("t5", "bart"), pytest.param(BERT2BERT, id="bert2bert")])
def test_cross_attention_is_told_from_self_attention(recorded: Recorded, family: Family, inputs: Callable[[str], Inputs]) -> None:
    """Whichever of the two streams is wider, and where both are as wide: each matrix has its own queries and keys."""
    given = inputs("right")
    run = recorded(family.build(), "attention", given)
    own, encoder = given["decoder_attention_mask"], given["attention_mask"]
    for number, (site, weights) in enumerate(zip(family.sites(), attentions(family.build("eager"), given), strict=True)):
        queries = own if family.is_of_decoder(number) else encoder
        keys = own if family.is_of_decoder(number) and not family.is_cross(number) else encoder
        assert run.attention(site).facts["cross"] == family.is_cross(number), site
        for example, one in enumerate(kept(weights, queries, keys)):
            check_matrix(run.attention(site)[example], one, CLOSE, f"{site} of example {example}")


def test_queries_that_attend_to_more_features_than_there_are_queries(recorded: Recorded) -> None:
    """A Q-Former: few learnt queries attend to many image features, in a module called `crossattention.attention`."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": HIDDEN, "encoder_hidden_size": 23}
    config = {**sizes, "intermediate_size": INNER, "vocab_size": VOCABULARY, "cross_attention_frequency": 1}
    model = seeded(lambda: hf.Blip2QFormerModel(hf.Blip2QFormerConfig(**config)))
    random = torch.Generator().manual_seed(0)
    features = {"query_embeds": torch.randn(BATCH, 3, HIDDEN, generator=random)}
    features["encoder_hidden_states"] = torch.randn(BATCH, 17, 23, generator=random)
    run = recorded(model, "attention", features)
    shapes = {site: run.attention(site)[0].shape for site in run.attention_sites}
    assert {shape for site, shape in shapes.items() if "crossattention" in site} == {(4, 3, 17)}
    assert {shape for site, shape in shapes.items() if "crossattention" not in site} == {(4, 3, 3)}


# --- names ---------------------------------------------------------------------------------------------------------------------


def test_sites_have_names_that_architectures_share(recorded: Recorded) -> None:
    """By path, by layer number, by alias; calls of a shared module by their number; what fits several is refused."""
    bart, albert = INTERFACE["bart"], INTERFACE["albert"]
    run = recorded(bart.build(), "attention", bart.inputs("right"))
    for alias, path in {
        "encoder.attention[2]": "encoder.layers.2.self_attn",
        "decoder.attention[-1]": "decoder.layers.1.self_attn",
        "decoder.cross_attention[0]": "decoder.layers.0.encoder_attn",
    }.items():
        assert run.attention(alias).site == path
    for unknown in ("attention[0]", 0, "attention", "decoder.layers.0"):
        with pytest.raises(AttentionNotRecordedError, match="fits"):
            run.attention(unknown)
    run = recorded(albert.build(), "attention", albert.inputs("right"))
    assert run.attention(2).site == run.attention("attention[-1]").site == albert.sites()[2]


@pytest.mark.parametrize(
    ("sites", "paths"),
    [
        ("attention[1]", ["decoder.layers.1.encoder_attn", "decoder.layers.1.self_attn", "encoder.layers.1.self_attn"]),
        ("decoder.attention[1]", ["decoder.layers.1.encoder_attn", "decoder.layers.1.self_attn"]),
        ("cross_attention", ["decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn"]),
        ("decoder.cross_attention[-1]", ["decoder.layers.1.encoder_attn"]),
        ("encoder.layers.2.self_attn:attention", ["encoder.layers.2.self_attn"]),
        (["encoder.attention[0]", "**.0.encoder_attn:weights"], ["decoder.layers.0.encoder_attn", "encoder.layers.0.self_attn"]),
    ],
)
def test_some_attention_sites_can_be_selected(recorded: Recorded, sites: Any, paths: list[str]) -> None:
    """By layer, stack, kind or path: those are recorded, no others, and hold what the whole recording holds."""
    bart = INTERFACE["bart"]
    run, whole = (recorded(bart.build(), chosen, bart.inputs("right")) for chosen in (sites, "attention"))
    assert sorted(run.attention_sites) == paths
    for site in run.attention_sites:
        for example in range(BATCH):
            np.testing.assert_allclose(run.attention(site)[example], whole.attention(site)[example], atol=1e-6)


# --- models without attention that anyone sees ----------------------------------------------------------------------------------


def reformer() -> nn.Module:
    """Reformer, which computes its softmax by logsumexp."""
    return hf.ReformerModel(
        hf.ReformerConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            attention_head_size=26,
            feed_forward_size=INNER,
            attn_layers=["local", "lsh"],
            local_attn_chunk_length=7,
            lsh_attn_chunk_length=7,
            axial_pos_shape=[7, 1],
            axial_pos_embds_dim=[20, 32],
            max_position_embeddings=7,
            num_hashes=1,
            hash_seed=1,
            is_decoder=False,
            pad_token_id=PAD,
        )
    )


def mamba() -> nn.Module:
    """Mamba, which has none."""
    return hf.MambaModel(hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, state_size=3))


def perceptron() -> nn.Module:
    """An MLP whose softmax is none of attention."""
    return nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, INNER), nn.Softmax(-1))


@pytest.mark.parametrize("build", [reformer, mamba, perceptron])
@pytest.mark.parametrize("site", ["attention", "weights"])
def test_models_without_visible_attention_say_so(
    make: Make, build: Callable[[], nn.Module], site: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An error after the batch says that no attention was seen, and what to record instead; the run is not there."""
    model = seeded(build)
    recorder = make(model, site)
    with pytest.raises(InstrumentError, match="no attention was seen"), torch.no_grad(), recorder.batch(ids=list(range(BATCH))):
        model(random_tokens(BATCH, 7))
    assert not recorder.writer.path.exists()


def test_a_softmax_that_is_not_attention_is_not_recorded_as_if_it_were(recorded: Recorded) -> None:
    """ConvBERT's attention modules also normalise the kernels of a convolution: [B T H, k, 1]."""
    config = {**ABSOLUTE, "embedding_size": HIDDEN, "head_ratio": 2, "conv_kernel_size": 3}
    model = seeded(lambda: hf.ConvBertModel(hf.ConvBertConfig(**config)))
    inputs = batch("right")
    run = recorded(model, "attention", inputs)
    expected = attentions(model, inputs)
    assert run.attention_sites == [f"encoder.layer.{layer}.attention.self" for layer in range(3)]
    for site, weights in zip(run.attention_sites, expected, strict=True):
        for example, one in enumerate(kept(weights, *[inputs["attention_mask"]] * 2)):
            check_matrix(run.attention(site)[example], one, EXACT, site)


@pytest.mark.parametrize("heads", [4, 13])
def test_banded_weights_are_refused(recorded: Recorded, heads: int) -> None:
    """Longformer's [B, T, H, window + 1] is no matrix over tokens, whatever the number of heads; no cache is to blame."""
    config = {**ABSOLUTE, "num_attention_heads": heads, "max_position_embeddings": 30, "attention_window": 4}
    model = seeded(lambda: hf.LongformerModel(hf.LongformerConfig(**config)))
    with pytest.raises(InstrumentError, match=r"^(?!.*cache)"):
        recorded(model, "attention", batch("right"))


# --- implementations of one model -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")  # as transformers calls it
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *(
            (name, implementation)
            for name in ("llama", "mistral", "bert")
            for implementation in ("eager", "sdpa", "flex_attention")
        ),
        ("gemma2", "flex_attention"),  # with a softcap
        ("t5", "eager"),
        ("segformer", "eager"),
        ("falcon", "eager"),
    ],
)
@pytest.mark.parametrize("side", SIDES)
def test_implementations_agree(recorded: Recorded, name: str, implementation: str, side: str) -> None:
    """Masks mean different things to each, but the weights are the same: boolean, floating, none at all, a BlockMask."""
    family = ALL[name]
    with torch.compiler.set_stance("force_eager"):
        run = recorded(family.build(implementation), "attention", family.inputs(side))
    if name != "falcon":
        assert {run.attention(site).facts["implementation"] for site in run.attention_sites} == {implementation}
    check(run, family, side, CLOSE)


def flash(window_size: int | None, *, is_causal: bool, queries: int, keys: int) -> Tensor:
    """[Tq, Tk] bool: what flash attention's documentation says of causality (aligned at the end) and of transformers' window."""
    distance = torch.arange(keys)[None] - (torch.arange(queries)[:, None] + keys - queries)
    seen = distance <= 0 if is_causal else torch.ones(queries, keys, dtype=torch.bool)
    return seen if window_size is None else seen & (distance.abs() < window_size)


def like_flash(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    """What `flash_attention_2` computes, without its kernel: transformers gives it no mask, or one of [B, Tk]."""
    causal = options.get("is_causal")
    rule = flash(
        options.get("sliding_window"),
        is_causal=module.is_causal if causal is None else causal,
        queries=query.shape[2],
        keys=key.shape[2],
    )
    keep = rule[None, None] if attention_mask is None else rule & attention_mask[:, None, None].bool()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * options["scaling"]
    weights = torch.softmax(scores.masked_fill(~keep, -1e30), -1)
    return (weights @ value).transpose(1, 2), None


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "bert", "modernbert"])
@pytest.mark.parametrize("side", SIDES)
def test_flash_attention_is_read_as_it_means_its_arguments(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, name: str, side: str
) -> None:
    """A stand-in for flash attention that is given what transformers gives the kernel: padding mask, window and causality."""
    family = INTERFACE[name]
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", like_flash)
    model = family.build()
    model.config._attn_implementation_internal = "flash_attention_2"
    run = recorded(model, "attention", family.inputs(side))
    assert {run.attention(site).facts["implementation"] for site in run.attention_sites} == {"flash_attention_2"}
    check(run, family, side, CLOSE)


# --- nothing of the model changes -----------------------------------------------------------------------------------------------


def traces(model: nn.Module) -> list[Any]:
    """Everything that recording attention might leave behind."""
    return [
        hook_count(model),
        AttentionInterface.get_interface,
        [sorted(vars(module)) for module in model.modules()],
        torch.backends.mha.get_fastpath_enabled(),
        len(_get_current_function_mode_stack()),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        *((ALL[name], None) for name in ("gpt2", "llama", "gemma2", "gpt_oss", "bert", "t5", "vit", "bloom", "xlnet", "falcon")),
        *((ALL[name], "eager") for name in ("gpt2", "mistral", "bart")),
    ],
    ids=str,
)
def test_outputs_are_the_same_bits(recorded: Recorded, family: Family, implementation: str | None, dtype: torch.dtype) -> None:
    """With and without recording attention; afterwards nothing of the recording is left on the model or in torch."""
    model, inputs = family.build(implementation, dtype), in_dtype(family.inputs("right"), dtype)
    with torch.no_grad():
        expected = list(tensors(dict(model(**inputs))))
    before, seen = traces(model), []
    handle = model.register_forward_hook(lambda module, args, output: seen.extend(tensors(dict(output))))
    run = recorded(model, "attention", inputs)
    handle.remove()
    assert traces(model) == before
    assert len(seen) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
    assert all(np.isfinite(run.attention(site)[0]).all() for site in run.attention_sites)


@pytest.mark.parametrize("family", named("llama", "bloom", "falcon"))
def test_an_exception_leaves_nothing_behind(make: Make, opened: Callable[[Recorder], Run], family: Family) -> None:
    """The forward fails in its second block: the exception passes through, and the next batch is recorded as ever."""
    model, inputs = family.build(), family.inputs("right")
    before, recorder = traces(model), make(model, "attention")

    def fail(*_: Any) -> None:
        raise RuntimeError("in the second block")

    second = model.get_submodule(family.paths[1])
    handle = second.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the second block"), torch.no_grad(), recorder.batch(ids=list(range(BATCH))):
        model(**inputs)
    handle.remove()
    assert traces(model) == before
    with torch.no_grad(), recorder.batch(ids=list(range(BATCH))):
        model(**inputs)
    assert traces(model) == before
    check(opened(recorder), family, "right", CLOSE)


def test_recorders_within_each_other_and_copies(make: Make, opened: Callable[[Recorder], Run]) -> None:
    """Two recorders of one model at once see the same; a copy made meanwhile, and another model, are not seen."""
    family = INTERFACE["llama"]
    model, other, inputs = family.build(), INTERFACE["gpt2"].build(), family.inputs("right")
    before = traces(model)
    recorders = [make(model, "attention"), make(model, "weights"), make(other, "attention")]
    ids = list(range(BATCH))
    with torch.no_grad(), recorders[0].batch(ids=ids), recorders[1].batch(ids=ids), recorders[2].batch(ids=ids):
        copied = copy.deepcopy(model)
        model(**inputs)
        copied(**inputs)
        other(**INTERFACE["gpt2"].inputs("right"))
    assert traces(model) == before
    runs = [opened(recorder) for recorder in recorders]
    check(runs[0], family, "right", CLOSE)
    check(runs[1], family, "right", CLOSE)
    check(runs[2], INTERFACE["gpt2"], "right", CLOSE)


def test_inference_mode(make: Make, opened: Callable[[Recorder], Run]) -> None:
    """Inference tensors have no version counters."""
    family = INTERFACE["mistral"]
    model = family.build()
    recorder = make(model, "attention")
    with torch.inference_mode(), recorder.batch(ids=list(range(BATCH))):
        model(**family.inputs("left"))
    check(opened(recorder), family, "left", CLOSE)
