"""The acceptance test: whatever the architecture, recorded rows are bit for bit what the model itself computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import (
    BATCH,
    CASES,
    DECODER_LENGTHS,
    HIDDEN,
    HUGGING_FACE,
    LENGTHS,
    Case,
    batch,
    gpt2,
    hook_count,
    in_dtype,
    minilm,
    observed,
    packed,
    tensors,
    torch_encoder,
)
from torch import Tensor, nn

from tensortape.instrument import Recorder
from tensortape.instrument.families import FAMILIES
from tensortape.stores import Run

SIDES = ("right", "left")
VARIANTS = {"right-float32": ("right", torch.float32), "left-bfloat16": ("left", torch.bfloat16)}
variants = pytest.mark.parametrize(("side", "dtype"), VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """Every architecture."""
    return request.param


@pytest.fixture
def case(name: str) -> Case:
    """What is known of it."""
    return CASES[name]


@contextmanager
def fast_path_off() -> Iterator[None]:
    """What the recorder's own forward runs under."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def record_case(recorded: Callable[..., Run], case: Case, sites: Any, side: str, dtype: torch.dtype = torch.float32) -> Run:
    """One forward of a fresh model; pads on the left of some models warn."""
    model, inputs = case.build().to(dtype), in_dtype(case.inputs(side), dtype)
    with warnings.catch_warnings():
        if case.warns and side == "left":
            warnings.filterwarnings("ignore", "this batch is padded on the left")
        return recorded(model, sites, inputs, ids=list(range(BATCH)), **case.batch(side))


def site(stack: str, alias: str, layer: int | None = None) -> str:
    """An alias as users write it."""
    return f"{stack}{'.' if stack else ''}{alias}{'' if layer is None else f'[{layer}]'}"


def rows(run: Run, pattern: str) -> Tensor:
    """All rows of the one column that a pattern selects."""
    [column] = run.select(pattern)
    return column.to_torch()


def expected(case: Case, stack: str, side: str, grid: Tensor) -> Tensor:
    """Real rows of a padded tensor."""
    return packed(grid.transpose(0, 1) if case.time_first else grid, case.mask(stack, side))


def calls(paths: list[str]) -> Iterator[tuple[str, int]]:
    """(path, number of the call) of every layer."""
    for layer, path in enumerate(paths):
        yield path, paths[:layer].count(path)


@variants
def test_blocks_equal_direct_hooks(case: Case, side: str, dtype: torch.dtype, recorded: Callable[..., Run]) -> None:
    """resid_pre and resid_post of every layer, embed and final_norm are what torch's own hooks see, without the pads."""
    outside = [*case.embed.values(), *case.final_norm.values()]
    run = record_case(recorded, case, ["resid_pre", "resid_post", *(["embed"] if case.embed else []), *outside], side, dtype)
    paths = {path for blocks in case.blocks.values() for path in blocks} | set(outside)
    with fast_path_off():
        seen = observed(case.build().to(dtype), in_dtype(case.inputs(side), dtype), paths)
    for stack, blocks in case.blocks.items():
        for layer, (path, call) in enumerate(calls(blocks)):
            for alias, grid in zip(("resid_pre", "resid_post"), seen[path][call], strict=True):
                assert torch.equal(rows(run, site(stack, alias, layer)), expected(case, stack, side, grid)), (alias, layer)
        for alias, path in outside_of(case, stack):
            assert torch.equal(rows(run, site(stack, alias)), expected(case, stack, side, seen[path][0][1])), (alias, stack)
        column = run.select(site(stack, "resid_post", -1))[0]
        assert not case.masked or [len(column[number]) for number in range(BATCH)] == list(lengths_of(stack))


def outside_of(case: Case, stack: str) -> list[tuple[str, str]]:
    """Aliases outside the blocks of a stack, with their module paths."""
    return [(alias, named[stack]) for alias, named in (("embed", case.embed), ("final_norm", case.final_norm)) if stack in named]


def lengths_of(stack: str) -> tuple[int, ...]:
    """Real tokens of each example."""
    return DECODER_LENGTHS if stack == "decoder" else LENGTHS


