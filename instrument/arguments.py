"""Arguments of a module's call, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tensortape.stores.patterns import SiteName

from .leaves import Leaf

Arguments = Mapping[str, Any]


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, in the order of the module's signature, whichever way they were given."""
    signature = inspect.signature(module.forward)
    bound = signature.bind_partial(*args, **kwargs).arguments
    found: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({f"{name}.{number}": inner for number, inner in enumerate(value)})
        else:
            found[name] = value
    return found


def parameters_of(module: nn.Module) -> frozenset[str]:
    """Names of the arguments that a module's forward takes."""
    return frozenset(inspect.signature(module.forward).parameters)


def leaf_of(site: SiteName, value: Callable[[], Any]) -> Leaf:
    """Keys of the leaf; an input may be named by its place among the arguments, too."""
    leaf = site.leaf
    if site.base == "in" and leaf and leaf[0].isdigit():
        names = list(value())
        return (names[int(leaf[0])], *leaf[1:]) if int(leaf[0]) < len(names) else leaf
    return leaf
