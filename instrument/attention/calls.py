"""The attention calls of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tensortape.stores.patterns import SiteName

from ..capture import Capture, Pins
from ..errors import AttentionError
from ..layouts import Layout
from ..sites import Tap
from ..streams import Stream
from . import check, columns
from .facts import Attended
from .masks import Mask
from .placing import place
from .spans import Call


@dataclass(frozen=True)
class _Known:
    """What is left of a call when its tensors are gone."""

    call: Call
    layouts: tuple[Layout, Layout]
    sample: check.Sample | None


@dataclass
class AttentionCalls:
    """Captures of attention calls, and of their gradients later on."""

    _known: dict[tuple[str, int], _Known] = field(default_factory=dict)

    def captures(
        self,
        taps: Sequence[Tap],
        site: SiteName,
        attended: Attended,
        pins: Pins,
        steps: Sequence[dict[str, Stream]],
        rows: int,
        *,
        cached: bool,
        segments: Callable[[Stream], list[torch.Tensor]],
    ) -> Iterator[Capture]:
        """What the taps store of a call."""
        call, layouts = place(site, attended, pins, steps, rows, cached=cached)
        chosen = [tap for tap in taps if call.cross or not tap.cross]
        _check_facts(site, columns.facts(call), pins)
        taken = check.sample(call) if chosen else None
        if taken is not None and attended.z is not None:
            check.explain(site, taken, attended.z.dtype)
        for tap in chosen:
            stored = self._stored(tap, site, call, pins)
            for found in columns.captures(tap, site, call, layouts, stored, segments, first=len(steps) == 1):
                yield replace(found, about={**found.about, "cross": call.cross, "keys": call.keys.lengths})
        graded = any(tap.site.is_gradient for tap in chosen)
        self._known[site.path, site.call] = _Known(_without_tensors(call), layouts, taken if graded else None)

    def gradients(self, tap: Tap, site: SiteName, gradient: torch.Tensor) -> list[Capture]:
        """dL/dz (or dL/dweights) of a call, and how well it agrees with what the weights say of it."""
        known = self._known.get((site.path, site.call))
        if known is None or (tap.cross and not known.call.cross):
            return []
        taken = columns.gradient(tap, site, known.call, known.layouts, gradient)
        taken = replace(taken, about={"cross": known.call.cross})
        if site.base != "z":
            return [taken]
        error = torch.full((len(known.call.queries.lengths),), torch.nan)
        if known.sample is not None:
            error[known.sample.example] = known.sample.identity_error(gradient)
        return [taken, Capture(tap, site, known.layouts[0], error, None, "identity", about={"cross": known.call.cross})]

    def _stored(self, tap: Tap, site: SiteName, call: Call, pins: Pins) -> str:
        """Queries and keys, or weights: decided once for a recording."""
        if tap.site.base != "attention":
            return "weights" if call.attended.q is None else "qk"
        if site not in pins.stored:
            pins.stored[site] = columns.choose(tap, site, call)
        return pins.stored[site]


def _check_facts(site: SiteName, found: dict[str, Any], pins: Pins) -> None:
    """Facts are said once for a column, so they must hold in every batch."""
    first = pins.facts.setdefault(site, found)
    changed = [name for name in ("scale", "softcap", "cross", "tier", "window") if found[name] != first[name]]
    if changed:
        was = ", ".join(f"{name} {first[name]!r} was, and now is {found[name]!r}" for name in changed)
        raise AttentionError(f"the attention of {site.path!r} is not what it was in the first batch: {was}")


def size_of(taken: Capture) -> Capture:
    """How many queries and keys each example's weights are of, [examples, 2] int32: a table of pairs does not tell."""
    keys = torch.tensor(taken.about["keys"])
    queries = torch.tensor(taken.lengths or []) // keys.clamp(min=1)
    return Capture(taken.tap, taken.site, taken.layout, torch.stack([queries, keys], 1).int(), None, "size", about=taken.about)


def _without_tensors(call: Call) -> Call:
    bare = replace(call.attended, q=None, k=None, v=None, z=None, weights=None, mask=Mask(), sinks=None, source=None)
    return replace(call, attended=bare)
