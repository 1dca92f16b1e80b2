"""The one thread that writes, behind a queue bounded in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from .errors import BrokenWriterError

Task = Callable[[], None]


class Background:
    """Does tasks one after another in a thread of its own. Whoever adds more than the limit allows waits until there is room.

    After a task has failed no other is begun. The next call raises its error, once; what is added or waited for after that is
    refused.

    >>> done = []
    >>> background = Background(limit=1000)
    >>> for number in range(3):
    ...     background.add(400, lambda number=number: done.append(number))
    >>> background.wait()
    >>> done
    [0, 1, 2]
    >>> background.stop()
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: deque[tuple[int, Task]] = deque()
        self._held = 0  # bytes of all tasks that are not done
        self._busy = False
        self._error: BaseException | None = None
        self._raised = False
        self._stopped = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="tensortape-writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Bytes that tasks hold which are not done yet."""
        return self._held

    def make_room(self, size: int) -> None:
        """Wait while the tasks there are hold too much for one more of `size` bytes."""
        with self._change:
            self._change.wait_for(lambda: self._idle or self._held + size <= self._limit)
            self._raise()

    def add(self, size: int, task: Task) -> None:
        """Do a task that holds `size` bytes, later; makes room first."""
        self.make_room(size)
        with self._change:
            self._held += size
            self._change.notify_all()
            self._tasks.append((size, task))  # in one step and last: an interrupt leaves either all of it or nothing

    def wait(self) -> None:
        """Return when everything is done."""
        with self._change:
            self._change.wait_for(lambda: self._idle)
            self._raise()

    def check(self) -> None:
        """Raise what a task has failed with, unless that has been raised."""
        with self._change:
            if not self._raised:
                self._raise()

    def stop(self) -> None:
        """End the thread after the task it is at, if any."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._thread.join()

    @property
    def _idle(self) -> bool:
        """Whether nothing is being done or will be."""
        return not self._tasks and not self._busy

    def _raise(self) -> None:
        if self._error is None:
            return
        if self._raised:
            raise BrokenWriterError(f"nothing is written any more, since that failed before ({self._error})") from self._error
        self._raised = True
        raise self._error

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._tasks or self._stopped)
                if self._stopped:
                    return
                self._busy = True
                size, task = self._tasks.popleft()
            error = _done(task)
            del task  # and with it what it holds
            with self._change:
                self._busy = False
                if error is not None:
                    self._error, self._stopped = error, True
                    self._tasks.clear()
                self._held = self._held - size if self._tasks else 0
                self._change.notify_all()


def _done(task: Task) -> BaseException | None:
    try:
        task()
    except BaseException as error:
        return error
    return None
