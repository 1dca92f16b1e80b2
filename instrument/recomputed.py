"""Calls that a checkpoint computes once more during backward: which of the forward's calls they are.

A reentrant checkpoint has no graph in the first pass, so gradients are heard of on what it computes again. It does so segment by
segment, the last segment first, and within a segment in the order of the forward; a segment is whole when the first gradient of it
arrives. Calls that had a graph in the first pass (plain ones, and all under other checkpoints) were listened to then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from tensortape.stores.patterns import SiteName

from .sites import Tap

Key = tuple[Tap, str, str]


@dataclass
class _Slot:
    """A call of a segment; its number is known once the segment is whole."""

    site: SiteName
    number: int | None = None


class Recomputed:
    """The calls of one forward that had no graph, and those computed again so far."""

    def __init__(self) -> None:
        self._expected: defaultdict[Key, list[int]] = defaultdict(list)
        self._left: dict[Key, list[int]] = {}
        self._segment: defaultdict[Key, list[_Slot]] = defaultdict(list)

    def expect(self, tap: Tap, site: SiteName) -> None:
        """A call of the first pass had no graph."""
        self._expected[tap, site.path, site.port].append(site.call)

    def place(self, tap: Tap, site: SiteName) -> Callable[[], SiteName | None]:
        """A call is computed again; gives what names it when its gradient arrives, or None if it was heard of in the first pass."""
        slot = _Slot(site)
        self._segment[tap, site.path, site.port].append(slot)

        def named() -> SiteName | None:
            if slot.number is None:
                self._close()
            return replace(site, call=slot.number) if slot.number else None

        return named

    def _close(self) -> None:
        """Number the calls of the segment that is now whole: they are the last ones left. A second backward begins anew."""
        for key, slots in self._segment.items():
            left = self._left.get(key) or list(self._expected.get(key, []))
            numbers = left[max(0, len(left) - len(slots)) :]
            self._left[key] = left[: max(0, len(left) - len(slots))]
            for slot, number in zip(slots, numbers or [0] * len(slots), strict=False):
                slot.number = number
        self._segment.clear()
