"""Gradients of single examples from recorded factors, against a backward of each example alone."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_models import per_example
from tiny_models import HIDDEN, INNER, batch, gpt2, padding_mask, sdpa_decoder, seeded
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tensortape.analyses import ExampleGradients, example_gradients, outer_products
from tensortape.analyses.errors import AnalysisError
from tensortape.instrument import Recorder
from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores.errors import GradientError, MissingExampleError, UnknownColumnError

IDS = list("abcde")
Losses = Callable[[nn.Module], torch.Tensor]  # one per example
LAYER = "blocks.1.mlp.2"  # of INNER features to HIDDEN


class Twice(nn.Module):
    """A linear layer that is called twice, and a head that reads one vector per example."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.shared, self.head = nn.Embedding(97, 11), nn.Linear(11, 11), nn.Linear(11, 13)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B, T] to [B, 13]."""
        x = self.shared(torch.tanh(self.shared(self.table(input_ids)))) * attention_mask[..., None]
        return self.head(x.sum(1))


def losses_of_decoder(model: nn.Module) -> torch.Tensor:
    return per_example(model(batch()["input_ids"]), padding_mask())


def losses_of_twice(model: nn.Module) -> torch.Tensor:
    return torch.tanh(model(**batch())).pow(3).sum(1)


def losses_of_gpt2(model: nn.Module) -> torch.Tensor:
    return per_example(model(**batch()), padding_mask())


def record(model: nn.Module, losses: Losses, layers: list[str], to: Path, reduction: str = "sum") -> Run:
    sites = [f"{layer}{port}" for layer in layers for port in (":in", ":out.grad")]
    with Recorder(model, sites=sites, to=to) as recorder:
        given = {} if reduction == "none" else {"reduction": reduction}
        with recorder.batch(ids=IDS, mask=padding_mask()), recorder.target("loss", **given):
            found = losses(model)
            (found.mean() if reduction == "mean" else found.sum()).backward()
    return open_run(to)


def alone(model: nn.Module, losses: Losses, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """dL/dW and dL/db of each example, by one backward each; [examples, out, in] and [examples, out]."""
    module, found = model.get_submodule(layer), []
    for number in range(len(IDS)):
        model.zero_grad()
        losses(model)[number].backward()
        found.append((module.weight.grad.numpy().astype(np.float64), module.bias.grad.numpy().astype(np.float64)))
    weights, biases = zip(*found, strict=True)
    return np.stack(weights), np.stack(biases)


def check(found: ExampleGradients, weights: np.ndarray, biases: np.ndarray) -> None:
    """Everything there is to ask, within 1e-5 of the largest value."""
    flat = weights.reshape(len(weights), -1)
    products = flat @ flat.T
    assert found.shape == weights.shape
    for number in range(len(weights)):
        assert np.abs(found[number] - weights[number]).max() <= 1e-5 * np.abs(weights[number]).max()
        assert np.abs(found.bias(number) - biases[number]).max() <= 1e-5 * np.abs(biases[number]).max()
    scale = np.sqrt(np.outer(products.diagonal(), products.diagonal()))
    assert (np.abs(found.inner_products() - products) <= 1e-5 * scale).all()
    np.testing.assert_allclose(found.norms(), np.linalg.norm(flat, axis=1), rtol=1e-5)
    assert abs(found.dot(3, 1) - products[3, 1]) <= 1e-5 * scale[3, 1]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Run]:
    model = sdpa_decoder()
    return model, record(model, losses_of_decoder, [LAYER, "blocks.0.mlp.0"], tmp_path_factory.mktemp("g") / "run.zarr")


@pytest.mark.parametrize("layer", [LAYER, "blocks.0.mlp.0"])
def test_they_are_those_of_a_backward_of_each_example(recorded: tuple[nn.Module, Run], layer: str) -> None:
    model, run = recorded
    found = example_gradients(run, layer)
    check(found, *alone(model, losses_of_decoder, layer))
    assert found[0].shape == {LAYER: (HIDDEN, INNER), "blocks.0.mlp.0": (INNER, HIDDEN)}[layer]
    assert f"ExampleGradients of {layer}" in repr(found)


def test_they_are_those_of_vmap(recorded: tuple[nn.Module, Run]) -> None:
    model, run = recorded
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(given: dict[str, torch.Tensor], tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return per_example(torch.func.functional_call(model, given, tokens[None]), mask[None])[0]

    with sdpa_kernel(SDPBackend.MATH):  # which vmap knows
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="same")(
            parameters, batch()["input_ids"], padding_mask()
        )
    expected = each[f"{LAYER}.weight"].numpy()
    found = example_gradients(run, LAYER)
    for number in range(len(IDS)):
        assert np.abs(found[number] - expected[number]).max() <= 1e-5 * np.abs(expected[number]).max()


@pytest.mark.parametrize("rows", [1, 9, 10**6])
@pytest.mark.parametrize("sums", [1, 2, 100])
@pytest.mark.parametrize("of_factors", [True, False])
def test_both_ways_and_all_blocks_agree(
    recorded: tuple[nn.Module, Run], monkeypatch: pytest.MonkeyPatch, rows: int, sums: int, of_factors: bool
) -> None:
    monkeypatch.setattr(outer_products, "BLOCK_ROWS", rows)
    monkeypatch.setattr(outer_products, "BLOCK_BYTES", sums * 8 * HIDDEN * INNER)
    monkeypatch.setattr(outer_products.Plan, "is_of_factors", of_factors)
    found = example_gradients(recorded[1], LAYER)
    every = np.stack([found[number].ravel() for number in range(len(IDS))])
    np.testing.assert_allclose(found.inner_products(), every @ every.T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.inner_products([4, 0], [2, 3, 4]), every[[4, 0]] @ every[[2, 3, 4]].T, rtol=1e-9, atol=1e-12)
    mask = np.array([True, False, False, True, True])
    np.testing.assert_allclose(found.norms(mask), np.linalg.norm(every[mask], axis=1))
    assert found.inner_products([], [1]).shape == (0, 1)


