"""Rehearsals: what a recording would store, found without weights.

A model on torch's meta device computes shapes and dtypes and no values, so that one of any size runs anywhere. Everything that
records is in place as in a real recording, and is shown zeros in place of what the model computes: sites, layouts, reductions and
columns are decided by the very code that decides them later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

from .anatomy import stacks
from .batch import Batch, Given
from .capture import Pins
from .errors import UnsupportedModelError
from .fitting import items_of
from .pca import PCA
from .rows import Rows
from .sites import Selection, Site, Tap, aliases_by_site, resolve
from .taps import TapSet
from .targets import Target


def rehearse(
    model: nn.Module, sites: Selection, inputs: Mapping[str, torch.Tensor], *, ids: Any, labels: Mapping[str, Any]
) -> Rows:
    """One batch as `Recorder` would hand it to the writer, all values zero.

    Args:
        model: a model whose parameters are on the meta device.
        sites: as for `Recorder`; gradients are those of a target `loss`.
        inputs: arguments of the model's forward, on the meta device; examples along the first axis.
        ids, labels: as for `Recorder.batch`.

    Raises:
        SiteNotFoundError, LayoutError. UnsupportedModelError: the forward needs values, not only shapes.
    """
    taps = resolve(model, [_rehearsed(item) for item in items_of(sites)])
    batch = Batch(Given(ids, labels), model, Pins(aliases_by_site(model), stacks(model)))
    shown = _Zeros(model, taps)
    with shown, shown.sending_to(batch):
        call(model, inputs)
        if any(tap.site.is_gradient for tap in taps) and batch.error is None:
            batch.target = Target(reduction="sum")
            torch.autograd.backward([leaf.sum() for leaf in shown.leaves])
    found = batch.whole()
    batch.check(found, taps, None)
    return batch.rows(found, {})


class _AnyPCA(PCA):
    """Components that are not fitted, and of whatever a site gives: all coordinates are zero."""

    def coordinates(self, site: str, rows: torch.Tensor) -> torch.Tensor:
        """[n, k + 1] zeros."""
        return torch.zeros(len(rows), self.k + 1)

    def said(self, site: str) -> dict[str, Any]:
        """Nothing."""
        return {}


def _rehearsed(item: Any) -> Any:
    return replace(item, project=_AnyPCA(item.project.k)) if isinstance(item, Site) and item.project is not None else item


class _Zeros(TapSet):
    """Hooks that see zeros of the same shape and dtype instead of tensors without values: leaves, to be differentiated later."""

    def __init__(self, model: nn.Module, taps: Sequence[Tap]) -> None:
        self.leaves: list[torch.Tensor] = []
        super().__init__(model, taps)

    def _guard(self, hook: Callable[..., None]) -> Callable[..., None]:
        def shown(*given: Any) -> None:
            with unset_fake_temporarily():
                hook(*pytree.tree_map_only(torch.Tensor, self._zeros, given))

        return super()._guard(shown)

    def _zeros(self, tensor: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if self._has_gradients and found.is_floating_point():
            self.leaves.append(found.requires_grad_())
        return found


def call(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Run a model that is on the meta device; UnsupportedModelError where it needs values.

    With fake tensors, which are those of the meta device under the name by which transformers knows not to look at values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    faked = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
    try:
        with torch.no_grad(), mode:
            model(**faked)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UnsupportedModelError(
            f"the forward of {type(model).__name__} cannot be rehearsed without weights, because it needs values and not only "
            f"shapes, or other arguments than {', '.join(inputs)} ({error}); record a small sample instead, and multiply"
        ) from error
