"""Bytes that come from an object store when they are first needed."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DamagedError
from .contract import Span

if TYPE_CHECKING:
    from .object_store import ObjectPlace

GAP = 256 << 10  # spans less than this apart come in one request: waiting for another one takes longer
_COUNTING = threading.Lock()
MOST = 16 << 20  # what one request brings, so that several at once bring a large span


class Fetched:
    """A view of an object that is fetched by ranges. Its pages are empty until their bytes are loaded."""

    def __init__(self, place: ObjectPlace, path: str, size: int) -> None:
        self._place = place
        self._path = path
        # An anonymous map takes no memory until it is touched; a large numpy array may come in pages of 2 MiB.
        self._own = np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)[:size]
        self.content = self._own[:]
        self.content.flags.writeable = False
        self.held = 0

    def load(self, spans: Iterable[Span]) -> None:
        """Fetch spans, also those that are here already: whoever asks knows what it has asked for."""
        found = sum(self._place.each(self._bring, requests(spans)))
        with _COUNTING:  # several threads may read at once
            self.held += found
            self._place.fetched += found

    def _bring(self, spans: list[Span]) -> int:
        """Only what was asked for is written: bytes between the spans may have been checked, and be in use."""
        for (start, stop), found in zip(spans, self._place.ranges(self._path, spans), strict=True):
            if len(found) != stop - start:
                raise DamagedError(f"{self._path}: the object is shorter than it was when it was opened")
            self._own[start:stop] = np.frombuffer(found, np.uint8)
        return sum(stop - start for start, stop in spans)


def requests(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Spans in groups, one request each: near ones together, large ones cut."""
    group: list[Span] = []
    for start, stop in _cut(spans):
        if group and (start - group[-1][1] >= GAP or stop - group[0][0] > MOST):
            yield group
            group = []
        group.append((start, stop))
    if group:
        yield group


def _cut(spans: Iterable[Span]) -> Iterator[Span]:
    for start, stop in sorted(spans):
        for first in range(start, stop, MOST):
            yield first, min(first + MOST, stop)