@pytest.mark.parametrize("layer", ["shared", "head"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_layer_that_is_called_twice_and_one_with_a_row_per_example(tmp_path: Path, layer: str, reduction: str) -> None:
    model = seeded(Twice)
    run = record(model, losses_of_twice, [layer], tmp_path / "run.zarr", reduction)
    check(example_gradients(run, layer), *alone(model, losses_of_twice, layer))


def test_gpt2_keeps_the_transposed_weight(tmp_path: Path) -> None:
    model, layer = gpt2(), "transformer.h.1.mlp.c_fc"
    run = record(model, losses_of_gpt2, [layer], tmp_path / "run.zarr")
    weights, biases = alone(model, losses_of_gpt2, layer)
    check(example_gradients(run, layer), weights.transpose(0, 2, 1), biases)


def test_gradients_of_an_undeclared_reduction_are_refused(tmp_path: Path) -> None:
    model = sdpa_decoder()
    run = record(model, losses_of_decoder, [LAYER], tmp_path / "run.zarr", "none")
    with pytest.raises(GradientError, match=r"recorder\.target.*assume='sum'"):
        example_gradients(run, LAYER)
    check(example_gradients(run, LAYER, assume="sum"), *alone(model, losses_of_decoder, LAYER))
    with pytest.raises(ValueError, match="assume is 'sum' or None"):
        example_gradients(run, LAYER, assume="mean")  # type: ignore[arg-type]


def test_what_was_not_recorded(recorded: tuple[nn.Module, Run], tmp_path: Path) -> None:
    with pytest.raises(UnknownColumnError, match=r"'blocks.2.mlp.0:in' and 'blocks.2.mlp.0:out.grad'.*The run has"):
        example_gradients(recorded[1], "blocks.2.mlp.0")
    with pytest.raises(UnknownColumnError, match="of target 'score' was not recorded"):
        example_gradients(recorded[1], LAYER, "score")
    path = tmp_path / "run.zarr"
    said = {"call": 1, "layout": "example token ...", "aliases": [], "path": "m", "target": {"name": "loss", "reduction": "sum"}}
    ones = np.ones((3, 2), np.float32)
    with RunWriter(path, durability="rename") as writer:
        writer.describe("token/m:in", site={**said, "port": "in"})
        writer.describe("token/m:out.grad@loss", site={**said, "port": "out.grad@loss"})
        writer.append(ids=["a"], columns={"token/m:in": [ones], "token/m:out.grad@loss": [np.ones((3, 5, 7), np.float32)]})
    with pytest.raises(AnalysisError, match="not the inputs and outputs of a linear layer"):
        example_gradients(open_run(path), "m")


def test_an_example_without_gradient(tmp_path: Path) -> None:
    said = {"call": 1, "layout": "example token ...", "aliases": [], "path": "m", "target": {"name": "loss", "reduction": "sum"}}
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(4, width)) for width in (3, 2))
    x[:, 0] += 3000  # features far from zero cost no digits
    with RunWriter(tmp_path / "run.zarr", durability="rename") as writer:
        writer.describe("token/m:in", site={**said, "port": "in"})
        writer.describe("token/m:out.grad@loss", site={**said, "port": "out.grad@loss"})
        writer.append(ids=["b", "c"], columns={"token/m:in": [x, x[:0]], "token/m:out.grad@loss": [g - g.mean(0), g[:0]]})
    with RunWriter(tmp_path / "run.zarr", mode="resume", durability="rename") as writer:
        writer.append(ids=["a"], columns={"token/x": [x]})
    found = example_gradients(open_run(tmp_path / "run.zarr"), "m")
    assert found.present.tolist() == [True, True, False]
    expected = (g - g.mean(0)).T @ (x - [3000, 0, 0])  # the rows of g add up to zero
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)
    np.testing.assert_allclose(found.inner_products(), [[(expected**2).sum(), 0], [0, 0]], rtol=1e-6)
    assert found[1].tolist() == np.zeros((2, 3)).tolist(), "no token, no gradient"
    with pytest.raises(MissingExampleError):
        found.norms([2])


def test_no_gradient_is_made_of_short_examples(tmp_path: Path) -> None:
    """Inner products of 23 examples of 5 tokens need less memory than one weight of 1500 x 1500."""
    said = {"call": 1, "layout": "example token ...", "aliases": [], "path": "m", "target": {"name": "loss", "reduction": "sum"}}
    rng = np.random.default_rng(0)
    rows = {name: [rng.normal(size=(5, 1500)).astype(np.float32) for _ in range(23)] for name in ("in", "out.grad@loss")}
    with RunWriter(tmp_path / "run.zarr", durability="rename") as writer:
        for name in rows:
            writer.describe(f"token/m:{name}", site={**said, "port": name})
        writer.append(ids=list(range(23)), columns={f"token/m:{name}": values for name, values in rows.items()})
    found = example_gradients(open_run(tmp_path / "run.zarr"), "m")
    tracemalloc.start()
    products = found.inner_products()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1500 * 1500 * 8
    expected = [(rows["out.grad@loss"][n].T.astype(np.float64) @ rows["in"][n]).ravel() for n in (7, 19)]
    np.testing.assert_allclose(products[np.ix_([7, 19], [7, 19])], np.array(expected) @ np.array(expected).T, rtol=1e-9)
