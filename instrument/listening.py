"""The gradient of a tensor as it is now, whatever is done to it later."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

Listener = Callable[[torch.Tensor], None]


def hooks(tensor: torch.Tensor, listener: Listener) -> Iterator[tuple[torch.Tensor, Listener]]:
    """The tensors and the hooks on them that have a function called with each gradient of a tensor that requires one.

    A tensor's own hook does that also if the tensor is changed in place afterwards, except where it is a view (as what a linear
    layer makes of three axes is): autograd then goes past the view, to what the view is of, and the gradient is taken from there.
    """
    version, alias = tensor._version, tensor.detach()  # an alias shares the count of changes, and does not keep the graph

    def through_base(gradient: torch.Tensor) -> None:
        if alias._version != version:
            listener(gradient.contiguous().as_strided(size, stride, offset))

    yield tensor, listener
    base = tensor._base
    if base is not None and base.requires_grad and base.is_contiguous():
        size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset()
        yield base, through_base
