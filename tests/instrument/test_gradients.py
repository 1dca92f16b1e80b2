"""Gradients: those of plain autograd, of each example, and nothing of the training changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradient_models import (
    IDS,
    build,
    checkpointing,
    loss_of,
    parameter_gradients,
    per_example,
    retained,
    same_gradients,
    without_dropout,
)
from tiny_models import (
    BATCH,
    CASES,
    LENGTHS,
    VOCABULARY,
    albert,
    batch,
    bert,
    gpt2,
    hook_count,
    llama,
    packed,
    padding_mask,
    sdpa_decoder,
    seeded,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tensortape.instrument import Recorder, Site
from tensortape.instrument.errors import BatchError, ForwardError, InstrumentError, SiteNotFoundError
from tensortape.stores import Run
from tensortape.stores.errors import GradientError, StoreError

Make = Callable[..., Recorder]
Opened = Callable[[Recorder], Run]
MASK = padding_mask()
TRAINED = ["gpt2", "llama", "bert", "t5", "torch_encoder", "torch_encoder_time_first"]


@pytest.fixture(autouse=True)
def _random_numbers() -> Iterator[None]:
    """Nothing of one test's random numbers is left for the next."""
    with torch.random.fork_rng():
        yield


def sites_of(name: str) -> list[tuple[str, str]]:
    """(stack, `path:port`) of the input and output of every block of a case."""
    return [(stack, f"{path}:{port}") for stack, paths in CASES[name].blocks.items() for path in paths for port in ("in", "out")]


def rows_of(gradient: Tensor, mask: Tensor | None, *, time_first: bool = False) -> Tensor:
    """Real rows of a gradient."""
    return packed(gradient.transpose(0, 1) if time_first else gradient, mask)


