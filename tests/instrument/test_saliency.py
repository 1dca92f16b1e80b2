"""A * dL/dA, rebuilt from a run: what a copy of the model that materialises its weights gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradient_models import (
    IDS,
    apart,
    bloom,
    build,
    checkpointing,
    deepseek,
    eager,
    gpt_neo,
    gpt_oss,
    loss_of,
    per_example,
    real_parts,
    saliency_of,
    without_dropout,
)
from tiny_models import (
    BATCH,
    CASES,
    DECODER_LENGTHS,
    LENGTHS,
    albert,
    batch,
    batch_with_positions,
    bert,
    gpt2,
    llama,
    padding_mask,
    sdpa_decoder,
)
from torch import Tensor, nn

from tensortape.instrument import Recorder, Site
from tensortape.instrument.attention.check import Sample
from tensortape.stores import Run
from tensortape.stores.errors import AttentionNotRecordedError, GradientError

Make = Callable[..., Recorder]
Opened = Callable[[Recorder], Run]
MASK = padding_mask()
NEAR = 1e-5
FAMILIES = ["gpt2", "llama", "qwen3", "mistral", "bert", "t5", "gemma2", "torch_encoder", "torch_encoder_time_first"]
CHECKPOINTED = ["gpt2", "llama", "qwen3", "mistral", "bert", "t5", "gemma2"]


def masks(path: str, side: str) -> tuple[Tensor, Tensor]:
    """Real queries and keys of an attention module, by its path."""
    inner, outer = padding_mask(side, DECODER_LENGTHS), padding_mask(side)
    if "decoder.block" not in path:
        return outer, outer
    return inner, outer if "EncDec" in path else inner


def check(run: Run, wanted: dict[str, Any], side: str) -> None:
    """Every attention site of a run agrees with A * dL/dA of the copy, and so does every error of the identity."""
    assert sorted(run.attention_sites) == sorted(wanted)
    for path in wanted:
        parts = real_parts(saliency_of(wanted, path), *masks(path, side))
        assert apart([run.saliency(path)[number] for number in range(BATCH)], parts) <= NEAR, path


def record_loss(recorder: Recorder, name: str, model: nn.Module, side: str = "right") -> None:
    """One batch of a case, with its backward."""
    case = CASES[name]
    with recorder.batch(ids=IDS, **case.batch(side)), recorder.target("loss", reduction="sum"):
        loss_of(case, model, side).sum().backward()


def eager_loss(name: str, side: str = "right") -> dict[str, Any]:
    """What a copy that materialises its weights shows."""
    case = CASES[name]
    return eager(build(name), lambda copied: loss_of(case, copied, side).sum().backward())


# --- every family ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_saliency(name: str, side: str, make: Make, opened: Opened) -> None:
    """At most 1e-5 from the copy's, relative to the largest of a site."""
    model = build(name)
    recorder = make(model, "attention.grad")
    record_loss(recorder, name, model, side)
    check(opened(recorder), eager_loss(name, side), side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_saliency_under_checkpointing(name: str, reentrant: bool, side: str, make: Make, opened: Opened) -> None:
    """The same from a model that computes its blocks once more in backward."""
    model = checkpointing(build(name), reentrant=reentrant)
    recorder = make(model, "attention.grad")
    record_loss(recorder, name, model, side)
    check(opened(recorder), eager_loss(name, side), side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make_model", [gpt_oss, deepseek], ids=["gpt_oss", "deepseek"])
def test_saliency_of_sinks_and_of_narrow_values(make_model: Callable[[], Any], side: str, make: Make, opened: Opened) -> None:
    """A sink takes part in the softmax only; values may be narrower than keys."""
    model, inputs = make_model(), batch(side)
    recorder = make(model, "attention.grad")

    def run_of(model: nn.Module) -> None:
        per_example(model(**inputs), inputs["attention_mask"]).sum().backward()

    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        run_of(model)
    run, wanted = opened(recorder), eager(model, run_of)
    for path in run.attention_sites:
        found = saliency_of(wanted, path)[..., : inputs["input_ids"].shape[1]]  # a sink's column is the last
        parts = real_parts(found, inputs["attention_mask"])
        assert apart([run.saliency(path)[number] for number in range(BATCH)], parts) <= NEAR


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make_model", [bloom, gpt_neo], ids=["bloom", "gpt_neo"])
def test_saliency_of_models_with_a_softmax_of_their_own(
    make_model: Callable[[], Any], side: str, make: Make, opened: Opened
) -> None:
    """There the weights themselves are recorded, and their gradient."""
    model = without_dropout(make_model())
    inputs = batch_with_positions(side) if make_model is gpt_neo else batch(side)
    recorder = make(model, "attention.grad")

    def run_of(model: nn.Module) -> None:
        per_example(model(**inputs), inputs["attention_mask"]).sum().backward()

    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        run_of(model)
    run, wanted = opened(recorder), eager(model, run_of)
    assert len(run.attention_sites) == len(wanted) == 2
    for path in run.attention_sites:
        parts = real_parts(saliency_of(wanted, path), inputs["attention_mask"])
        assert apart([run.saliency(path)[number] for number in range(BATCH)], parts) <= NEAR
        whole = real_parts(wanted[path][0][1], inputs["attention_mask"])
        gradients = run[f"{path}:weights.grad@loss"]
        for number, length in enumerate(LENGTHS):
            grid = gradients[number].reshape(length, length, -1).transpose(2, 0, 1)
            assert np.abs(grid - whole[number]).max() <= NEAR * np.abs(whole[number]).max()


def test_saliency_of_a_softmax_with_dropout(make: Make, opened: Opened) -> None:
    """Dropout comes after these weights, so their gradient is exact under it, too."""
    model = gpt_neo().train()
    for block in model.h:
        block.attn.attention.attn_dropout.p = 0.3
    inputs, recorder = batch(), make(model, "attention.grad")
    torch.manual_seed(5)
    wanted = eager(model, lambda copied: per_example(copied(**inputs), MASK).sum().backward())
    torch.manual_seed(5)
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        per_example(model(**inputs), MASK).sum().backward()
    run = opened(recorder)
    for path in run.attention_sites:
        parts = real_parts(saliency_of(wanted, path), MASK)
        assert apart([run.saliency(path)[number] for number in range(BATCH)], parts) <= NEAR


@pytest.mark.parametrize("side", ["right"])
def test_saliency_of_hand_written_attention(side: str, make: Make, opened: Opened) -> None:
    """scaled_dot_product_attention called by the model itself."""
    model, plain = sdpa_decoder(inplace=True), sdpa_decoder()
    tokens = batch(side)["input_ids"]
    recorder = make(model, "attention.grad")
    with recorder.batch(ids=IDS, mask=MASK), recorder.target("loss", reduction="sum"):
        per_example(model(tokens), MASK).sum().backward()
    wanted = eager(plain, lambda copied: per_example(copied(tokens), MASK).sum().backward())
    check(opened(recorder), wanted, side)


@pytest.mark.parametrize("reentrant", [True, False])
def test_hand_written_attention_under_checkpointing(reentrant: bool, make: Make, opened: Opened) -> None:
    """Checkpointed by hand: a function called once more in backward is seen again where that matters."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sdpa_decoder()

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.inner.table(tokens)
            for block in self.inner.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return self.inner.norm(x)

    model, tokens = Checkpointed(), batch()["input_ids"]
    recorder = make(model, "attention.grad")
    with recorder.batch(ids=IDS, mask=MASK), recorder.target("loss", reduction="sum"):
        per_example(model(tokens), MASK).sum().backward()
    run = opened(recorder)
    wanted = eager(sdpa_decoder(), lambda copied: per_example(copied(tokens), MASK).sum().backward())
    for path in wanted:
        parts = real_parts(saliency_of(wanted, path), MASK)
        assert apart([run.saliency(f"inner.{path}")[number] for number in range(BATCH)], parts) <= NEAR


def test_every_call_of_shared_attention(make: Make, opened: Opened) -> None:
    """ALBERT calls one attention module once per layer; each call has saliency of its own."""
    model = without_dropout(albert())
    recorder = make(model, "attention.grad")

    def run_of(model: nn.Module) -> None:
        per_example(model(**batch()), MASK).sum().backward()

    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        run_of(model)
    run = opened(recorder)
    [(path, _)] = (wanted := eager(model, run_of)).items()
    assert run.attention_sites == [path, f"{path}#2", f"{path}#3"]
    for call, site in enumerate(run.attention_sites, 1):
        parts = real_parts(saliency_of(wanted, path, call), MASK)
        assert apart([run.saliency(site)[number] for number in range(BATCH)], parts) <= NEAR


def test_several_batches_and_two_targets(make: Make, opened: Opened) -> None:
    """Each target has saliency of its own, in every batch."""
    model = build("llama")
    recorder = make(model, "attention.grad")
    for part in range(2):
        inputs = batch(seed=part)
        with recorder.batch(ids=[f"{part}.{row}" for row in range(BATCH)]):
            losses, others = (per_example(output, MASK, seed) for output in [model(**inputs)] for seed in (0, 1))
            with recorder.target("positive", reduction="sum"):
                losses.sum().backward(retain_graph=True)
            with recorder.target("loss", reduction="mean"):
                others.mean().backward()
    run = opened(recorder)
    for part in range(2):
        inputs = batch(seed=part)
        for target, seed in (("positive", 0), ("loss", 1)):
            wanted = eager(
                build("llama"),
                lambda copied, seed=seed, inputs=inputs: per_example(copied(**inputs), MASK, seed).sum().backward(),
            )
            for path in wanted:
                found = run.saliency(path, target)
                parts = real_parts(saliency_of(wanted, path), MASK)
                assert apart([found[part * BATCH + number] for number in range(BATCH)], parts) <= NEAR, (part, target, path)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_targets_under_checkpointing(reentrant: bool, make: Make, opened: Opened) -> None:
    """Each backward computes the blocks once more; each target gets its own gradients."""
    model = checkpointing(build("llama"), reentrant=reentrant)
    recorder = make(model, "attention.grad")
    with recorder.batch(ids=IDS):
        losses, others = (per_example(output, MASK, seed) for output in [model(**batch())] for seed in (0, 1))
        with recorder.target("positive", reduction="sum"):
            losses.sum().backward(retain_graph=True)
        with recorder.target("loss", reduction="sum"):
            others.sum().backward()
    run = opened(recorder)
    for target, seed in (("positive", 0), ("loss", 1)):
        wanted = eager(build("llama"), lambda copied, seed=seed: per_example(copied(**batch()), MASK, seed).sum().backward())
        for path in wanted:
            parts = real_parts(saliency_of(wanted, path), MASK)
            assert apart([run.saliency(path, target)[number] for number in range(BATCH)], parts) <= NEAR


def test_parts_of_a_matrix(make: Make, opened: Opened) -> None:
    """Heads, queries and keys by number, slice or list are those of the whole matrix."""
    model = build("llama")
    recorder = make(model, "attention.grad")
    record_loss(recorder, "llama", model)
    run, site = opened(recorder), "layers.1.self_attn"
    whole = run.saliency(site)[0]
    assert apart([run.saliency(site, heads=1)[0]], [whole[1:2]]) < 1e-6
    assert apart([run.saliency(site, queries=slice(2, 5), keys=[0, 3])[0]], [whole[:, 2:5, [0, 3]]]) < 1e-6
    assert np.array_equal(run.saliency("attention[1]")[0], whole)
    assert np.array_equal(run.saliency(1)[0], whole)
    tiles = list(run.saliency(site).tiles(0, tile_bytes=100))
    assert len(tiles) > 1
    assert apart([np.concatenate([tile for _, tile in tiles], 1)], [whole]) < 1e-6


def test_nothing_above_the_diagonal(make: Make, opened: Opened) -> None:
    """dL/dA where a query may not attend means nothing, and never shows."""
    model = build("gpt2")
    recorder = make(model, "attention.grad")
    record_loss(recorder, "gpt2", model)
    run = opened(recorder)
    for path in run.attention_sites:
        assert not np.triu(run.saliency(path)[0], 1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_saliency_of_other_dtypes(dtype: torch.dtype, make: Make, opened: Opened) -> None:
    """float64 is kept; of bfloat16 models the saliency is near that of a wide copy, as far as bfloat16 goes."""
    model = build("llama").to(dtype)
    recorder = make(model, "attention.grad")
    record_loss(recorder, "llama", model)
    run = opened(recorder)
    wanted = eager(model.double(), lambda copied: loss_of(CASES["llama"], copied).sum().backward())
    for path in wanted:
        parts = real_parts(saliency_of(wanted, path), MASK)
        assert apart([run.saliency(path)[number] for number in range(BATCH)], parts) <= (NEAR if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("size", [1.0, 2e-6, 1e-12])
def test_saliency_from_float16_gradients(size: float, make: Make, opened: Opened) -> None:
    """Stored in 16 bits with a scale per example, tiny gradients give a saliency as good as 16 bits of q, k and v allow."""
    model = build("llama")
    recorder = make(model, Site("attention.grad", dtype="float16"))
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        (loss_of(CASES["llama"], model).sum() * size).backward()
    run, wanted = opened(recorder), eager_loss("llama")
    for path in wanted:
        parts = [part * size for part in real_parts(saliency_of(wanted, path), MASK)]
        assert apart([run.saliency(path)[number] for number in range(BATCH)], parts) <= 1e-2


@pytest.mark.parametrize("size", [1.0, 2e-6, 1e-12])
def test_saliency_from_float16_weights(size: float, make: Make, opened: Opened) -> None:
    """The same where the gradient of the weights themselves is stored."""
    model = without_dropout(gpt_neo())
    recorder = make(model, Site("attention.grad", dtype="float16"))
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        (per_example(model(**batch()), MASK).sum() * size).backward()
    run = opened(recorder)
    wanted = eager(model, lambda copied: per_example(copied(**batch()), MASK).sum().backward())
    for path in wanted:
        parts = [part * size for part in real_parts(saliency_of(wanted, path), MASK)]
        assert apart([run.saliency(path)[number] for number in range(BATCH)], parts) <= 1e-2


# --- dropout ---------------------------------------------------------------------------------------------------------------------


def dropping(name: str) -> Any:
    """A model with dropout in its attention and nowhere else, and the path of its first attention module."""
    if name == "gpt2":
        return gpt2(attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0), "transformer.h.0.attn"
    if name == "bert":
        return bert(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0), "encoder.layer.0.attention.self"
    if name == "llama":
        return llama(attention_dropout=0.3), "layers.0.self_attn"
    model = build("torch_encoder")
    for layer in model.layers:
        layer.self_attn.dropout = 0.3
    return model, "layers.0.self_attn"


@pytest.mark.parametrize("first_in_train_mode", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "torch_encoder"])
def test_dropout_is_refused_for_the_examples_concerned(name: str, first_in_train_mode: bool, make: Make, opened: Opened) -> None:
    """Of two batches the one in train mode has no saliency, and the error says why; the other has."""
    model, path = dropping(name)
    recorder = make(model, "attention.grad")
    for part in range(2):
        trains = (part == 0) == first_in_train_mode
        model.train(trains)
        with recorder.batch(ids=[f"{part}.{row}" for row in range(BATCH)]), recorder.target("loss", reduction="sum"):
            loss_of(CASES[name], model).sum().backward()
    run = opened(recorder)
    refused, fine = (range(BATCH), range(BATCH, 10)) if first_in_train_mode else (range(BATCH, 10), range(BATCH))
    for number in refused:
        with pytest.raises(GradientError, match=r"dropout of 0\.3"):
            run.saliency(path)[number]
    model.eval()
    wanted = eager(model, lambda copied: loss_of(CASES[name], copied).sum().backward())
    assert apart([run.saliency(path)[number] for number in fine], real_parts(saliency_of(wanted, path), MASK)) <= NEAR


def test_dropout_elsewhere_is_fine(make: Make, opened: Opened) -> None:
    """Only dropout of the weights matters; that of the residual stream is in the gradients."""
    model = gpt2(attn_pdrop=0.0, resid_pdrop=0.3, embd_pdrop=0.3).train()
    recorder = make(model, "attention.grad")
    torch.manual_seed(1)
    record_loss(recorder, "gpt2", model)
    run = opened(recorder)
    torch.manual_seed(1)
    wanted = eager(model, lambda copied: loss_of(CASES["gpt2"], copied).sum().backward())
    check(run, wanted, "right")


# --- the identity ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bert", "gemma2", "t5", "torch_encoder"])
def test_the_identity_holds(name: str, make: Make, opened: Opened) -> None:
    """rowsum(A dL/dA) = rowsum(dL/dz z) to rounding, at every site, for a sample of every batch."""
    model = build(name)
    recorder = make(model, "attention.grad")
    record_loss(recorder, name, model)
    run = opened(recorder)
    for path in run.attention_sites:
        errors = run[f"example/{path}:z.grad@loss|identity"].rows()
        assert errors.shape == (BATCH,)
        checked = errors[~np.isnan(errors)]
        assert len(checked) == 1
        assert 0 <= checked[0] < 1e-5


def sample(**changes: Tensor) -> tuple[Sample, Tensor]:
    """A sample of a causal call that is right, or wrong in some way; and dL/dz."""
    made = torch.Generator().manual_seed(0)
    q, k, v, dz = (torch.randn(2, 3, 7, 5, generator=made) for _ in range(4))
    weights = torch.softmax((q @ k.transpose(-1, -2) * 5**-0.5).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf), -1)
    at = torch.tensor([0, 2, 4, 6])
    right = {"weights": weights[1][:, at], "values": v[1], "outputs": (weights @ v)[1][:, at]}
    return Sample(example=1, row=1, queries=at, **{**right, **changes}), dz


def test_the_identity_of_a_sample() -> None:
    """Small where weights, values, outputs and gradient belong together."""
    right, dz = sample()
    assert right.identity_error(dz) < 1e-5
    assert right.identity_error(torch.zeros_like(dz)) == 0


@pytest.mark.parametrize("what", ["heads", "scale", "mask", "values", "outputs"])
def test_the_identity_of_a_corrupted_sample(what: str) -> None:
    """Large where any of them is another's."""
    right, dz = sample()
    wrong = {
        "heads": lambda: {"weights": right.weights.roll(1, 0)},
        "outputs": lambda: {"outputs": right.outputs.roll(1, 1)},
        "scale": lambda: {"weights": torch.softmax(right.weights.clamp(min=1e-9).log() * 2, -1)},
        "mask": lambda: {"weights": torch.softmax(right.weights, -1)},
        "values": lambda: {"values": right.values.roll(1, 0)},
    }[what]()
    assert sample(**wrong)[0].identity_error(dz) > 0.01


def test_the_identity_says_nothing_of_the_gradient() -> None:
    """sum_j A_ij (g_i v_j) = g_i z_i whatever g is: it tells wrong weights, values and outputs, but no wrong gradient."""
    right, dz = sample()
    for wrong in (dz.roll(1, 1), dz.roll(1, 0), dz.flip(-1), torch.randn(dz.shape, generator=torch.Generator().manual_seed(9))):
        assert right.identity_error(wrong) < 1e-5


# --- what there is not -----------------------------------------------------------------------------------------------------------


def test_without_values_and_gradients(make: Make, opened: Opened) -> None:
    """A run with attention alone says what to record."""
    model = build("llama")
    recorder = make(model, "attention")
    record_loss(recorder, "llama", model)
    run = opened(recorder)
    with pytest.raises(AttentionNotRecordedError, match=r"attention\.grad"):
        run.saliency("layers.0.self_attn")


def test_a_target_that_was_not_recorded(make: Make, opened: Opened) -> None:
    """The error names what was."""
    model = build("llama")
    recorder = make(model, "attention.grad")
    record_loss(recorder, "llama", model)
    run = opened(recorder)
    with pytest.raises(AttentionNotRecordedError, match=r"z\.grad@loss"):
        run.saliency("layers.0.self_attn", "positive")


def test_one_port_alone(make: Make, opened: Opened) -> None:
    """`z.grad` of one module is recorded by itself, [T, head, dv]."""
    model = build("llama")
    recorder = make(model, "layers.1.self_attn:z.grad")
    record_loss(recorder, "llama", model)
    both = make(model, "attention.grad")
    record_loss(both, "llama", model)
    run, whole = opened(recorder), opened(both)
    column = run["layers.1.self_attn:z.grad@loss"]
    for number, length in enumerate(LENGTHS):
        assert column[number].shape == (length, 2, 26)
        assert np.array_equal(column[number], whole["layers.1.self_attn:z.grad@loss"][number])


@pytest.mark.parametrize("name", ["llama", "bert", "torch_encoder"])
def test_nothing_is_left_behind(name: str, make: Make) -> None:
    """No hook, patch or attribute after a batch with attention and gradients."""
    from transformers.modeling_utils import AttentionInterface

    original, model = AttentionInterface.get_interface, build(name)
    before = copy.deepcopy({path: set(vars(module)) for path, module in model.named_modules()})
    recorder = make(model, "attention.grad")
    record_loss(recorder, name, model)
    assert AttentionInterface.get_interface is original
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
