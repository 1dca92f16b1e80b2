"""What is computed from attention weights while recording, a few queries at a time: reductions never hold the full matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tensortape.stores.patterns import SiteName

from ..capture import Capture
from ..errors import AttentionError
from ..layouts import Layout
from ..sites import Tap
from ..streams import Stream
from .spans import Call

Segments = Callable[[Stream], list[torch.Tensor]]


def captured(
    tap: Tap, site: SiteName, call: Call, layouts: tuple[Layout, Layout], about: dict[str, Any], segments: Segments
) -> Capture:
    """The weights of a call as the tap asks for them: all, some queries' or keys', or a reduction."""
    options, (of_queries, of_keys) = tap.options, layouts
    call.check()
    if call.queries.group > 1 and (options.queries is not None or options.keys is not None or options.segments is not None):
        raise AttentionError(
            f"site {site}: examples are cut into windows, so queries=, keys= and flow would be a window's; record all weights"
        )
    if options.reduce == "entropy":
        return Capture(tap, site, of_queries, entropy(call), call.queries.lengths, "entropy", about=about)
    if options.reduce == "received":
        return Capture(tap, site, of_keys, received(call), call.keys.lengths, "received", about=about)
    if options.segments is not None:
        if call.cross:
            raise AttentionError(
                f"site {site}: flow is between segments of one stream, but keys are of another here; select 'encoder.weights', say"
            )
        rows = flow(call, segments(call.queries), options.segments)
        return Capture(tap, site, of_queries, rows, None, "flow", about=about)
    if options.queries is not None:
        suffix = f"queries={','.join(map(str, options.queries))}"
        return Capture(tap, site, of_keys, of_some_queries(call, options.queries), call.keys.lengths, suffix, about=about)
    if options.keys is not None:
        suffix = f"keys={','.join(map(str, options.keys))}"
        return Capture(tap, site, of_queries, to_some_keys(call, options.keys), call.queries.lengths, suffix, about=about)
    rows, lengths = pairs(call, call.attended.reference.dtype if options.dtype is None else getattr(torch, options.dtype))
    return Capture(tap, site, of_queries, rows, lengths, keys=of_keys, about=about)


def pairs(call: Call, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    """All weights, [sum Tq Tk, H] row-major over (query, key), and rows per example."""
    found = [tile.permute(1, 2, 0).reshape(-1, tile.shape[0]).to(dtype) for _, _, tile in call.tiles()]
    if call.queries.group > 1:
        square = call.queries.width * call.keys.width * call.queries.group
        return torch.cat(found), [square] * len(call.queries.lengths)
    lengths = [queries * keys for queries, keys in zip(call.queries.lengths, call.keys.lengths, strict=True)]
    return torch.cat(found), lengths


def entropy(call: Call) -> torch.Tensor:
    """Entropy in nats of each query's weights, [kept queries, H] float32; NaN for a query that sees nothing."""
    found = [torch.special.entr(tile.float()).sum(-1).T for _, _, tile in call.tiles()]
    return torch.cat(found)


def received(call: Call) -> torch.Tensor:
    """Mass that each key receives from all queries of its example, [kept keys, H] float32."""
    found: dict[int, torch.Tensor] = {}
    for example, _, tile in call.tiles():
        mass = torch.nan_to_num(tile.float()).sum(1).T
        found[example] = mass if example not in found else found[example] + mass
    empty = torch.zeros(0, call.attended.shape[1])
    return torch.cat([found.get(number, empty) for number in range(len(call.keys.spans))])


def flow(call: Call, segments: list[torch.Tensor], count: int) -> torch.Tensor:
    """Mass that flows from key segment to query segment, [examples, H, query segment, key segment] float32.

    Args:
        segments: for each example the segment of each of its tokens, [T_i]; -1 for none.
        count: how many segments there are.
    """
    device = call.attended.reference.device
    hot = [torch.nn.functional.one_hot(one.long() + 1, count + 1)[:, 1:].float().to(device) for one in segments]
    found = torch.zeros(len(segments), call.attended.shape[1], count, count, device=device)
    for example, start, tile in call.tiles():
        rows = hot[example][start : start + tile.shape[1]]
        found[example] += torch.einsum("hij,ik,jl->hkl", torch.nan_to_num(tile.float()), rows, hot[example])
    return found


def of_some_queries(call: Call, queries: Any) -> torch.Tensor:
    """Weights of some queries of each example, [kept keys, chosen, H]."""
    pieces = []
    spans = zip(call.queries.spans, call.keys.spans, strict=True)
    for (row, at), (key_row, keys) in spans:
        tile = call.tile(row, at[torch.tensor([_place(number, len(at)) for number in queries])], key_row, keys - call.shift)
        pieces.append(tile.permute(2, 1, 0).to(call.attended.reference.dtype))
    return torch.cat(pieces)


def to_some_keys(call: Call, keys: Any) -> torch.Tensor:
    """Weights that all queries give to some keys of each example, [kept queries, chosen, H]."""
    pieces = []
    for example, _, tile in call.tiles():
        chosen = torch.tensor([_place(number, call.keys.lengths[example]) for number in keys])
        pieces.append(tile[:, :, chosen.to(tile.device)].permute(1, 2, 0).to(call.attended.reference.dtype))
    return torch.cat(pieces)


def _place(number: int, count: int) -> int:
    """A token's place counted from the start."""
    if not -count <= number < count:
        raise AttentionError(f"token {number} was asked for, but an example has {count} tokens")
    return number % count
