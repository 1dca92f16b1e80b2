"""What every Transformer shares: stacks of blocks, and aliases for the tensors between them.

A stack is an outermost list of blocks that contain attention. Lists of stages (Swin) flatten into one; blocks that share weights
(ALBERT) count once per call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensortape.stores.patterns import Alias, SiteName, parse_site

from .families import Family, family_of
from .modules import named, unwrapped

_ATTENTION = re.compile(r"(?i).*(attention|attn)\d*")


@dataclass(frozen=True)
class Block:
    """One layer of a stack: its module path, and which call of that module it is."""

    path: str
    call: int


@dataclass(frozen=True)
class Stack:
    """Blocks in order. `name` is empty where the model has one stack, else the path of the module that holds it."""

    name: str
    parent: str
    blocks: tuple[Block, ...]
    family: Family | None


def aliased_sites(model: nn.Module) -> list[tuple[Alias, SiteName]]:
    """Every alias the model has, with the site it stands for; several aliases may stand for one site."""
    paths = {path for path, _ in named(model)}
    found = stacks(model)
    embeddings = [pair for stack in found or [Stack("", "", (), None)] for pair in _embedding(model, stack)]
    return [*embeddings, *(pair for stack in found for pair in _of_stack(stack, paths))]


def stacks(model: nn.Module) -> list[Stack]:
    """The stacks of blocks of a model, in order."""
    lists = list(_outermost(model, ""))
    single = len(lists) == 1
    return [_stack(model, path, blocks, name="" if single else _parent(path)) for path, blocks in lists]


def is_attention(name: str, module: nn.Module) -> bool:
    """Whether a module is an attention module, by its class or attribute name."""
    return _ATTENTION.fullmatch(type(module).__name__) is not None or _ATTENTION.fullmatch(name.rpartition(".")[2]) is not None


def _of_stack(stack: Stack, paths: set[str]) -> Iterator[tuple[Alias, SiteName]]:
    depth = len(stack.blocks)
    for layer, block in enumerate(stack.blocks):
        for alias, choices in _block_sites(stack.family).items():
            site = _first_existing(block, choices, paths)
            if site is not None:
                yield Alias(stack.name, alias, layer, depth), site
    for name in stack.family.final_norm if stack.family else ():
        found = [path for path in (_join(stack.parent, name), _join(_parent(stack.parent), name)) if path in paths]
        if found:
            yield Alias(stack.name, "final_norm"), SiteName(found[0])


def _block_sites(family: Family | None) -> dict[str, tuple[str, ...]]:
    shared: dict[str, tuple[str, ...]] = {"resid_pre": (":in",), "resid_post": (":out",)}
    if family is None:
        return shared
    return {**shared, "resid_mid": family.resid_mid, "attn_out": family.attn_out, "mlp_out": family.mlp_out}


def _first_existing(block: Block, choices: tuple[str, ...], paths: set[str]) -> SiteName | None:
    for choice in map(parse_site, choices):
        path = _join(block.path, choice.path)
        if path in paths:
            return SiteName(path, choice.port, max(choice.call, block.call))
    return None


def _embedding(model: nn.Module, stack: Stack) -> Iterator[tuple[Alias, SiteName]]:
    """The module that embeds a stack's input: the first nn.Embedding beside its blocks, else what the model itself names."""
    inside = f"{stack.parent}." if stack.parent else ""
    tables = [path for path, module in named(model) if isinstance(module, nn.Embedding) and path.startswith(inside)]
    beside = [path for path in tables if not any(path.startswith(f"{block.path}.") for block in stack.blocks)]
    if beside:
        yield Alias(stack.name, "embed"), SiteName(beside[0])
        return
    wanted = _input_embedding(model, stack.parent)
    yield from ((Alias(stack.name, "embed"), SiteName(path)) for path, module in named(model) if module is wanted)


def _input_embedding(model: nn.Module, path: str) -> nn.Module | None:
    """What the nearest module above `path` that knows names as its input embedding; else the first nn.Embedding."""
    modules = dict(named(model))
    while True:
        known = getattr(modules.get(path), "get_input_embeddings", None)
        try:
            found = known() if known is not None else None
        except (AttributeError, NotImplementedError):
            found = None
        if isinstance(found, nn.Module):
            return found
        if not path:
            return next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
        path = _parent(path)


def _stack(model: nn.Module, path: str, blocks: list[tuple[str, nn.Module]], *, name: str) -> Stack:
    config, family = _family(model, path, blocks[0][1])
    first_names = {id(module): block for block, module in reversed(blocks)}
    chain = _in_order_of_calls([(first_names[id(module)], block) for block, module in blocks], config, family)
    calls: dict[str, int] = {}
    counted = []
    for block in chain:
        calls[block] = calls.get(block, 0) + 1
        counted.append(Block(block, calls[block]))
    return Stack(name, _parent(path), tuple(counted), family)


def _in_order_of_calls(blocks: list[tuple[str, str]], config: Any, family: Family | None) -> list[str]:
    """Module paths, layer by layer. `blocks` are (path, place); where a family repeats them, groups take turns as in ALBERT."""
    if family is None or family.repeats is None:
        return [path for path, _ in blocks]
    groups: dict[str, list[str]] = {}
    for path, place in blocks:
        groups.setdefault(_parent(place), []).append(path)
    layers, ordered = int(getattr(config, family.repeats)), list(groups.values())
    return [path for layer in range(layers) for path in ordered[layer * len(ordered) // layers]]


def _family(model: nn.Module, path: str, block: nn.Module) -> tuple[Any, Family | None]:
    """The config nearest above a stack, and the table it or the block's class goes by."""
    modules = dict(named(model))
    while True:
        config = getattr(modules.get(path), "config", None)
        found = family_of(getattr(config, "model_type", "")) if config is not None else None
        if found is not None or not path:
            return config, found or _family_by_class(block)
        path = _parent(path)


def _family_by_class(block: nn.Module) -> Family | None:
    """By the block's class, or one it is derived from (fully_shard derives one)."""
    return next(filter(None, (family_of(kind.__name__) for kind in type(block).__mro__)), None)


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        blocks = _children(module, path)
        if any(_has_attention(block) for _, block in blocks):
            yield path, [found for name, block in blocks for found in _flattened(name, block)]
            return
    if path and is_attention(path, module):
        return
    for name, child in _children(module, path):
        yield from _outermost(child, name)


def _flattened(path: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a stage, or the block itself; nothing for an element without attention beside blocks that have it."""
    inner = list(_lists_of_blocks(block, path))
    if inner:
        yield from (found for name, child in inner for found in _flattened(name, child))
    elif _has_attention(block):
        yield path, block


def _lists_of_blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in _children(module, path):
        if is_attention(name, child):
            continue
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) and all(map(_has_attention, child)):
            yield from _children(child, name)
        else:
            yield from _lists_of_blocks(child, name)


def _has_attention(module: nn.Module) -> bool:
    """Whether a module has attention inside it without being attention itself."""
    if _ATTENTION.fullmatch(type(module).__name__):
        return False
    return any(name and is_attention(name, inner) for name, inner in module.named_modules())


def _children(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """Children with their paths; one that stands twice is listed twice."""
    return [(_join(path, name), unwrapped(child)) for name, child in module._modules.items() if child is not None]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
