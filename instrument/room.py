"""Room on the disk for the rest of a recording."""

from __future__ import annotations

from collections.abc import Callable

from tensortape.stores import RunWriter


class Room:
    """Estimates once, after the first batch, what a recording will take.

    Args:
        writer: of the recording.
        checked: whether to do so.
    """

    def __init__(self, writer: RunWriter, *, checked: bool = True) -> None:
        self._writer = writer
        self._due = checked

    def check(self, done: int, left: Callable[[], float | None]) -> None:
        """DiskShortError unless the disk has room for what is `left`, in the unit that `done` counts what was recorded in."""
        if not self._due or not done:
            return
        self._due = False
        rest = self._writer.appended_bytes * max(left() or 0, 0) / done
        self._writer.check_disk(int(rest), "the rest of this recording")
