"""SIGTERM, as schedulers and launchers send it before they kill: leave the process the ordinary way, so that writers commit.

Python's own default ends the process at once. While a writer is open, and unless the program has a handler of its own, SIGTERM
raises SystemExit instead, like `sys.exit(143)`: `with` blocks end, and what is not closed by then is closed at exit.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_STATUS = 128 + signal.SIGTERM
_open = 0
_writing = 0
_asked = False


def watch() -> bool:
    """Take SIGTERM over, once for all writers; whether it could be."""
    global _open
    if threading.current_thread() is not threading.main_thread():
        return False
    if not _open and signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, _exit):
        return False
    if not _open:
        signal.signal(signal.SIGTERM, _exit)
    _open += 1
    return True


def unwatch() -> None:
    """The reverse of a `watch` that returned True."""
    global _open
    _open -= 1
    if not _open and threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is _exit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def postponed() -> Iterator[None]:
    """Let SIGTERM wait until the block is done: half a write is worth nothing."""
    global _writing, _asked
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    _writing += 1
    try:
        yield
    finally:
        _writing -= 1
        if _asked and not _writing:
            _asked = False
            raise SystemExit(_STATUS)


def _exit(*_: Any) -> None:
    global _asked
    if _writing:
        _asked = True
        return
    raise SystemExit(_STATUS)


def _forget() -> None:
    """In a forked child, whose writers are the parent's, SIGTERM ends the process at once again."""
    global _open, _writing, _asked
    _open = _writing = 0
    _asked = False
    if signal.getsignal(signal.SIGTERM) is _exit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
