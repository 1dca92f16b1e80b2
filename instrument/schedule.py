"""Which training steps are recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class Schedule:
    """Training steps to record: those that any of these names. Steps count from 1; step n starts from the weights after n - 1.

    Args:
        every: steps 1, N + 1, 2 N + 1 and so on.
        steps: these steps; numbers, or a range.
        epochs: the first step of every Nth epoch; the loop says where epochs begin, with `recorder.begin_epoch()`.
        seconds: the first step, and then the next one after so much time. Ranks go by the clock of rank 0.
        when: a function of the step's number, asked once per step.

    >>> schedule = Schedule(every=100, steps=range(1, 4))
    >>> [step for step in range(1, 250) if schedule.is_due(step)]
    [1, 2, 3, 101, 201]
    """

    every: int | None = None
    steps: Collection[int] = ()
    epochs: int | None = None
    seconds: float | None = None
    when: Callable[[int], bool] | None = None
    _last: float = float("-inf")

    def __post_init__(self) -> None:
        for name in ("every", "epochs", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}= is positive, not {value!r}")
        given = self.steps
        if (
            not isinstance(given, Collection)
            or isinstance(given, str)
            or not all(isinstance(step, int) and step > 0 for step in given)
        ):
            raise ValueError(f"steps= are numbers from 1 on, or a range, not {given!r}")
        if not (self.every or self.epochs or self.seconds or self.when or len(self.steps)):
            raise ValueError("a schedule needs every=, steps=, epochs=, seconds= or when=")

    def is_due(self, step: int, epoch: int | None = None) -> bool:
        """Whether to record a step; `epoch` is the number, from 0, of the one that begins with it."""
        named = (
            self.every is not None and (step - 1) % self.every == 0,
            step in self.steps,
            self.epochs is not None and epoch is not None and epoch % self.epochs == 0,
            self.seconds is not None and self._time_is_up(self.seconds),
            self.when is not None and bool(self.when(step)),
        )
        return any(named)

    def begin(self) -> None:
        """A training begins, or goes on: by the clock its first step is due."""
        self._last = float("-inf")

    def _time_is_up(self, seconds: float) -> bool:
        due = _as_on_rank_0(time.monotonic() - self._last >= seconds)
        if due:
            self._last = time.monotonic()
        return due


Every = int | Schedule | Iterable[int] | Callable[[int], bool]


def schedule(every: Every) -> Schedule:
    """What `every=` stands for: a number of steps, a schedule, the steps themselves, or a function of a step's number."""
    if isinstance(every, Schedule):
        return every
    if isinstance(every, int) and not isinstance(every, bool):
        return Schedule(every=every)
    if callable(every):
        return Schedule(when=every)
    if isinstance(every, bool | str) or not isinstance(every, Iterable):
        raise ValueError(f"every= is a number of steps, steps, a Schedule or a function of a step's number, not {every!r}")
    return Schedule(steps=every if isinstance(every, range) else frozenset(every))


def _as_on_rank_0(due: bool) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return due
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    said = torch.tensor([due], dtype=torch.uint8, device=device)
    dist.broadcast(said, src=0)
    return bool(said.item())
