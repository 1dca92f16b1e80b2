"""The one thread that writes, behind a queue bounded in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Task = Callable[[], None]


class Background:
    """Does tasks one after another in a thread of its own. Whoever adds more than the limit allows waits until there is room.

    After a task has failed no other is begun, and the next call raises its error, once.

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
        self._failed = False
        self._error: BaseException | None = None
        self._stopped = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="tensortape-writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Bytes that tasks hold which are not done yet."""
        return self._held

    def add(self, size: int, task: Task) -> None:
        """Do a task that holds `size` bytes, later; waits first while the tasks before it hold too much."""
        with self._change:
            self._change.wait_for(lambda: self._failed or not self._held or self._held + size <= self._limit)
            self._raise()
            self._tasks.append((size, task))
            self._held += max(size, 1)
            self._change.notify_all()

    def wait(self) -> None:
        """Return when everything is done."""
        with self._change:
            self._change.wait_for(lambda: self._failed or not self._held)
            self._raise()

    def check(self) -> None:
        """Raise what a task has failed with, unless that has been raised."""
        with self._change:
            self._raise()

    def stop(self) -> None:
        """End the thread after the task it is at, if any."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._tasks or self._stopped)
                if self._stopped:
                    return
                size, task = self._tasks.popleft()
            error = _done(task)
            del task  # and with it what it holds
            with self._change:
                self._held -= max(size, 1)
                if error is not None:
                    self._error, self._failed = error, True
                    self._tasks.clear()
                    self._stopped = True
                self._change.notify_all()


def _done(task: Task) -> BaseException | None:
    try:
        task()
    except BaseException as error:
        return error
    return None
