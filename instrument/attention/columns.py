"""From an attention call to captures: what is stored of it, packed by example."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tensortape.stores.patterns import SiteName

from ..capture import Capture
from ..errors import AttentionError
from ..layouts import Layout
from ..sites import Tap
from . import masks, online
from .facts import Attended
from .online import Segments
from .spans import Call

logger = logging.getLogger("tensortape")
_LATER = (
    "site {}: in the first batch weights followed from queries and keys, now they do not (Site(..., store='weights') stores them):"
)


def captures(
    tap: Tap, site: SiteName, call: Call, layouts: tuple[Layout, Layout], stored: str, segments: Segments, *, first: bool
) -> Iterator[Capture]:
    """Everything a tap stores of a call.

    Args:
        site: the call's site; its port is replaced.
        layouts: of queries and of keys.
        stored: `qk` or `weights`, as `choose` has chosen.
        segments: gives the segment of each token, for reductions that ask for it.
        first: whether this is the batch's first forward; keys of cross-attention are the same in all.
    """
    about = {"attention": {**facts(call), "stored": stored}}
    for port in _ports(tap, call, stored, first=first):
        named = SiteName(site.path, port, site.call)
        if port == "weights":
            yield online.captured(tap, named, call, layouts, about, segments)
            continue
        taken = _part(tap, named, call, layouts, about)
        if taken is not None:
            yield taken


def choose(tap: Tap, site: SiteName, call: Call) -> str:
    """Whether the weights of a call are rebuilt from queries and keys, or stored."""
    reason = unexplained(call)
    asked = tap.options.store
    if reason is not None:
        if asked == "qk":
            logger.info("%s:attention stores the weights themselves: %s", site.path, reason)
        return "weights"
    if asked == "auto":
        return "qk" if _bytes_of_qk(call) <= _bytes_of_weights(call) else "weights"
    return asked


def unexplained(call: Call) -> str | None:
    """Why the weights cannot be rebuilt from queries, keys and a few facts; None if they can."""
    attended = call.attended
    if attended.q is None:
        return "the module computes them itself, and only they are seen"
    if attended.extra_keys:
        return "there are keys that are no tokens"
    if call.queries.group > 1 or call.keys.group > 1:
        return "examples are cut into windows"
    if call.intervals is None:
        return "the keys that a query sees are not neighbours, or differ between heads"
    if attended.mask.bias is not None and (call.cross or _bias(call) is None):
        return "scores have a bias that depends on more than the distance between query and key"
    return None


def facts(call: Call) -> dict[str, Any]:
    """What the run says of an attention call besides its columns."""
    attended = call.attended
    return {
        "tier": attended.tier,
        "implementation": attended.implementation,
        "scale": attended.scale,
        "softcap": attended.softcap,
        "cross": call.cross,
        "window": call.queries.width if call.queries.group > 1 else None,
    }


def gradient(tap: Tap, site: SiteName, call: Call, layouts: tuple[Layout, Layout], tensor: torch.Tensor) -> Capture:
    """dL/dz [B, H, Tq, dv], or dL/dweights [B, H, Tq, Tk], packed."""
    if site.base == "weights":
        rows, lengths = online.pairs(_with_weights(call, tensor), tensor.dtype)
        return Capture(tap, site, layouts[0], rows, lengths, keys=layouts[1])
    return Capture(tap, site, layouts[0], call.queries.pack(tensor.detach().transpose(1, 2)), call.queries.lengths)


def _ports(tap: Tap, call: Call, stored: str, *, first: bool) -> Iterator[str]:
    asked = tap.site.base
    if asked != "attention":
        if not tap.site.is_gradient:
            yield asked
        return
    keys = not call.cross or first
    if stored == "weights":
        yield "weights"
    else:
        yield from ("q", *(("k",) if keys else ()), "keys", "bias", "sinks")
    if tap.site.is_gradient and call.attended.v is not None:
        yield from (*(("v",) if keys else ()), "z", "dropout")


def _part(tap: Tap, site: SiteName, call: Call, layouts: tuple[Layout, Layout], about: dict[str, Any]) -> Capture | None:
    attended, queries, keys = call.attended, call.queries, call.keys
    of_queries, of_keys = layouts
    if site.port in ("q", "z"):
        rows = queries.pack(_known(getattr(attended, site.port), site).detach().transpose(1, 2))
        return Capture(tap, site, of_queries, _cast(tap, rows), queries.lengths, about=about)
    if site.port in ("k", "v"):
        new = _known(getattr(attended, site.port), site).detach()
        new = new[:, :, : new.shape[2] - attended.extra_keys][:, :, -call.new_keys :].transpose(1, 2)
        stream = keys if call.cross else queries
        return Capture(tap, site, of_keys, _cast(tap, stream.pack(new)), stream.lengths, about=about)
    return _fact(tap, site, call, of_queries)


def _fact(tap: Tap, site: SiteName, call: Call, layout: Layout) -> Capture | None:
    """Columns that say which keys a query sees and what is added to its scores; None for what the call has not."""
    attended, lengths = call.attended, call.queries.lengths
    if site.port == "keys":
        intervals = call.intervals
        if intervals is None:
            raise AttentionError(f"{_LATER} the keys that a query sees are not neighbours".format(site))
        return Capture(tap, site, layout, intervals, lengths)
    if site.port == "bias" and attended.mask.bias is not None:
        table = _bias(call)
        if table is None:
            raise AttentionError(f"{_LATER} its scores have a bias that depends on more than distance".format(site))
        return Capture(tap, site, layout, table[_places(call).to(table.device)], lengths)
    if site.port == "sinks" and attended.sinks is not None:
        return Capture(tap, site, layout, attended.sinks.detach().expand(len(lengths), -1).clone(), None)
    if site.port == "dropout":
        return Capture(tap, site, layout, torch.full((len(lengths),), attended.dropout), None)
    return None


def _places(call: Call) -> torch.Tensor:
    """The place of each kept query among the kept tokens of its example, over all forwards so far."""
    spans = zip(call.keys.lengths, call.queries.lengths, strict=True)
    return torch.cat([torch.arange(total - new, total) for total, new in spans])


def _with_weights(call: Call, tensor: torch.Tensor) -> Call:
    attended = Attended("softmax", call.attended.implementation, weights=tensor)
    return replace(call, attended=attended)


def _bias(call: Call) -> torch.Tensor | None:
    return masks.by_distance(call.attended.mask, call.attended.shape[1], call.attended.shape[2], call.keys.width)


def _cast(tap: Tap, rows: torch.Tensor) -> torch.Tensor:
    return rows if tap.options.dtype is None else rows.to(getattr(torch, tap.options.dtype))


def _known(tensor: torch.Tensor | None, site: SiteName) -> torch.Tensor:
    if tensor is None:
        raise AttentionError(f"site {site}: the module computes its weights itself, and only they are seen; record its weights")
    return tensor


def _bytes_of_qk(call: Call) -> int:
    q, k = call.attended.reference, call.attended.k
    stream = call.keys if call.cross else call.queries
    heads_of_keys = 0 if k is None else k.shape[1]
    return (call.queries.kept * q.shape[1] + stream.kept * heads_of_keys) * q.shape[3] * q.itemsize


def _bytes_of_weights(call: Call) -> int:
    q = call.attended.reference
    pairs = sum(a * b for a, b in zip(call.queries.lengths, call.keys.lengths, strict=True))
    return pairs * q.shape[1] * q.itemsize