LAST = {"vit": "resid_post[-1]", "opt_post_norm": "decoder.project_out"}  # no norm, or no state from before the norm


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hidden_states_equal_what_transformers_returns(name: str, case: Case, side: str, recorded: Callable[..., Run]) -> None:
    """hidden_states[i] is resid_pre[i]; the last one is final_norm, or resid_post[-1] where there is no final norm."""
    sites = ["resid_pre", "resid_post", *(["final_norm"] if case.final_norm else []), *([LAST[name]] if name in LAST else [])]
    run = record_case(recorded, case, sites, side)
    with torch.no_grad():
        output = case.build()(**case.inputs(side), output_hidden_states=True)
    for stack, blocks in case.blocks.items():
        hidden = output[f"{stack}_hidden_states" if stack else "hidden_states"]
        assert len(hidden) == len(blocks) + 1
        for layer, grid in enumerate(hidden[:-1]):
            assert torch.equal(rows(run, site(stack, "resid_pre", layer)), expected(case, stack, side, grid))
        last = LAST.get(name) or (site(stack, "final_norm") if stack in case.final_norm else site(stack, "resid_post", -1))
        assert torch.equal(rows(run, last), expected(case, stack, side, hidden[-1]))


class Abandoned(Exception):
    """Leaves a batch context without writing anything."""


@variants
def test_recording_changes_no_output(case: Case, side: str, dtype: torch.dtype, make: Callable[..., Recorder]) -> None:
    """With every module tapped, every output tensor is the same bit for bit, and no hook stays behind."""
    model, inputs = case.build().to(dtype), in_dtype(case.inputs("right"), dtype)
    with torch.no_grad(), fast_path_off():
        plain = list(tensors(model(**inputs)))
    before = hook_count(model)
    recorder = make(model, ["re:.*", "re:.*:in"])
    with suppress(Abandoned), torch.no_grad(), recorder.batch(ids=list(range(BATCH)), **case.batch("right")):
        watched = list(tensors(model(**inputs)))
        assert hook_count(model) > before + len(list(model.modules()))
        raise Abandoned
    assert hook_count(model) == before
    assert len(plain) == len(watched) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


# --- attn_out, mlp_out and resid_mid: the residual equations --------------------------------------------------------------------


def pre_norm(block: nn.Module, r: SimpleNamespace) -> None:
    """The residual stream is a sum."""
    assert torch.equal(r.resid_pre + r.attn_out, r.resid_mid)
    assert torch.equal(r.resid_mid + r.mlp_out, r.resid_post)


def pre_norm_without_mid(block: nn.Module, r: SimpleNamespace) -> None:
    """The same, where the sum in the middle is no module's input or output."""
    assert torch.equal(r.resid_pre + r.attn_out + r.mlp_out, r.resid_post)


def parallel(block: nn.Module, r: SimpleNamespace) -> None:
    """Attention and MLP read the same input."""
    assert torch.equal(r.mlp_out + r.attn_out + r.resid_pre, r.resid_post)


def post_norm(middle: str, last: str) -> Callable[[nn.Module, SimpleNamespace], None]:
    """Every sum is normed, by these modules of the block."""

    def check(block: nn.Module, r: SimpleNamespace) -> None:
        mid = block.get_submodule(middle)(r.resid_pre + r.attn_out)
        if r.resid_mid is not None:
            assert torch.equal(mid, r.resid_mid)
        assert torch.equal(block.get_submodule(last)(mid + r.mlp_out), r.resid_post)

    return check


def t5_decoder(block: nn.Module, r: SimpleNamespace) -> None:
    """Cross-attention is added before the middle."""
    assert torch.equal(r.resid_pre + r.attn_out + r.cross, r.resid_mid)
    assert torch.equal(r.resid_mid + r.mlp_out, r.resid_post)


def bart_decoder(block: nn.Module, r: SimpleNamespace) -> None:
    """Cross-attention is added, and normed, before the middle."""
    first = block.self_attn_layer_norm(r.resid_pre + r.attn_out)
    assert torch.equal(block.encoder_attn_layer_norm(first + r.cross), r.resid_mid)
    assert torch.equal(block.final_layer_norm(r.resid_mid + r.mlp_out), r.resid_post)


def torch_decoder_pre(block: nn.Module, r: SimpleNamespace) -> None:
    """Three sums."""
    assert torch.equal(r.resid_pre + r.attn_out + r.cross + r.mlp_out, r.resid_post)


def torch_decoder_post(block: nn.Module, r: SimpleNamespace) -> None:
    """Three sums, each normed."""
    middle = block.norm2(block.norm1(r.resid_pre + r.attn_out) + r.cross)
    assert torch.equal(block.norm3(middle + r.mlp_out), r.resid_post)


