"""Room on the disk for the rest of a recording."""

from __future__ import annotations

from tensortape.stores import RunWriter


class Room:
    """Estimates once, after the first batch, what a recording will take.

    Args:
        writer: of the recording.
        due: whether to do so.
    """

    def __init__(self, writer: RunWriter, *, due: bool) -> None:
        self.due = due
        self._writer = writer

    def check(self, done: float, left: float) -> None:
        """DiskShortError unless the disk has room for what is `left`, in the unit that `done` counts what was recorded in."""
        self.due = False
        self._writer.check_disk(int(self._writer.appended_bytes * max(left, 0) / done), "the rest of this recording")
