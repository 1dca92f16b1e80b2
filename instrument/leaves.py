"""Tensors inside what modules take and return: tuples, lists, dicts, ModelOutputs, dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .errors import SiteNotFoundError

Leaf = tuple[str, ...]


def leaves(value: Any, at: Leaf = ()) -> Iterator[tuple[Leaf, torch.Tensor]]:
    """(keys, tensor) of every tensor inside, outermost first; anything else, caches for instance, is passed over."""
    if isinstance(value, torch.Tensor):
        yield at, value
        return
    for key, inner in _items(value):
        yield from leaves(inner, (*at, key))


def pick(value: Any, leaf: Leaf, site: str) -> torch.Tensor:
    """The tensor that `leaf` names, or the first floating one; SiteNotFoundError listing the leaves if there is none."""
    found = list(leaves(value))
    for keys, tensor in found:
        if keys == leaf if leaf else tensor.is_floating_point():
            return tensor
    listed = ", ".join(f"{_shown(keys)} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for keys, tensor in found)
    wanted = f"no tensor {_shown(leaf)}" if leaf else "no floating tensor"
    raise SiteNotFoundError(f"site {site!r}: the module gives {wanted}; it gives {listed or 'no tensor at all'}")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), inner) for key, inner in value.items())
    elif isinstance(value, (tuple, list)):
        yield from ((str(key), inner) for key, inner in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def _shown(leaf: Leaf) -> str:
    return "".join(f"[{key}]" for key in leaf) or "[]"