bert_post = post_norm("attention.output.LayerNorm", "output.LayerNorm")
torch_post = post_norm("norm1", "norm2")
EQUATIONS: dict[str, dict[str, Callable[[nn.Module, SimpleNamespace], None]]] = {
    **{name: {"": pre_norm} for name in ("gpt2", "gpt2_square", "llama", "mistral", "qwen2", "qwen3", "vit")},
    **{name: {"": pre_norm} for name in ("gemma", "gemma2", "gemma3")},
    "gpt_neox": {"": parallel},
    "gpt_neox_sequential": {
        "": lambda block, r: torch.testing.assert_close(r.mlp_out + (r.attn_out + r.resid_pre), r.resid_post, rtol=0, atol=0)
    },
    "opt": {"": pre_norm_without_mid},
    "opt_post_norm": {"": post_norm("self_attn_layer_norm", "final_layer_norm")},
    **{name: {"": bert_post} for name in ("bert", "roberta", "electra")},
    "albert": {"": post_norm("attention.LayerNorm", "full_layer_layer_norm")},
    **{name: {"encoder": pre_norm, "decoder": t5_decoder} for name in ("t5", "mt5")},
    **{
        name: {"encoder": post_norm("self_attn_layer_norm", "final_layer_norm"), "decoder": bart_decoder}
        for name in ("bart", "marian")
    },
    **{name: {"": torch_post} for name in ("torch_encoder", "torch_encoder_time_first")},
    **{name: {"": pre_norm_without_mid} for name in ("torch_encoder_norm_first", "torch_encoder_time_first_norm_first")},
    "torch_decoder": {"": torch_decoder_post},
    "torch_decoder_norm_first": {"": torch_decoder_pre},
}
CROSS = {"t5": "layer.1.dropout", "mt5": "layer.1.dropout", "bart": "encoder_attn", "marian": "encoder_attn"}
CROSS |= {"torch_decoder": "dropout2", "torch_decoder_norm_first": "dropout2"}
WITHOUT_MID = {name for name in EQUATIONS if name.startswith(("opt", "gpt_neox", "torch"))}


def cross_sites(name: str, case: Case) -> list[str]:
    """The sites of what cross-attention adds, which has no alias."""
    decoders = case.blocks.get("decoder", case.blocks.get("", []))
    return [f"{path}.{CROSS[name]}" for path in decoders] if name in CROSS else []


@variants
@pytest.mark.parametrize("name", EQUATIONS)
def test_residual_equations(name: str, case: Case, side: str, dtype: torch.dtype, recorded: Callable[..., Run]) -> None:
    """attn_out and mlp_out are the tensors just before they are added: with them every block is rebuilt bit for bit."""
    aliases = ["resid_pre", "attn_out", "mlp_out", "resid_post", *(["resid_mid"] if name not in WITHOUT_MID else [])]
    cross = cross_sites(name, case)
    run = record_case(recorded, case, [*aliases, *cross], side, dtype)
    model = case.build().to(dtype)
    for stack, blocks in case.blocks.items():
        for layer, path in enumerate(blocks):
            r = SimpleNamespace(resid_mid=None, cross=None)
            for alias in aliases:
                setattr(r, alias, rows(run, site(stack, alias, layer)))
            if f"{path}.{CROSS.get(name)}" in cross:
                r.cross = rows(run, f"{path}.{CROSS[name]}")
            with torch.no_grad():
                EQUATIONS[name][stack](model.get_submodule(path), r)


def test_every_table_is_tested() -> None:
    """Every model type and block class that a table names has a case with an equation."""
    tested = set()
    for name in EQUATIONS:
        model = CASES[name].build()
        config = getattr(model, "config", None)
        first = next(iter(CASES[name].blocks.values()))[0]
        tested.add(config.model_type if config is not None else type(model.get_submodule(first)).__name__)
    assert tested == {kind for family in FAMILIES for kind in family.model_types}


# --- particular models ----------------------------------------------------------------------------------------------------------


