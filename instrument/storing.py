"""What happens when recording fails to store: the training is told, or goes on without."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Literal

from tensortape.stores.errors import BrokenWriterError, LostPartError

OnError = Literal["raise", "drop"]
_FAILURES = (OSError, BrokenWriterError, LostPartError)
_log = logging.getLogger(__name__)


class Storing:
    """Wraps whatever stores. With `drop` its failures are logged, once, and counted; mistakes of the caller are raised in any case.

    A disk that is short of room may have some later; a writer that has failed half-way stores nothing more.
    """

    def __init__(self, on_error: OnError) -> None:
        if on_error not in ("raise", "drop"):
            raise ValueError(f"on_error is 'raise' or 'drop', not {on_error!r}")
        self._drops = on_error == "drop"
        self.dropped = 0
        self.has_ended = False

    def say(self) -> None:
        """How much was lost, if anything."""
        if self.dropped:
            _log.error("%d batches and steps could not be stored and are not in the run", self.dropped)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not self._drops or not isinstance(error, _FAILURES):
            return False
        if not self.dropped:
            _log.error("recording cannot store, and the training goes on without it (on_error='drop'): %s", error)
        self.dropped += 1
        self.has_ended = self.has_ended or isinstance(error, BrokenWriterError | LostPartError)
        return True
