"""When to commit without being asked."""

from __future__ import annotations

import time

REWRITE_SHARE = 10  # tails may be one part in ten of what is written
TIME_SHARE = 50  # commits may take one part in fifty of the time
SLOWEST = 10.0  # seconds


class Cadence:
    """When to commit without being asked: as often as costs little time, and rewrites few bytes unless a lot of time has passed.

    Args:
        seconds: after which a slow recording commits all the same.
        nbytes: appended bytes after which to commit, whatever it costs; None for no such limit.
    """

    def __init__(self, seconds: float = SLOWEST, nbytes: int | None = None) -> None:
        self._seconds, self._limit = seconds, nbytes
        self._bytes = 0
        self._last = time.monotonic()
        self._duration = 0.0

    def due(self, appended: int, tails: int) -> bool:
        """Whether to commit after an append of so many bytes, with so many bytes in tails."""
        self._bytes += appended
        waited = time.monotonic() - self._last
        if self._limit is not None and self._bytes >= self._limit:
            return True
        affordable = waited >= TIME_SHARE * self._duration
        return affordable and (self._bytes >= REWRITE_SHARE * tails or waited >= self._seconds)

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._last = time.monotonic()
        self._duration, self._bytes = self._last - self._began, 0