def llama_loss(model: nn.Module, seed: int = 0, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """The loss of every example of a ragged batch, [B]."""
    given = batch() if inputs is None else inputs
    return per_example(model(**given), given["attention_mask"], seed)


def llama_gradients(model: nn.Module, run: Callable[[nn.Module], Any], *sites: str) -> dict[str, Tensor]:
    """Real rows of plain autograd's gradients at Llama's sites, all blocks' outputs unless told otherwise."""
    wanted = sites or tuple(f"layers.{layer}:out" for layer in range(3))
    return {site: packed(found[-1], MASK) for site, found in retained(model, wanted, run).items()}


# --- equal to plain autograd -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_plain_autograd(name: str, side: str, make: Make, opened: Opened) -> None:
    """At inputs and outputs of all blocks, bit for bit, and so are the parameters' gradients."""
    case, model, plain = CASES[name], build(name), build(name)
    recorder = make(model, ["resid_pre:in.grad", "resid_post:out.grad"])
    with recorder.batch(ids=IDS, **case.batch(side)), recorder.target("loss", reduction="sum"):
        loss_of(case, model, side).sum().backward()
    run = opened(recorder)
    wanted = retained(plain, [site for _, site in sites_of(name)], lambda copied: loss_of(case, copied, side).sum().backward())
    for stack, site in sites_of(name):
        rows = rows_of(wanted[site][0], case.mask(stack, side), time_first=case.time_first)
        assert float(rows.abs().max()) > 0
        assert torch.equal(run[f"{site}.grad@loss"].to_torch(), rows), site
    loss_of(case, plain, side).sum().backward()
    assert same_gradients(model, plain)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(reentrant: bool, name: str, make: Make, opened: Opened) -> None:
    """What a checkpoint computes once more gives the same gradients, inside the blocks, too; once."""
    case = CASES[name]
    model, plain = checkpointing(build(name), reentrant=reentrant), build(name).train()
    inner = {"gpt2": "mlp", "llama": "mlp", "bert": "output.dense", "t5": "layer.0"}[name]
    paths = [f"{path}.{inner}" for paths in case.blocks.values() for path in paths]
    recorder = make(model, ["resid_post:out.grad", *(f"{path}:out.grad" for path in paths), *(f"{path}:in.grad" for path in paths)])
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        loss_of(case, model).sum().backward()
    run = opened(recorder)
    sites = [f"{path}:out" for paths in case.blocks.values() for path in paths]
    sites += [f"{path}:{port}" for path in paths for port in ("in", "out")]
    wanted = retained(plain, sites, lambda copied: loss_of(case, copied).sum().backward())
    for site in sites:
        stack = next(stack for stack, blocks in case.blocks.items() if any(site.startswith(block) for block in blocks))
        rows = packed(wanted[site][0], case.mask(stack, "right"))
        # T5's decoder blocks share the encoder's output, whose gradient a checkpoint adds up in another order (torch's own hooks
        # then differ by up to 3.8e-6).
        near = 5e-6 * float(rows.abs().max()) if name == "t5" else 0.0
        torch.testing.assert_close(run[f"{site}.grad@loss"].to_torch(), rows, rtol=0, atol=near, msg=site)


def test_the_value_before_an_operation_in_place(make: Make, opened: Opened) -> None:
    """Outputs that the model then changes in place: the gradient is that of what the module gave."""
    model, plain = sdpa_decoder(inplace=True), sdpa_decoder()
    tokens = batch()["input_ids"]
    sites = [f"blocks.{layer}.{path}:out" for layer in range(3) for path in ("attention.proj", "mlp.0", "mlp", "norm_2")]
    recorder = make(model, [f"{site}.grad" for site in sites])
    with recorder.batch(ids=IDS, mask=MASK):
        per_example(model(tokens), MASK).sum().backward()
    run = opened(recorder)
    wanted = retained(plain, sites, lambda copied: per_example(copied(tokens), MASK).sum().backward())
    for site in sites:
        torch.testing.assert_close(run[f"{site}.grad@loss"].to_torch(), packed(wanted[site][0], MASK), rtol=0, atol=0, msg=site)


class OnView(nn.Module):
    """Changes a view of a module's output in place, or does the same without."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 13), nn.Linear(13, 3)
        self.inplace = inplace

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] to [B, T, 3]."""
        x = self.first(self.table(input_ids))
        if self.inplace:
            x[..., ::2].mul_(3.0)
            x.unflatten(0, (1, -1))[..., 1::2].sub_(1.0).clamp_(min=-0.5)
        else:
            even = torch.arange(13) % 2 == 0
            x = torch.where(even, x * 3.0, (x - 1.0).clamp(min=-0.5))
        return self.last(x.tanh())


def test_the_value_before_an_operation_in_place_on_a_view(make: Make, opened: Opened) -> None:
    """A view of the output that is changed in place."""
    model, plain = (seeded(lambda inplace=inplace: OnView(inplace=inplace)) for inplace in (True, False))
    recorder = make(model, "first:out.grad")
    with recorder.batch(ids=IDS, mask=MASK):
        per_example(model(batch()["input_ids"]), MASK).sum().backward()
    wanted = retained(plain, ["first:out"], lambda copied: per_example(copied(batch()["input_ids"]), MASK).sum().backward())
    torch.testing.assert_close(opened(recorder)["first:out.grad@loss"].to_torch(), packed(wanted["first:out"][0], MASK))


class Half(nn.Module):
    """Gives a view of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d / 2]."""
        return x[..., ::2]


class Unused(nn.Module):
    """A view of a tensor that the model also uses itself; only some targets use the view."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.part, self.last = nn.Embedding(VOCABULARY, 12), Half(), nn.Linear(12, 3)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] to [B, T, 3] and [B, T, 6]."""
        x = self.table(input_ids) * 2
        return self.last(x.tanh()), self.part(x)


@pytest.mark.parametrize("used", [True, False])
def test_a_view_that_a_target_does_not_use(used: bool, make: Make, opened: Opened) -> None:
    """Its gradient is its own, not that of the tensor it is a view of: none, or zeros, where the target does not depend on it."""
    model = seeded(Unused)
    recorder, tokens = make(model, ["part:out.grad", "last:out.grad"]), batch()["input_ids"]

    def run_batch() -> None:
        with recorder.batch(ids=IDS, mask=MASK):
            whole, half = model(tokens)
            (per_example(whole, MASK).sum() + (per_example(half, MASK, 1).sum() if used else 0)).backward()

    if used:
        run_batch()
        wanted = retained(seeded(Unused), ["part:out"], lambda copied: per_example(copied(tokens)[1], MASK, 1).sum().backward())
        assert torch.equal(opened(recorder)["part:out.grad@loss"].to_torch(), packed(wanted["part:out"][0], MASK))
        return
    try:
        run_batch()
    except SiteNotFoundError:
        return
    assert not opened(recorder)["part:out.grad@loss"].rows().any()


@pytest.mark.parametrize("path", ["blocks.0.attention", "encoder.layer.0.attention"])
def test_a_module_of_the_name_attention(path: str, make: Make, opened: Opened) -> None:
    """By its whole path it is a module like any other, though `attention` is an alias, too."""
    model = sdpa_decoder() if path.startswith("blocks") else build("bert")
    given = {"tokens": batch()["input_ids"]} if path.startswith("blocks") else batch()
    recorder = make(model, [f"{path}:out", f"{path}:out.grad"])
    with recorder.batch(ids=IDS, mask=MASK):
        per_example(model(**given), MASK).sum().backward()
    assert {column.site["path"] for column in opened(recorder).sites} == {path}


def test_every_call_of_a_shared_module(make: Make, opened: Opened) -> None:
    """ALBERT is one block, called once per layer: each call has a gradient of its own."""
    model, plain, site = without_dropout(albert()), without_dropout(albert()), "encoder.albert_layer_groups.0.albert_layers.0"
    recorder = make(model, f"{site}:out.grad")
    with recorder.batch(ids=IDS):
        llama_loss(model).sum().backward()
    run = opened(recorder)
    wanted = retained(plain, [f"{site}:out"], lambda copied: llama_loss(copied).sum().backward())[f"{site}:out"]
    for call, gradient in enumerate(wanted, 1):
        name = site if call == 1 else f"{site}#{call}"
        assert torch.equal(run[f"{name}:out.grad@loss"].to_torch(), packed(gradient, MASK))


class Twice(nn.Module):
    """Blocks that share their weights, in segments that are computed once more in backward; `segments` are calls per segment."""

    def __init__(self, segments: tuple[tuple[int, bool], ...], *, reentrant: bool) -> None:
        super().__init__()
        self.table, self.block = nn.Embedding(VOCABULARY, 12), nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.segments, self.reentrant = segments, reentrant

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] to [B, T, d]."""
        x = self.table(input_ids)
        for calls, checkpointed in self.segments:

            def several(x: Tensor, calls: int = calls) -> Tensor:
                for _ in range(calls):
                    x = self.block(x)
                return x

            x = checkpoint(several, x, use_reentrant=self.reentrant) if checkpointed else several(x)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "segments",
    [((1, True), (1, True), (1, True)), ((2, True), (1, True)), ((1, True), (1, False)), ((1, False), (2, True))],
    ids=["one_each", "two_in_one", "then_plain", "plain_then_two"],
)
def test_calls_of_a_shared_module_under_checkpointing(
    segments: tuple[tuple[int, bool], ...], reentrant: bool, make: Make, opened: Opened
) -> None:
    """However calls are spread over checkpoints, each call's gradient is under its own number."""
    model = seeded(lambda: Twice(segments, reentrant=reentrant))
    plain = seeded(lambda: Twice(tuple((calls, False) for calls, _ in segments), reentrant=reentrant))
    recorder = make(model, "block:out.grad")
    with recorder.batch(ids=IDS, mask=MASK):
        per_example(model(batch()["input_ids"]), MASK).sum().backward()
    run = opened(recorder)
    wanted = retained(plain, ["block:out"], lambda copied: per_example(copied(batch()["input_ids"]), MASK).sum().backward())
    for call, gradient in enumerate(wanted["block:out"], 1):
        name = "block" if call == 1 else f"block#{call}"
        assert torch.equal(run[f"{name}:out.grad@loss"].to_torch(), packed(gradient, MASK)), call


