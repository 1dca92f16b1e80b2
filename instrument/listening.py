"""The gradient of a tensor as it is now, whatever is done to it later."""

from __future__ import annotations

from collections.abc import Callable

import torch

Listener = Callable[[torch.Tensor], None]


def listen(tensor: torch.Tensor, listener: Listener) -> None:
    """Have a function called with each gradient of a tensor that requires one.

    A tensor's own hook does that also if the tensor is changed in place afterwards, except where it is a view (as what a linear
    layer makes of three axes is): autograd then goes past the view, to what the view is of. The gradient is taken from there if it
    has not come the direct way.
    """
    arrived = False

    def direct(gradient: torch.Tensor) -> None:
        nonlocal arrived
        arrived = True
        listener(gradient)

    def through_base(gradient: torch.Tensor) -> None:
        nonlocal arrived
        if not arrived:
            listener(gradient.contiguous().as_strided(size, stride, offset))
        arrived = False  # for the next backward

    tensor.register_hook(direct)  # type: ignore[no-untyped-call]
    base = tensor._base
    if base is not None and base.requires_grad and base.is_contiguous():
        size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset()
        base.register_hook(through_base)  # type: ignore[no-untyped-call]