def test_minilm_on_real_text(recorded: Callable[..., Run]) -> None:
    """Real weights, real text: hidden states as transformers returns them, and the post-norm equation."""
    model, tokenizer = minilm()
    texts = ["a tape is recorded once", "and read", "for as long as anybody cares to look at it, again and again", "yes", "no: one"]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    run = recorded(model, ["embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "resid_mid"], inputs, ids=texts)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        words = model.embeddings.word_embeddings(inputs["input_ids"])
    assert run.ids == texts
    assert torch.equal(rows(run, "embed"), packed(words, inputs["attention_mask"]))
    for layer, grid in enumerate(hidden[:-1]):
        assert torch.equal(rows(run, f"resid_pre[{layer}]"), packed(grid, inputs["attention_mask"]))
        r = SimpleNamespace(
            **{alias: rows(run, f"{alias}[{layer}]") for alias in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")}
        )
        with torch.no_grad():
            bert_post(model.encoder.layer[layer], r)
    assert torch.equal(rows(run, "resid_post[-1]"), packed(hidden[-1], inputs["attention_mask"]))


def test_fast_path_is_off_only_while_recording(make: Callable[..., Recorder]) -> None:
    """nn.TransformerEncoder's fast path would pass the hooks by; the user's setting comes back."""
    model = torch_encoder(batch_first=True, norm_first=False)
    recorder = make(model, "resid_post")
    for wanted in (True, False):
        torch.backends.mha.set_fastpath_enabled(wanted)
        try:
            with torch.no_grad(), recorder.batch(ids=[f"{wanted} {number}" for number in range(BATCH)]):
                assert not torch.backends.mha.get_fastpath_enabled()
                model(**CASES["torch_encoder"].inputs("right"))
            assert torch.backends.mha.get_fastpath_enabled() is wanted
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_fast_path_comes_back_when_recorders_end_in_any_order(make: Callable[..., Recorder]) -> None:
    """Two recorders attached one after the other and closed in the same order leave the user's setting."""
    first, second = (make(torch_encoder(batch_first=True, norm_first=False), "resid_post") for _ in range(2))
    assert torch.backends.mha.get_fastpath_enabled()
    try:
        first.attach()
        second.attach()
        first.close()
        second.close()
        assert torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_recorder_that_ends_leaves_the_fast_path_off_for_others(
    make: Callable[..., Recorder], opened: Callable[..., Run]
) -> None:
    """While any recorder is attached the fast path stays off, so that its hooks are not passed by."""
    case = CASES["torch_encoder"]
    first, model = make(case.build(), "resid_post"), case.build()
    second = make(model, ["resid_post", "layers.*.linear1"])
    try:
        first.attach()
        second.attach()
        first.close()
        with torch.no_grad(), second.batch(ids=list(range(BATCH))):
            model(**case.inputs("right"))
    finally:
        second.close()
        torch.backends.mha.set_fastpath_enabled(True)
    assert len(opened(second)) == BATCH


def test_a_causal_mask_of_torch_encoder_is_no_padding_mask(recorded: Callable[..., Run]) -> None:
    """`mask` [T, T] says who sees whom, not what is a pad."""
    case = CASES["torch_encoder_norm_first"]
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    inputs = {"src": case.inputs("right")["src"], "mask": causal, "is_causal": True}
    run = recorded(case.build(), "resid_post", inputs)
    assert [len(run.select("resid_post[0]")[0][number]) for number in range(BATCH)] == [7] * BATCH


def test_float_padding_mask_of_torch_encoder(recorded: Callable[..., Run]) -> None:
    """A padding mask of 0 and -inf drops the same rows as a boolean one."""
    case = CASES["torch_encoder"]
    inputs = case.inputs("right")
    floating = torch.zeros(inputs["src_key_padding_mask"].shape).masked_fill(inputs["src_key_padding_mask"], float("-inf"))
    run = recorded(case.build(), "resid_post", {**inputs, "src_key_padding_mask": floating})
    assert [len(run.select("resid_post[0]")[0][number]) for number in range(BATCH)] == list(LENGTHS)


def test_tokens_and_positions_beside_the_sites(recorded: Callable[..., Run]) -> None:
    """input_ids are the real tokens; position is what the model was given, else the place in the example."""
    inputs = batch("left")
    run = recorded(CASES["llama"].build(), "resid_pre[0]", inputs)
    mask = inputs["attention_mask"]
    assert torch.equal(run["token/input_ids"].to_torch(), packed(inputs["input_ids"], mask))
    assert [run["token/position"][number].tolist() for number in range(BATCH)] == [list(range(n)) for n in LENGTHS]
    given = {**inputs, "position_ids": (mask.cumsum(1) + 3).clamp(max=18)}
    run = recorded(gpt2(), "resid_pre[0]", given)
    assert torch.equal(run["token/position"].to_torch(), packed(given["position_ids"], mask))
    assert run["token/transformer.h.0:in"].shape == (sum(LENGTHS), HIDDEN)