def test_a_leaf_of_an_output(make: Make, opened: Opened) -> None:
    """`out[...].grad` picks a tensor of a nested output."""
    model, plain = build("bert"), build("bert")
    recorder = make(model, [":out[pooler_output].grad", ":out[last_hidden_state].grad"])

    def run_of(model: nn.Module) -> None:
        output = model(**batch())
        output.last_hidden_state.retain_grad()
        output.pooler_output.retain_grad()
        (per_example(output, MASK).sum() + torch.tanh(output.pooler_output).sum()).backward()
        found.update(pooled=output.pooler_output.grad, states=packed(output.last_hidden_state.grad, MASK))

    found: dict[str, Tensor] = {}
    with recorder.batch(ids=IDS):
        run_of(model)
    run = opened(recorder)
    run_of(plain)
    assert torch.equal(run[":out[pooler_output].grad@loss"].to_torch(), found["pooled"])
    assert torch.equal(run[":out[last_hidden_state].grad@loss"].to_torch(), found["states"])


def test_values_and_gradients_of_one_site(make: Make, opened: Opened) -> None:
    """Both are recorded side by side, with the same rows per example."""
    model = build("llama")
    recorder = make(model, ["resid_post", "resid_post:out.grad"])
    with recorder.batch(ids=IDS):
        llama_loss(model).sum().backward()
    run = opened(recorder)
    for number, length in enumerate(LENGTHS):
        assert run["layers.1:out"][number].shape == run["layers.1:out.grad@loss"][number].shape == (length, 52)
    assert run["layers.1:out.grad@loss"].site["target"] == {"name": "loss", "reduction": None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_a_gradient(dtype: torch.dtype, make: Make, opened: Opened) -> None:
    """That of the tensor it belongs to."""
    model, plain = build("llama").to(dtype), build("llama").to(dtype)
    recorder = make(model, "resid_post:out.grad")
    with recorder.batch(ids=IDS):
        llama_loss(model).sum().backward()
    run = opened(recorder)
    for site, wanted in llama_gradients(plain, lambda copied: llama_loss(copied).sum().backward()).items():
        found = run[f"{site}.grad@loss"].to_torch()
        assert found.dtype == dtype
        assert torch.equal(found, wanted)


# --- several backward calls ------------------------------------------------------------------------------------------------------


def test_several_backward_calls_add_up(make: Make, opened: Opened) -> None:
    """With retain_graph, gradients of one target are those of the sum."""
    model, plain = build("llama"), build("llama")
    recorder = make(model, "resid_post:out.grad")

    def run_of(model: nn.Module) -> None:
        losses = llama_loss(model)
        losses[:2].sum().backward(retain_graph=True)
        losses[2:].sum().backward(retain_graph=True)
        (losses[1] * 3).backward()

    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        run_of(model)
    run = opened(recorder)
    for site, wanted in llama_gradients(plain, run_of).items():
        torch.testing.assert_close(run[f"{site}.grad@loss"].to_torch(), wanted, rtol=1e-6, atol=1e-7)
    run_of(plain)
    assert same_gradients(model, plain)


@pytest.mark.parametrize("how", ["plain", "non-reentrant", "reentrant"])
def test_two_targets_in_one_batch(how: str, make: Make, opened: Opened) -> None:
    """One column per target, and `.grad` is what both backward calls leave."""
    model, plain = build("llama").train(), build("llama").train()
    if how != "plain":
        for one in (model, plain):
            checkpointing(one, reentrant=how == "reentrant")
    recorder = make(model, ["resid_post:out.grad", "layers.*.mlp:out.grad"])
    with recorder.batch(ids=IDS):
        losses, others = (per_example(output, MASK, seed) for output in [model(**batch())] for seed in (0, 1))
        with recorder.target("positive", reduction="sum"):
            losses.sum().backward(retain_graph=True)
        with recorder.target("loss", reduction="sum"):
            others.sum().backward()
    run = opened(recorder)
    sites = [f"layers.{layer}{inner}:out" for layer in range(3) for inner in ("", ".mlp")]
    bare = build("llama")
    for target, seed in (("positive", 0), ("loss", 1)):
        found = llama_gradients(bare, lambda copied, seed=seed: llama_loss(copied, seed).sum().backward(), *sites)
        for site, wanted in found.items():
            assert torch.equal(run[f"{site}.grad@{target}"].to_torch(), wanted), (site, target)
    losses, others = (per_example(output, MASK, seed) for output in [plain(**batch())] for seed in (0, 1))
    losses.sum().backward(retain_graph=True)
    others.sum().backward()
    assert same_gradients(model, plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_backward_calls_under_checkpointing_add_up(reentrant: bool, make: Make, opened: Opened) -> None:
    """Each backward computes the blocks once more; inside them, too, gradients are those of the sum."""
    model, plain = checkpointing(build("llama"), reentrant=reentrant), build("llama")
    recorder = make(model, ["layers.*.mlp:out.grad"])

    def run_of(model: nn.Module) -> None:
        losses = llama_loss(model)
        losses[:3].sum().backward(retain_graph=True)
        losses[3:].sum().backward()

    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        run_of(model)
    run = opened(recorder)
    for site, wanted in llama_gradients(plain, run_of, "layers.0.mlp:out", "layers.2.mlp:out").items():
        torch.testing.assert_close(run[f"{site}.grad@loss"].to_torch(), wanted, rtol=1e-6, atol=1e-7)


def test_only_the_target_that_was_asked_for(make: Make, opened: Opened) -> None:
    """`out.grad@positive` leaves the gradients of other targets out."""
    model = build("llama")
    recorder = make(model, ["resid_post[0]:out.grad@positive"])
    with recorder.batch(ids=IDS):
        losses = llama_loss(model)
        with recorder.target("positive", reduction="sum"):
            losses.sum().backward(retain_graph=True)
        losses.sum().backward()
    run = opened(recorder)
    assert [column.name for column in run.sites] == ["token/layers.0:out.grad@positive"]
    [wanted] = llama_gradients(build("llama"), lambda copied: llama_loss(copied).sum().backward(), "layers.0:out").values()
    assert torch.equal(run["layers.0:out.grad@positive"].to_torch(), wanted)


def test_a_target_that_is_asked_for_and_all_of_them(make: Make, opened: Opened) -> None:
    """A gradient that two patterns select is recorded once, not added up twice."""
    model = build("llama")
    recorder = make(model, ["resid_post[0]:out.grad", "resid_post[0]:out.grad@loss"])
    with recorder.batch(ids=IDS):
        llama_loss(model).sum().backward()
    [wanted] = llama_gradients(build("llama"), lambda copied: llama_loss(copied).sum().backward(), "layers.0:out").values()
    assert torch.equal(opened(recorder)["layers.0:out.grad@loss"].to_torch(), wanted)


def test_a_whole_gradient_beside_its_mean(make: Make, opened: Opened) -> None:
    """One site, once with all rows and once reduced."""
    model = build("llama")
    recorder = make(model, ["resid_post[1]:out.grad", Site("resid_post[1]:out.grad", reduce="mean")])
    with recorder.batch(ids=IDS):
        llama_loss(model).sum().backward()
    run = opened(recorder)
    whole, mean = run["token/layers.1:out.grad@loss"], run["example/layers.1:out.grad@loss|mean"]
    for number in range(BATCH):
        np.testing.assert_allclose(mean[number], whole[number].mean(0), rtol=1e-5, atol=1e-7)


def test_a_target_outside_a_batch(make: Make) -> None:
    """recorder.target needs a batch context."""
    recorder = make(build("llama"), "resid_post:out.grad")
    with pytest.raises(ForwardError, match=r"recorder\.batch"), recorder.target("loss"):
        pass


def test_autograd_grad_leaves_no_gradient(make: Make, opened: Opened) -> None:
    """torch.autograd.grad is a backward, too; `.grad` of the parameters stays empty."""
    model, embeddings = build("llama"), torch.randn(BATCH, 7, 52, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given = {"inputs_embeds": embeddings, "attention_mask": MASK}
    recorder = make(model, "resid_post:out.grad")
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        torch.autograd.grad(llama_loss(model, inputs=given).sum(), embeddings)
    run = opened(recorder)
    assert all(gradient is None for gradient in parameter_gradients(model).values())
    wanted = llama_gradients(build("llama"), lambda copied: llama_loss(copied, inputs=given).sum().backward())
    assert torch.equal(run["layers.2:out.grad@loss"].to_torch(), wanted["layers.2:out"])


# --- training loops --------------------------------------------------------------------------------------------------------------


def test_gradient_accumulation_over_batches(make: Make, opened: Opened) -> None:
    """Three batches, one optimiser step after the last: each batch has its own gradients; the parameters are the same after it."""
    model, plain = build("llama"), build("llama")
    optimisers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (model, plain)]
    recorder, wanted = make(model, "resid_post:out.grad"), []
    for number in range(6):
        inputs = batch(seed=number)
        with recorder.batch(ids=[f"{number}.{row}" for row in range(BATCH)]), recorder.target("loss", reduction="sum"):
            (llama_loss(model, inputs=inputs).sum() / 3).backward()
        run_of = lambda copied, inputs=inputs: (llama_loss(copied, inputs=inputs).sum() / 3).backward()  # noqa: E731
        wanted.append(llama_gradients(plain, run_of)["layers.1:out"])
        run_of(plain)
        if number % 3 == 2:
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
    assert torch.equal(opened(recorder)["layers.1:out.grad@loss"].to_torch(), torch.cat(wanted))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_grad_scaler(make: Make, opened: Opened) -> None:
    """recorder.target(scaler=...) stores gradients without the scale; a scale is a power of two, so bit for bit."""
    model, scaler = build("llama"), torch.amp.GradScaler("cpu")
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    recorder = make(model, "resid_post:out.grad")
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum", scaler=scaler):
        scaler.scale(llama_loss(model).sum()).backward()
    scaler.step(optimiser)
    scaler.update()
    run = opened(recorder)
    for site, wanted in llama_gradients(build("llama"), lambda copied: llama_loss(copied).sum().backward()).items():
        assert torch.equal(run[f"{site}.grad@loss"].to_torch(), wanted)


class Scale:
    """As much of a GradScaler as matters."""

    def get_scale(self) -> float:
        """2 ** 20."""
        return 2.0**20


def test_a_scale_that_half_precision_needs(make: Make, opened: Opened) -> None:
    """Gradients of an fp16 model that are nothing without the scale are still there once it is taken out."""
    model, scaler = build("llama").half(), Scale()
    recorder = make(model, "resid_post:out.grad")
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum", scaler=scaler):
        (llama_loss(model).float().sum() * 1e-9 * scaler.get_scale()).backward()
    found = opened(recorder)["layers.1:out.grad@loss"]
    wanted = retained(
        build("llama").half(),
        ["layers.1:out"],
        lambda copied: (llama_loss(copied).float().sum() * 1e-9 * scaler.get_scale()).backward(),
    )["layers.1:out"][0]
    rows = packed(wanted, MASK).double().numpy() / scaler.get_scale()
    assert np.abs(np.asarray(found.rows(), np.float64) - rows).max() < 1e-3 * np.abs(rows).max()


# --- reductions and factors ------------------------------------------------------------------------------------------------------


def own_gradients(seed: int = 0) -> dict[str, Tensor]:
    """Gradients of each example's own loss, from the sum of them."""
    return llama_gradients(build("llama"), lambda copied: llama_loss(copied, seed).sum().backward())


@pytest.mark.parametrize("how", ["mean", "factor", "factor_tensor", "factor_each", "mean_and_factor"])
def test_stored_gradients_are_those_of_each_example(how: str, make: Make, opened: Opened) -> None:
    """However the scalar joins its examples, once that is declared."""
    model, lengths = build("llama"), torch.tensor(LENGTHS)
    recorder = make(model, "resid_post:out.grad")
    given: dict[str, Any] = {
        "mean": {"reduction": "mean"},
        "factor": {"reduction": "sum", "factor": 4.0},
        "factor_tensor": {"reduction": "sum", "factor": torch.tensor(4.0)},
        "factor_each": {"reduction": "sum", "factor": (1.0 / lengths).tolist()},
        "mean_and_factor": {"reduction": "mean", "factor": 1.0 / lengths},
    }[how]
    with recorder.batch(ids=IDS), recorder.target("loss", **given):
        losses = llama_loss(model)
        joined = {
            "mean": losses.mean(),
            "factor": losses.sum() / 4,
            "factor_tensor": losses.sum() / 4,
            "factor_each": (losses * lengths).sum(),
            "mean_and_factor": (losses * lengths).mean(),
        }[how]
        joined.backward()
    run = opened(recorder)
    for site, wanted in own_gradients().items():
        near = 1e-6 * float(wanted.abs().max())
        torch.testing.assert_close(run[f"{site}.grad@loss"].to_torch(), wanted, rtol=1e-5, atol=near)
    assert run["layers.0:out.grad@loss"].site["target"] == {"name": "loss", "reduction": given["reduction"]}


def test_a_factor_for_reduced_gradients(make: Make, opened: Opened) -> None:
    """One factor per example also where there is one row per example."""
    model, factor = build("llama"), torch.tensor([1.0, 2.0, 4.0, 0.5, 8.0])
    recorder = make(model, [Site("resid_post:out.grad", reduce="last"), ":out[last_hidden_state].grad"])
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="mean", factor=factor):
        (llama_loss(model) / factor).mean().backward()
    run, wanted = opened(recorder), own_gradients()["layers.1:out"]
    last = wanted[torch.tensor(LENGTHS).cumsum(0) - 1]
    torch.testing.assert_close(run["layers.1:out.grad@loss|last"].to_torch(), last, rtol=1e-5, atol=1e-7)


def test_a_factor_of_the_wrong_length(make: Make) -> None:
    """The error says how many there must be, and nothing is recorded."""
    model = build("llama")
    recorder = make(model, "resid_post:out.grad")
    wrong = {"factor": torch.ones(3)}
    with pytest.raises(BatchError, match=r"5 in all.*\[3\]"), recorder.batch(ids=IDS), recorder.target("loss", **wrong):
        llama_loss(model).sum().backward()
    assert not recorder.writer.path.exists()


@pytest.mark.parametrize("name", ["", "a@b", "a|b"])
def test_a_name_that_no_target_can_have(name: str, make: Make) -> None:
    """Refused where it is written."""
    model = build("llama")
    recorder = make(model, "resid_post:out.grad")
    with pytest.raises(ValueError, match="target"), recorder.batch(ids=IDS), recorder.target(name):
        pass


def test_a_reduction_that_does_not_exist(make: Make) -> None:
    """Refused where it is written."""
    recorder = make(build("llama"), "resid_post:out.grad")
    with pytest.raises(ValueError, match="'max'"), recorder.batch(ids=IDS), recorder.target("loss", reduction="max"):  # type: ignore[arg-type]
        pass


def test_an_undeclared_reduction(make: Make, opened: Opened) -> None:
    """Saliency refuses it and says how to declare; assume='sum' takes it as it is."""
    model = build("llama")
    recorder = make(model, "attention.grad")
    with recorder.batch(ids=IDS):
        llama_loss(model).sum().backward()
    run = opened(recorder)
    site = run.attention_sites[0]
    with pytest.raises(GradientError, match=r"recorder\.target\(.*assume='sum'"):
        run.saliency(site)
    declared = make(build("llama"), "attention.grad")
    with declared.batch(ids=IDS), declared.target("loss", reduction="sum"):
        llama_loss(declared._model).sum().backward()
    other = opened(declared)
    for number in range(BATCH):
        assert np.array_equal(run.saliency(site, assume="sum")[number], other.saliency(site)[number])


def test_a_reduction_that_changes_within_a_recording(make: Make) -> None:
    """A column of which some rows are of a sum and others of a mean, undeclared, would say something wrong of one of them."""
    model = build("llama")
    recorder = make(model, "attention.grad")
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        llama_loss(model).sum().backward()
    with pytest.raises((InstrumentError, StoreError)), recorder.batch(ids=list("fghij")):
        llama_loss(model, inputs=batch(seed=1)).mean().backward()
    assert len(recorder.writer.committed_ids) <= BATCH


# --- what cannot be recorded -----------------------------------------------------------------------------------------------------


def frozen(model: Any) -> Any:
    """A model whose parameters require no gradient."""
    return model.requires_grad_(requires_grad=False)


def test_a_frozen_model(make: Make) -> None:
    """The error says what to do."""
    model = frozen(build("llama"))
    recorder = make(model, "resid_post:out.grad")
    with pytest.raises(SiteNotFoundError, match=r"inputs_embeds\.requires_grad_\(\)"), recorder.batch(ids=IDS):
        model(**batch())
    assert not recorder.writer.path.exists()
    assert hook_count(model) == 0


def test_a_frozen_model_with_embeddings_that_require_a_gradient(make: Make, opened: Opened) -> None:
    """What the error says to do works, for attention too."""
    model, plain = frozen(build("llama")), build("llama")
    embeddings = plain.embed_tokens(batch()["input_ids"]).detach().requires_grad_()
    given = {"inputs_embeds": embeddings, "attention_mask": MASK}
    recorder = make(model, ["resid_pre:in.grad", "attention.grad"])
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        llama_loss(model, inputs=given).sum().backward()
    run = opened(recorder)
    wanted = llama_gradients(plain, lambda copied: llama_loss(copied).sum().backward(), "layers.0:in", "layers.2:in")
    for site, rows in wanted.items():
        assert torch.equal(run[f"{site}.grad@loss"].to_torch(), rows)
    assert torch.equal(run["layers.0:in.grad@loss"].to_torch(), packed(embeddings.grad, MASK))
    assert np.isfinite(run.saliency("layers.0.self_attn")[0]).all()


@pytest.mark.parametrize("sites", ["resid_post:out.grad", "attention.grad"])
def test_no_backward_in_the_context(sites: str, make: Make) -> None:
    """The error says where backward belongs, and nothing is recorded."""
    model = build("llama")
    recorder = make(model, sites)
    with pytest.raises(SiteNotFoundError, match="backward"), recorder.batch(ids=IDS):
        loss = llama_loss(model).sum()
    loss.backward()
    assert not recorder.writer.path.exists()


@pytest.mark.parametrize("sites", ["resid_post:out.grad", "attention.grad"])
def test_no_backward_in_a_later_context(sites: str, make: Make, opened: Opened) -> None:
    """As for the first batch; what was recorded before stays."""
    model = build("llama")
    recorder = make(model, sites)
    with recorder.batch(ids=IDS):
        llama_loss(model).sum().backward()
    with pytest.raises(SiteNotFoundError, match="backward"), recorder.batch(ids=list("fghij")):
        llama_loss(model, inputs=batch(seed=1)).sum()
    assert opened(recorder).ids == IDS


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sites", ["resid_post:out.grad", "attention.grad"])
def test_no_graph(sites: str, mode: Any, make: Make) -> None:
    """Under no_grad and inference_mode the error says so, and nothing is recorded."""
    model = build("llama")
    recorder = make(model, sites)
    with pytest.raises(SiteNotFoundError, match=r"no_grad|inference_mode"), mode(), recorder.batch(ids=IDS):
        model(**batch())
    assert not recorder.writer.path.exists()


def test_a_backward_that_reaches_only_part_of_the_model(make: Make) -> None:
    """A site that backward never comes to is named."""
    model = build("bert")
    recorder = make(model, ["resid_post[0]:out.grad", "pooler:out.grad"])
    with pytest.raises(SiteNotFoundError, match="pooler"), recorder.batch(ids=IDS):
        llama_loss(model).sum().backward()
    assert not recorder.writer.path.exists()


def test_examples_that_the_loss_leaves_out(make: Make, opened: Opened) -> None:
    """Their gradients are zeros."""
    model = build("llama")
    recorder = make(model, "resid_post:out.grad")
    with recorder.batch(ids=IDS):
        llama_loss(model)[2].backward()
    column = opened(recorder)["layers.1:out.grad@loss"]
    assert [bool(np.any(column[number])) for number in range(BATCH)] == [False, False, True, False, False]


def test_an_exception_in_backward(make: Make, opened: Opened) -> None:
    """Nothing of the batch is recorded; the next one is right."""
    model, plain = build("llama"), build("llama")
    recorder = make(model, "resid_post:out.grad")

    def failing(gradient: Tensor) -> None:
        raise ZeroDivisionError

    handle = model.norm.register_forward_hook(lambda module, args, output: output.register_hook(failing) and None)
    with pytest.raises(ZeroDivisionError), recorder.batch(ids=IDS):
        llama_loss(model).sum().backward()
    handle.remove()
    with recorder.batch(ids=IDS):
        llama_loss(model).sum().backward()
    run = opened(recorder)
    assert run.ids == IDS
    wanted = llama_gradients(plain, lambda copied: llama_loss(copied).sum().backward())
    assert torch.equal(run["layers.0:out.grad@loss"].to_torch(), wanted["layers.0:out"])


def test_a_backward_after_the_context(make: Make, opened: Opened) -> None:
    """A further backward outside changes nothing of what was recorded."""
    model = build("llama")
    recorder = make(model, "resid_post:out.grad")
    with recorder.batch(ids=IDS):
        losses = llama_loss(model)
        losses.sum().backward(retain_graph=True)
    with recorder.batch(ids=list("fghij")):
        other = llama_loss(model, inputs=batch(seed=1)).sum()
        other.backward()
    losses.sum().backward()
    column, wanted = opened(recorder)["layers.1:out.grad@loss"], own_gradients()["layers.1:out"]
    assert torch.equal(torch.from_numpy(np.concatenate([column[number] for number in range(BATCH)])), wanted)


def test_an_earlier_batch_in_a_later_backward(make: Make, opened: Opened) -> None:
    """A backward through an earlier batch's graph gives nothing to the batch whose context it runs in."""
    model = build("llama")
    recorder = make(model, "resid_post:out.grad")
    with recorder.batch(ids=IDS):
        losses = llama_loss(model)
        losses.sum().backward(retain_graph=True)
    with recorder.batch(ids=list("fghij")):
        (llama_loss(model, inputs=batch(seed=1)).sum() + losses.sum()).backward()
    column = opened(recorder)["layers.1:out.grad@loss"]
    other = llama_gradients(build("llama"), lambda copied: llama_loss(copied, inputs=batch(seed=1)).sum().backward())
    torch.testing.assert_close(torch.from_numpy(np.concatenate([column[number] for number in range(5, 10)])), other["layers.1:out"])


# --- sixteen bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 2e-6, 1e-12, 1e-30])
@pytest.mark.parametrize("sites", ["resid_post:out.grad", "attention.grad"])
def test_tiny_gradients_survive_float16(sites: str, size: float, make: Make, opened: Opened) -> None:
    """Stored with a power of two per example, they keep float16's precision whatever their size."""
    model, wide = build("llama"), build("llama")
    recorder, other = make(model, Site(sites, dtype="float16")), make(wide, sites)
    for one, recorder_of in ((model, recorder), (wide, other)):
        with recorder_of.batch(ids=IDS), recorder_of.target("loss", reduction="sum"):
            (llama_loss(one) * torch.tensor([1.0, 1e-3, 1.0, 1e3, 0.0]) * size).sum().backward()
    run, exact = opened(recorder), opened(other)
    names = [column.name.partition("/")[2] for column in exact.sites if column.name.endswith(".grad@loss")]
    assert names
    for name in names:
        for number in range(BATCH):
            found, wanted = run[name][number], exact[name][number]
            assert found.dtype == np.float32
            assert np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max(), (name, number)


def test_the_scale_is_a_power_of_two(make: Make, opened: Opened) -> None:
    """One per example; the stored values are float16 near 1."""
    model = build("llama")
    recorder = make(model, Site("resid_post[1]:out.grad", dtype="float16"))
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        (llama_loss(model).sum() * 1e-12).backward()
    run = opened(recorder)
    scales = run["example/layers.1:out.grad@loss|scale"].rows()
    assert scales.shape == (BATCH,)
    mantissas, _ = np.frexp(scales)
    assert (mantissas == 0.5).all()
    column = run["layers.1:out.grad@loss"]
    for number in range(BATCH):
        assert 0.4 < np.abs(column[number]).max() / scales[number] <= 1


def test_every_way_to_read_a_scaled_column_agrees(make: Make, opened: Opened) -> None:
    """Examples, slices, rows, blocks, torch and numpy give the same values."""
    model = build("llama")
    recorder = make(model, Site("resid_post[1]:out.grad", dtype="float16"))
    for part in range(2):
        with recorder.batch(ids=[f"{part}.{row}" for row in range(BATCH)]), recorder.target("loss", reduction="sum"):
            (llama_loss(model, inputs=batch(seed=part)) * torch.tensor([1.0, 1e-9, 1e-3, 1e-12, 1e6])).sum().backward()
        recorder.commit()
    run = opened(recorder)
    column = run["layers.1:out.grad@loss"]
    whole = np.concatenate([column[number] for number in range(10)])
    assert whole.dtype == column.dtype == np.float32
    assert column.shape == whole.shape
    assert np.array_equal(np.concatenate(column[2:9]), np.concatenate([column[number] for number in range(2, 9)]))
    assert np.array_equal(column.rows(), whole)
    assert np.array_equal(np.asarray(column), whole)
    assert np.array_equal(column.rows(slice(3, 40, 4)), whole[3:40:4])
    assert np.array_equal(column.rows([5, -1, 0, 5]), whole[[5, -1, 0, 5]])
    assert np.array_equal(column.rows(-2), whole[-2])
    assert np.array_equal(column.rows(np.abs(whole[:, 0]) > 1e-9), whole[np.abs(whole[:, 0]) > 1e-9])
    for rows in (1, 7, 1000):
        assert np.array_equal(np.concatenate(list(column.blocks(rows))), whole)
    assert np.array_equal(column.within(4, 1, 3), column[4][1:3])
    assert column.to_torch().dtype == torch.float32
    assert np.array_equal(column.to_torch().numpy(), whole)
    assert np.array_equal(column[-1], column[9])
    assert run.select("resid_post:out.grad")[0].dtype == np.float32
    assert run.verify().ok


def test_non_finite_gradients_in_float16(make: Make, opened: Opened) -> None:
    """NaN and infinity stay what they are, beside values that keep their precision."""
    model = build("llama")
    recorder = make(model, Site("resid_post[2]:out.grad", dtype="float16"))
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum", factor=[1.0, float("nan"), 1e-9, 1.0, 1.0]):
        llama_loss(model).sum().backward()
    column, wanted = opened(recorder)["layers.2:out.grad@loss"], own_gradients()["layers.2:out"]
    assert np.isnan(column[1]).all()
    rows = wanted[7 + 3 : 7 + 3 + 5].numpy() * 1e-9
    assert np.abs(column[2] - rows).max() < 1e-3 * np.abs(rows).max()


def test_float16_where_a_module_need_not_run(make: Make) -> None:
    """There is no place for a scale per example, and the error says what to use instead."""
    with pytest.raises(ValueError, match="bfloat16"):
        make(build("llama"), Site("resid_post[1]:out.grad", dtype="float16", missing="absent"))


@pytest.mark.parametrize("options", [{"reduce": "mean"}, {"reduce": "last"}])
def test_float16_of_reduced_gradients(options: dict[str, Any], make: Make, opened: Opened) -> None:
    """Reduced gradients survive as well."""
    found = []
    for dtype in ("float16", "float32"):
        model = build("llama")
        recorder = make(model, Site("resid_post[1]:out.grad", dtype=dtype, **options))
        with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
            (llama_loss(model).sum() * 1e-12).backward()
        [column] = [one for one in opened(recorder).sites if not one.name.endswith("|scale")]
        found.append([column[number] for number in range(BATCH)])
    for narrow, wide in zip(*found, strict=True):
        assert np.abs(narrow - wide).max() < 1e-3 * np.abs(wide).max()


def test_bfloat16_gradients(make: Make, opened: Opened) -> None:
    """bfloat16 has float32's range and needs no scale."""
    model = build("llama")
    recorder = make(model, Site("resid_post[1]:out.grad", dtype="bfloat16"))
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        llama_loss(model).sum().backward()
    run = opened(recorder)
    assert torch.equal(run["layers.1:out.grad@loss"].to_torch(), own_gradients()["layers.1:out"].bfloat16())
    assert "layers.1:out.grad@loss|scale" not in run.tables["example"]


# --- nothing of the training changes ---------------------------------------------------------------------------------------------


def with_dropout(name: str) -> Any:
    """A model in train mode with dropout everywhere, also in its attention."""
    if name == "gpt2":
        return gpt2(attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2).train()
    if name == "bert":
        return bert(attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2).train()
    return llama(attention_dropout=0.2).train()


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_training_is_the_same_with_and_without_recording(
    name: str, dtype: torch.dtype, dropout: bool, tmp_path: Path, make: Make
) -> None:
    """Outputs, losses, parameters' gradients and the random numbers left over are bit for bit the same."""
    seen = []
    for recorded in (False, True):
        model = (with_dropout(name) if dropout else build(name).train()).to(dtype)
        recorder = make(model, ["attention.grad", "resid_post", "resid_post:out.grad"])
        torch.manual_seed(3)
        for number in range(2):
            inputs = batch(seed=number)
            if recorded:
                with recorder.batch(ids=[f"{number}.{row}" for row in range(BATCH)]), recorder.target("loss", reduction="sum"):
                    output = model(**inputs)
                    loss = per_example(output, MASK).sum()
                    loss.backward()
            else:
                output = model(**inputs)
                loss = per_example(output, MASK).sum()
                loss.backward()
            seen.append((recorded, output[0].detach(), loss.detach(), *parameter_gradients(model).values(), torch.get_rng_state()))
    for bare, watched in zip(seen[:2], seen[2:], strict=True):
        for one, other in zip(bare[1:], watched[1:], strict=True):
            assert one is other is None or torch.equal(one, other)


def test_training_by_hand_written_code_is_the_same(make: Make) -> None:
    """scaled_dot_product_attention called directly, with operations in place."""
    model, plain = sdpa_decoder(inplace=True), sdpa_decoder(inplace=True)
    recorder = make(model, ["attention.grad", "resid_post", "resid_post:out.grad"])
    tokens = batch()["input_ids"]
    with recorder.batch(ids=IDS, mask=MASK):
        mine = model(tokens)
        per_example(mine, MASK).sum().backward()
    other = plain(tokens)
    per_example(other, MASK).sum().backward()
    assert torch.equal(mine, other)
    assert same_gradients(model, plain)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_nn_transformer_encoder_is_the_same(dropout: float, make: Make) -> None:
    """Whose q, k and v are computed once more by the recorder."""
    grids = []
    for recorded in (False, True):
        model = CASES["torch_encoder"].build().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = dropout
        recorder = make(model, ["attention.grad", "resid_post", "resid_post:out.grad"])
        torch.manual_seed(3)
        inputs = CASES["torch_encoder"].inputs("right")
        if recorded:
            with recorder.batch(ids=IDS):
                output = model(**inputs)
                per_example(output, MASK).sum().backward()
        else:
            output = model(**inputs)
            per_example(output, MASK).sum().backward()
        grids.append([output.detach(), *parameter_gradients(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*grids, strict=True))
