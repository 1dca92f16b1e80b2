"""record(targets=): gradients of single examples, taken without touching the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch

from tensortape.instrument import Site, record
from tensortape.instrument.errors import BatchError

Tensor = torch.Tensor


def batches(**more: Any) -> list[dict[str, Any]]:
    """Two batches as a loader gives them."""
    return [{"id": [f"{n}-{row}" for row in range(5)], **tiny.batch("left", seed=n), **more} for n in (0, 1)]


def energy(outputs: Any, batch: Any) -> Tensor:
    """Half the squared norm of the last states of real tokens."""
    states = outputs.last_hidden_state * batch["attention_mask"][..., None]
    return states.square().sum((1, 2)) / 2


def first(outputs: Any, batch: Any) -> Tensor:
    """One feature of the last position."""
    return outputs.last_hidden_state[:, -1, 0]


def of_one_example(build: Callable[[], Any], batch: dict[str, Any], row: int, target: Callable[..., Tensor], layer: int) -> Tensor:
    """The gradient at a block's output of one example alone, by plain autograd on a copy."""
    model, kept = build(), []
    model.layers[layer].register_forward_hook(lambda module, args, output: kept.append(output))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    value = target(model(**inputs), batch)[row]
    (gradient,) = torch.autograd.grad(value, kept)
    return gradient[row][batch["attention_mask"][row].bool()]


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_each_example(tmp_path: Path, *, frozen: bool) -> None:
    """Two targets, two batches, also with all parameters frozen; no parameter gets a gradient and modes are restored."""
    model = tiny.llama().train()
    model.requires_grad_(not frozen)
    targets = {"energy": energy, "first": first}
    run = record(model, batches(), to=tmp_path / "r.zarr", sites=["resid_post:out.grad"], ids="id", targets=targets)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    for number, batch in enumerate(batches()):
        for row in range(5):
            for name, target in targets.items():
                expected = of_one_example(tiny.llama, batch, row, target, 1)
                got = run[f"resid_post[1]:out.grad@{name}"][5 * number + row]
                assert torch.allclose(torch.from_numpy(got.copy()), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_values_of_targets_are_kept(tmp_path: Path) -> None:
    """Beside the gradients, one value per example."""
    run = record(tiny.llama(), batches(), to=tmp_path / "r.zarr", sites="resid_post:out.grad", ids="id", targets={"energy": energy})
    with torch.no_grad():
        found = [energy(tiny.llama()(**{k: v for k, v in batch.items() if k != "id"}), batch) for batch in batches()]
    assert run["example/target.energy"].rows() == pytest.approx(torch.cat(found).numpy(), rel=1e-5)


def test_inputs_without_an_embedding(tmp_path: Path) -> None:
    """A model of features is differentiated with respect to them."""
    model = tiny.torch_encoder(batch_first=True, norm_first=True)
    model.requires_grad_(requires_grad=False)
    inputs = tiny.features()
    data = [{"id": list("abcde"), **inputs}]
    run = record(
        model, data, to=tmp_path / "r.zarr", sites="resid_post:out.grad", ids="id", targets={"sum": lambda o, b: o.sum((1, 2))}
    )
    assert not inputs["src"].requires_grad
    assert np.isfinite(run["resid_post[0]:out.grad@sum"].rows()).all()
    assert np.abs(run["resid_post[0]:out.grad@sum"].rows()).max() > 0


def test_saliency_needs_no_declaration_here(tmp_path: Path) -> None:
    """The sum over the batch is what is differentiated, and the run says so."""
    run = record(tiny.llama(), batches(), to=tmp_path / "r.zarr", sites="attention.grad", ids="id", targets={"energy": energy})
    assert run.saliency(0, target="energy")[0].shape == (2, 7, 7)
    assert run["layers.0.self_attn:z.grad@energy"].site["target"] == {"name": "energy", "reduction": "sum"}


@pytest.mark.parametrize(
    ("sites", "targets", "shown"),
    [
        (["resid_post"], {"energy": energy}, "none is asked for"),
        (["resid_post:out.grad"], None, "targets="),
    ],
)
def test_gradients_and_targets_go_together(tmp_path: Path, sites: Any, targets: Any, shown: str) -> None:
    """One without the other is refused before anything runs."""
    with pytest.raises(ValueError, match=shown):
        record(tiny.llama(), batches(), to=tmp_path / "r.zarr", sites=sites, ids="id", targets=targets)
    assert not (tmp_path / "r.zarr").exists()


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        (lambda outputs, batch: outputs.last_hidden_state.sum(), r"shape \[\]"),
        (lambda outputs, batch: 3.0, "3.0"),
        (lambda outputs, batch: torch.zeros(5), "does not depend"),
    ],
)
def test_targets_that_are_none(tmp_path: Path, target: Any, shown: str) -> None:
    """A target gives one value per example, computed from the outputs."""
    with pytest.raises(BatchError, match=shown):
        record(tiny.llama(), batches(), to=tmp_path / "r.zarr", sites="resid_post:out.grad", ids="id", targets={"bad": target})
    assert not (tmp_path / "r.zarr").exists()


def test_small_gradients_in_sixteen_bits(tmp_path: Path) -> None:
    """float16 with a scale per example keeps gradients that float16 alone would lose."""
    sites = ["resid_post[0]:out.grad", Site("resid_post[1]:out.grad", dtype="float16")]
    tiny_targets = {"small": lambda outputs, batch: 1e-9 * energy(outputs, batch)}
    run = record(tiny.llama(), batches(), to=tmp_path / "r.zarr", sites=sites, ids="id", targets=tiny_targets)
    full = record(tiny.llama(), batches(), to=tmp_path / "f.zarr", sites="resid_post[1]:out.grad", ids="id", targets=tiny_targets)
    got, expected = run["resid_post[1]:out.grad@small"], full["resid_post[1]:out.grad@small"]
    for example in range(10):
        assert np.abs(got[example] - expected[example]).max() < 1e-3 * np.abs(expected[example]).max()
