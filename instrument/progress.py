"""Where a training is: which steps are done, and what the present one is to a schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tensortape.stores import keys

from .schedule import Schedule

TRAINING = "train"


@dataclass(frozen=True)
class Moment:
    """What the examples of a batch are keyed with besides their ids, and whether they are recorded.

    `evaluates` says that nothing is differentiated, so that there are no gradients to record.
    """

    phase: str = keys.PHASE
    step: int = keys.STEP
    is_due: bool = True
    evaluates: bool = False


class Progress:
    """Steps that are done, and the one that is under way. Without a schedule there are none: everything is recorded."""

    def __init__(self, schedule: Schedule | None) -> None:
        self._schedule = schedule
        self._due: bool | None = None  # of the step under way, once asked
        self._epoch: int | None = None  # that begins with the step under way
        self._evaluates: str | None = None
        self.done = 0

    @property
    def counts(self) -> bool:
        """Whether this is a training at all."""
        return self._schedule is not None

    @property
    def is_due(self) -> bool:
        """Whether the step under way is recorded; the schedule is asked once."""
        if self._due is None:
            self._due = self._schedule is None or self._schedule.is_due(self.done + 1, self._epoch)
        return self._due

    def begin_epoch(self, epoch: int) -> None:
        """The step under way is the first of an epoch."""
        self._epoch = epoch
        self._due = self._due or None  # a step that is due by the clock already is not asked for again

    def resume(self, done: int) -> None:
        """The training goes on with so many steps done."""
        if self._schedule is not None:
            self._schedule.begin()
        self.go_to(done)

    def go_to(self, done: int) -> None:
        """So many steps are done."""
        self.done, self._due, self._epoch = done, None, None

    @contextmanager
    def evaluating(self, phase: str) -> Iterator[None]:
        """Batches inside are of the weights as they are now, and of this phase."""
        before, self._evaluates = self._evaluates, phase
        try:
            yield
        finally:
            self._evaluates = before

    def moment(self, phase: str | None) -> Moment:
        """What a batch that begins now is keyed with."""
        if self._evaluates is not None:
            return Moment(self._evaluates, self.done if self.counts else keys.STEP, evaluates=True)
        if not self.counts:
            return Moment(phase or keys.PHASE)
        return Moment(phase or TRAINING, self.done + 1, self.is_due)
