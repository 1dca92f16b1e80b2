"""Attention rows of a live model computed anew, whatever kernel it runs with; what they change is part of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tensortape.stores.weights_torch import of_each_head, weights

from ..anatomy import stacks
from ..attention import interface
from ..attention.facts import Attended
from ..attention.masks import Readings
from ..errors import AttentionError, UnsupportedModelError
from ..modules import named, refuse_compiled, unwrapped


@dataclass(frozen=True)
class Rows:
    """Other weights for some queries [R] of one row of the batch.

    Args:
        row: of the batch.
        queries: positions.
        keep: [R, T] bool; where it is False the score is -inf before the softmax.
        factor: [H, R, T], what weights are multiplied with after it; they then no longer add up to 1.
    """

    row: int
    queries: torch.Tensor
    keep: torch.Tensor | None = None
    factor: torch.Tensor | None = None


Change = Callable[[int, tuple[int, int, int, int], torch.device], Sequence[Rows]]


@contextmanager
def edited(model: nn.Module, change: Change, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Within the block, change attention rows of a decoder's layers.

    Args:
        model: of transformers, in eval mode, with an attention function from its interface; called on whole sequences.
        change: gives the rows to change, from a layer's number, the call's (B, H, Tq, Tk) and the device.
        layers: which; negative numbers count from the end; all if not given.

    Raises:
        AttentionError: an attention call whose rows cannot be computed anew, or, at the end, a layer that showed none.
        UnsupportedModelError: not one stack of blocks, each of its own. CompiledModelError.
    """
    refuse_compiled(model, recompile=False)
    layer_of, count = _layers(unwrapped(model))
    wanted = set(range(count)) if layers is None else {_numbered(layer, count) for layer in layers}
    missing = set(wanted)

    def editor(module: nn.Module, call: dict[str, Any]) -> Any:
        missing.discard(layer_of[module])
        return _rewritten(call, change, layer_of[module])

    edit = interface.Edit([module for module, layer in layer_of.items() if layer in wanted], editor)
    try:
        yield
    finally:
        edit.remove()
    if missing:
        raise AttentionError(
            f"layers {sorted(missing)} called no attention function of transformers' interface within the block, so nothing was "
            "changed there; call the model inside the block. Models that compute attention by themselves cannot be edited"
        )


def layer_count(model: nn.Module) -> int:
    """Layers of a decoder; UnsupportedModelError for a model with more than one stack, or with blocks that share weights."""
    return _layers(unwrapped(model))[1]


def _rewritten(call: dict[str, Any], change: Change, layer: int) -> Any:
    attended = _checked(interface.attended(call, Readings()))
    found = attended.source.clone()  # type: ignore[union-attr]  # [B, Tq, H, dv]
    for rows in change(layer, attended.shape, found.device):
        values = of_each_head(attended.v[rows.row], found.shape[2])  # type: ignore[index]
        anew = _weights(attended, rows)
        found[rows.row, rows.queries] = torch.matmul(anew, values.to(anew.dtype)).transpose(0, 1).to(found.dtype)
    return (found, None) if isinstance(call["out"], tuple) else found  # weights that were given back would be the unchanged ones


def _weights(attended: Attended, rows: Rows) -> torch.Tensor:
    """[H, R, Tk]."""
    k, queries = attended.k[rows.row], rows.queries  # type: ignore[index]
    keep, bias = attended.mask.block(rows.row, queries, torch.arange(k.shape[1], device=k.device))
    if rows.keep is not None:
        keep = rows.keep[None] if keep is None else keep & rows.keep
    found = weights(
        attended.q[rows.row][:, queries],  # type: ignore[index]
        k,
        scale=attended.scale,
        softcap=attended.softcap,
        bias=bias,
        keep=keep,
        sinks=attended.sinks,
    )
    return found if rows.factor is None else found * rows.factor


def _checked(attended: Attended | None) -> Attended:
    if attended is None:
        raise AttentionError("an attention function gave something other than [B, T, H, d], whose rows cannot be changed")
    if attended.dropout:
        raise AttentionError("attention dropout is active, so rows cannot be computed as the model would; put it in eval mode")
    if attended.shape[2] != attended.shape[3]:
        raise AttentionError(
            f"attention of {attended.shape[2]} queries to {attended.shape[3]} keys: give whole sequences, without a filled cache"
        )
    return attended


def _layers(model: nn.Module) -> tuple[dict[nn.Module, int], int]:
    """The layer of every module inside a block, and how many layers there are."""
    found = stacks(model)
    paths = [block.path for stack in found for block in stack.blocks]
    if len(found) != 1 or len(set(paths)) < len(paths):
        raise UnsupportedModelError(
            f"anchors are changed in a decoder with one stack of blocks, each of its own; this model has {len(found)} stacks and "
            f"{len(set(paths))} different blocks in {len(paths)} layers"
        )
    blocks = dict(named(model))
    return {module: layer for layer, path in enumerate(paths) for module in blocks[path].modules()}, len(paths)


def _numbered(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise ValueError(f"layer {layer} of a model with {count} layers")
    return layer % count
