"""Tier 1: transformers' attention interface.

Every attention module of most transformers models asks `AttentionInterface.get_interface` for its function on every forward. One
patch of that method, for as long as anyone observes or edits, wraps what it returns; the wrapper looks the calling module up and
touches neither configuration nor masks. Modules are told apart by identity, so copies of a model are not observed.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from .facts import Attended
from .functions import handled
from .masks import Mask, Readings, read

Observer = Callable[[nn.Module, dict[str, Any]], Any]  # what an observer of an `Edit` returns takes the place of the call's output
_Observers = weakref.WeakKeyDictionary[nn.Module, tuple[Observer, ...]]
_OBSERVERS: _Observers = weakref.WeakKeyDictionary()
_EDITORS: _Observers = weakref.WeakKeyDictionary()


class _Patch:
    """The wrapped `get_interface`, in place as long as there are users, or as long as somebody else's wrapper is around it."""

    users = 0
    original: Any = None
    placed = False
    lock = threading.Lock()

    @classmethod
    def enter(cls) -> None:
        with cls.lock:
            interface = sys.modules["transformers.modeling_utils"].AttentionInterface
            if not cls.placed or interface.get_interface is cls.original:
                cls.original = interface.get_interface
                interface.get_interface = _get_interface
                cls.placed = True
            cls.users += 1

    @classmethod
    def leave(cls) -> None:
        with cls.lock:
            cls.users -= 1
            interface = sys.modules["transformers.modeling_utils"].AttentionInterface
            if not cls.users and interface.get_interface is _get_interface:
                interface.get_interface = cls.original
                cls.placed = False


class Observation:
    """Has an observer called for every attention call of some modules, until removed."""

    observers: ClassVar[_Observers] = _OBSERVERS

    def __init__(self, modules: Iterable[nn.Module], observer: Observer) -> None:
        self._modules = list(modules) if "transformers.modeling_utils" in sys.modules else []
        self._observer = observer
        if self._modules:
            _Patch.enter()
        for module in self._modules:
            self.observers[module] = (*self.observers.get(module, ()), observer)

    def remove(self) -> None:
        """Stop observing."""
        for module in self._modules:
            left = tuple(other for other in self.observers.pop(module, ()) if other is not self._observer)
            if left:
                self.observers[module] = left
        if self._modules:
            _Patch.leave()
        self._modules = []


class Edit(Observation):
    """Has an observer called that gives another output to every attention call of some modules, before others observe it."""

    observers: ClassVar[_Observers] = _EDITORS


def attended(call: dict[str, Any], readings: Readings) -> Attended | None:
    """What a call was, from what the wrapper saw; None for an output that is not [B, Tq, H, dv]."""
    module, q, k, output = call["module"], call["q"], call["k"], call["out"]
    options = call["options"]
    raw = output[0] if isinstance(output, tuple) else output
    if raw.ndim != 4:
        return None
    scale = options.get("scaling")
    return Attended(
        tier="interface",
        implementation=call["implementation"],
        q=q,
        k=k,
        v=call["v"],
        z=raw.transpose(1, 2),
        mask=_mask(call, readings),
        scale=float(scale) if scale is not None else q.shape[-1] ** -0.5,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        dropout=float(options.get("dropout") or 0.0) if module.training else 0.0,
        source=raw,
        turn=lambda gradient: gradient.transpose(1, 2),
    )


def _get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
    function = _Patch.original(self, attn_implementation, default)

    def call(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **options: Any) -> Any:
        editors, observers = _EDITORS.get(module, ()), _OBSERVERS.get(module, ())
        if not editors and not observers:
            return function(module, query, key, value, attention_mask, *args, **options)
        with handled():
            output = function(module, query, key, value, attention_mask, *args, **options)
        seen = {"module": module, "implementation": attn_implementation or "eager", "q": query, "k": key, "v": value}
        for editor in editors:
            output = editor(module, {**seen, "mask": attention_mask, "options": options, "out": output})
        for observer in observers:
            observer(module, {**seen, "mask": attention_mask, "options": options, "out": output})
        return output

    return call


def _mask(call: dict[str, Any], readings: Readings) -> Mask:
    """What the mask meant to the implementation that was given it."""
    mask, options, implementation = call["mask"], call["options"], call["implementation"]
    queries, keys = call["q"].shape[2], call["k"].shape[2]
    found = _given(mask, call, readings)
    if "flash" in implementation:
        found = _flash(found, call)
    elif found.keep is None and mask is None and implementation != "eager" and _is_causal(call) and queries > 1:
        found = Mask(causal=True)
        found = found if keys <= queries else found.first_keys(queries)
    position_bias = options.get("position_bias")
    if isinstance(position_bias, torch.Tensor) and bool(position_bias.any()):
        total = position_bias.detach() if found.bias is None else position_bias.detach() + found.bias
        found = replace(found, bias=total)
    return found


def _given(mask: Any, call: dict[str, Any], readings: Readings) -> Mask:
    if mask is None:
        return Mask()
    if not isinstance(mask, torch.Tensor):  # a BlockMask of flex attention
        return read(_dense(mask, call))
    keys = call["k"].shape[2]
    if mask.ndim == 2 and mask.shape == (call["q"].shape[0], keys):  # flash attention's padding mask
        return read((mask != 0)[:, None, None, :])
    return readings.read(mask).first_keys(keys)


def _flash(found: Mask, call: dict[str, Any]) -> Mask:
    """Flash attention aligns queries with the last keys and applies its window itself, to both sides where it is not causal."""
    window = call["options"].get("sliding_window")
    return replace(found, causal=_is_causal(call), window=window, align=call["k"].shape[2] - call["q"].shape[2])


def _is_causal(call: dict[str, Any]) -> bool:
    asked = call["options"].get("is_causal")
    return bool(getattr(call["module"], "is_causal", True) if asked is None else asked)


def _dense(mask: Any, call: dict[str, Any]) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_mask

    queries, keys = call["q"].shape[2], call["k"].shape[2]
    found: torch.Tensor = create_mask(mask.mask_mod, call["q"].shape[0], 1, queries, keys, device=call["q"].device)
    return found
