"""Running a model with targets: one forward, and one backward per target that leaves every `.grad` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .batch import Batch
from .errors import BatchError
from .recorder import Recorder
from .taps import anchored
from .targets import Targets


def differentiate(
    recorder: Recorder, batch: Batch, model: nn.Module, inputs: Mapping[str, Any], targets: Targets, entries: Mapping[str, Any]
) -> None:
    """Run the model inside a batch context, and differentiate each target's sum over the examples.

    Gradients are taken with respect to what the model computes first: the outputs of its embeddings and its floating inputs.
    Parameters therefore need no gradients, and get none; examples must not interact (no batch norm in training mode, no load
    balancing over the batch), since the gradient of the sum is then each example's own.

    Args:
        inputs: what the model is called with.
        targets: name to a function of (outputs, entries) that gives one value per example, [examples].
        entries: the whole batch, for the targets.
    """
    rooted = {name: _root(value) if _is_feature(name, value) else value for name, value in inputs.items()}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    with torch.enable_grad(), anchored(tables) as leaves:
        outputs = model(**rooted)
        roots = [*leaves, *(value for name, value in rooted.items() if _is_feature(name, value))]
        if not roots:
            raise BatchError("targets need something to differentiate: the model has no nn.Embedding and was given no features")
        for number, (name, target) in enumerate(targets.items()):
            values = _checked(name, target(outputs, entries))
            batch.label(f"example/target.{name}", values.detach())
            with recorder.target(name, reduction="sum"):
                torch.autograd.grad(values.sum(), roots, retain_graph=number + 1 < len(targets), allow_unused=True)


def _root(value: torch.Tensor) -> torch.Tensor:
    return value.detach().requires_grad_()


def _is_feature(name: str, value: Any) -> bool:
    """Whether an argument holds vectors (or pixels) rather than a mask."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 3 and "mask" not in name


def _checked(name: str, values: Any) -> torch.Tensor:
    if not isinstance(values, torch.Tensor) or values.ndim != 1:
        got = f"a tensor of shape {list(values.shape)}" if isinstance(values, torch.Tensor) else repr(values)
        raise BatchError(f"target {name!r} must give one value per example, a tensor [examples], but gave {got}")
    if not values.requires_grad:
        raise BatchError(f"target {name!r} does not depend on the model's outputs, or detaches them")
    return values
