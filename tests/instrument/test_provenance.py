"""What a run says of its model: enough to tell another model from it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import gpt2, llama, sdpa_decoder, t5
from torch import nn

from tensortape.instrument.provenance import about, fingerprint


def test_the_same_weights_have_the_same_fingerprint() -> None:
    """Whatever object holds them."""
    assert fingerprint(llama()) == fingerprint(llama())
    assert fingerprint(llama()) != fingerprint(gpt2())


@pytest.mark.parametrize("path", ["table.weight", "blocks.1.mlp.0.bias", "norm.weight"])
def test_one_changed_value_changes_it(path: str) -> None:
    """In any parameter of a small model."""
    model = sdpa_decoder()
    before = fingerprint(model)
    with torch.no_grad():
        model.get_parameter(path).view(-1)[-1] += 1e-3
    assert fingerprint(model) != before


def test_other_dtypes_shapes_and_names_change_it() -> None:
    """The same numbers in another form are another model."""
    linear = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1)
    turned = nn.Linear(3, 2, bias=False)
    turned.weight = nn.Parameter(linear.weight.reshape(2, 3))
    found = {fingerprint(model) for model in (linear, turned, nn.Sequential(linear), nn.Linear(2, 3, bias=False).double())}
    assert len(found) == 4


def test_buffers_and_odd_tensors() -> None:
    """Buffers count; empty, scalar, boolean and half-precision tensors are no obstacle."""

    class Model(nn.Module):
        def __init__(self, step: int) -> None:
            super().__init__()
            self.register_buffer("step", torch.tensor(step))
            self.register_buffer("empty", torch.empty(0, 3))
            self.register_buffer("mask", torch.ones(2, 2).bool())
            self.register_buffer("turns", torch.ones(2, dtype=torch.complex64))
            self.rounded = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    assert fingerprint(Model(1)) == fingerprint(Model(1)) != fingerprint(Model(2))


@pytest.mark.parametrize("build", [t5, sdpa_decoder, gpt2])
def test_what_is_said_is_json(build: object) -> None:
    """Also of configs that hold infinities or objects."""
    model = build()  # type: ignore[operator]
    if hasattr(model, "config"):
        model.config.odd = {"limit": math.inf, "kind": torch.float16, 3: (1, 2)}
    found = about(model)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"model", "provenance", "fingerprint"}
    assert found["model"]["class"] == type(model).__name__
