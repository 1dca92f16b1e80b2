"""The modules of a model under the names that users know: without the prefixes that wrappers add."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .errors import CompiledModelError, UnsupportedModelError

_WRAPPER_SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
DATA_PARALLEL = (
    "nn.DataParallel copies the model to every device on every call, so hooks see only parts of a batch; start one process per "
    "device with torchrun and use DistributedDataParallel"
)
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside DDP, FSDP and torch.compile wrappers; UnsupportedModelError for nn.DataParallel."""
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(DATA_PARALLEL)
    for name in _WRAPPER_SEGMENTS:
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    inner = getattr(model, "module", None)
    return unwrapped(inner) if type(model).__name__ in _WRAPPERS and isinstance(inner, nn.Module) else model


def clean_name(name: str) -> str:
    """A module path without the segments that wrappers add."""
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS)


def named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module once, under its first name; wrappers count as what they wrap."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in _WRAPPER_SEGMENTS:
            inner = unwrapped(module) if name else module
            yield clean_name(name), inner


def all_names(model: nn.Module) -> dict[str, str]:
    """Every name a module goes by, with its first one: shared modules have several."""
    first = {id(module): name for name, module in reversed(list(named(model)))}
    names = (
        (clean_name(name), unwrapped(module) if name else module) for name, module in model.named_modules(remove_duplicate=False)
    )
    return {name: first[id(module)] for name, module in names if id(module) in first}


def refuse_compiled(model: nn.Module, *, recompile: bool) -> None:
    """CompiledModelError if any module is compiled, because torch ignores hooks that come later; with `recompile` reset torch."""
    compiled = [name for name, module in model.named_modules() if _is_compiled(module)]
    if not compiled:
        return
    if not recompile:
        raise CompiledModelError(
            f"module {compiled[0]!r} is compiled already, and torch.compile silently ignores hooks that are added later; attach "
            "the recorder first (recorder.attach(), then torch.compile), or pass recompile=True to have it compiled anew"
        )
    torch.compiler.reset()


def is_compiled(model: nn.Module) -> bool:
    """Whether any module of the model is compiled."""
    return any(map(_is_compiled, model.modules()))


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
