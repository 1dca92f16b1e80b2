"""The function mode that tiers 3 and 4 see calls of torch functions with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

OnCall = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]
SDPA = functional.scaled_dot_product_attention
SOFTMAX = (functional.softmax, torch.softmax, torch.Tensor.softmax)

_inside = threading.local()


@contextmanager
def handled() -> Iterator[None]:
    """Calls inside belong to an attention call that a higher tier sees as a whole."""
    before = getattr(_inside, "handled", False)
    _inside.handled = True
    try:
        yield
    finally:
        _inside.handled = before


class Functions(TorchFunctionMode):
    """Shows every scaled_dot_product_attention and softmax that no higher tier has seen; calls go on as they are."""

    def __init__(self, on_call: OnCall) -> None:
        super().__init__()
        self._on_call = on_call

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled anew for every signature it meets
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, then show the call."""
        given = kwargs or {}
        output = function(*args, **given)
        if (function is SDPA or function in SOFTMAX) and not getattr(_inside, "handled", False):
            self._on_call(function, args, given, output)
        return output
