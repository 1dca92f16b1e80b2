"""One training by the Trainer, recorded: what its callback does between the events."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..batch import Batch
from ..metrics import PREFIX, Log
from ..probe_set import ProbeSet
from ..recorder import Recorder
from ..taps import on_call, on_output
from .columns import Columns

TargetOf = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Training:
    """A recorder, and the micro-batch that is under way.

    The Trainer never shows its batches. Two light hooks on the model, in place at all steps, see what it is called with and the
    loss it returns.

    Args:
        model: what is trained.
        columns: ids and labels among the model's arguments.
        target, probe, log: see `RecorderCallback`.
        goes_on: from this step of what the run holds; None for a training that begins the run.
        options: of `Recorder`.
    """

    def __init__(
        self,
        model: nn.Module,
        columns: Columns,
        *,
        target: TargetOf | None,
        probe: ProbeSet | None,
        log: Log | None,
        goes_on: int | None,
        options: Mapping[str, Any],
    ) -> None:
        self._columns, self._target, self._probe, self._log = columns, target, probe, log
        self._said: list[tuple[dict[str, float], int]] = []  # by the recorder, for `log`
        self._begun, self._probed = goes_on or 0, -1
        self._noted: dict[str, int] = {}
        self._batch: Batch | None = None
        self._ids: Any = None
        self._scaler: Any = None
        self._losses: list[torch.Tensor] = []
        self._adds_up = False  # a micro-batch's loss is its part of a mean over the step, which the Trainer only adds
        self._under_way = ExitStack()
        with ExitStack() as opened:
            say = None if log is None else lambda scalars, step: self._said.append((scalars, step))
            self.recorder = opened.enter_context(Recorder(model, log=say, **options))
            if goes_on is not None:
                self.recorder.load_state_dict({"step": goes_on})
            opened.callback(on_call(self.recorder.model, self._called).remove)
            opened.callback(on_output(self.recorder.model, self._returned).remove)
            opened.callback(self.end_batch, keeps=False)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Drop the micro-batch under way, remove all hooks, close the run."""
        self._opened.close()

    def begin_epoch(self, epoch: float) -> None:
        """An epoch begins when so many are done; in the middle of one, a training goes on from a checkpoint."""
        if self.recorder.steps > self._begun or not epoch % 1:
            self.recorder.begin_epoch(math.ceil(epoch))

    def between_steps(self, *, ends: bool = False) -> None:
        """Record the probe set where it is due, and say what was recorded."""
        done = self.recorder.steps
        if self._probe is not None and self._probed < done and self._probe.record(self.recorder, always=ends):
            self._probed = done
        while self._said and self._log is not None:
            self._log(*self._said.pop(0))

    def begin_batch(self, scaler: Any) -> None:
        """A micro-batch begins, of which a GradScaler or None scales the loss."""
        self.end_batch(keeps=False)
        self._scaler = scaler
        self._batch = self._under_way.enter_context(self.recorder.batch(ids=lambda: self._ids))

    def end_batch(self, *, keeps: bool = True) -> None:
        """The backward of the micro-batch under way, if any, is done; what was recorded of it is kept or dropped."""
        if self._batch is not None:
            self._batch.recorded &= keeps
            self._batch = None
            self._under_way.close()

    def end_step(self, lr: Any) -> None:
        """The optimizer has stepped; gradients are still there."""
        losses, self._losses = self._losses, []
        parts = losses if self._adds_up else [loss / len(losses) for loss in losses]
        self.recorder.step(loss=sum(parts) if parts else None, lr=lr)

    def note(self, logs: Mapping[str, Any]) -> None:
        """Numbers that were logged of the step that is done. Of several under one name the first counts."""
        done = self.recorder.steps
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float) and _is_of_step(name)}
        new = [name for name in numbers if self._noted.get(name, self._begun) < done]
        self._noted.update(dict.fromkeys(new, done))
        self.recorder.note(**{f"log.{name}": numbers[name] for name in new})

    def _called(self, call: dict[str, Any]) -> None:
        given = self._columns.taken_out_of(call)
        self._adds_up = "num_items_in_batch" in given
        if self._batch is None or not self._batch.recorded:
            return
        self._ids = self._columns.ids_of(given)
        for name, values in self._columns.labels_of(given).items():
            self._batch.label(name, values)
        declared = {} if self._target is None else self._target(given)
        self._under_way.enter_context(self.recorder.target("loss", scaler=self._scaler, **declared))

    def _returned(self, output: Any) -> None:
        """The loss is found as the Trainer finds it."""
        loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
        if self._batch is not None and isinstance(loss, torch.Tensor) and not loss.ndim:
            self._losses.append(loss.detach())


def _is_of_step(name: str) -> bool:
    """Whether what is logged under a name is of the training, and not our own or of the machine's speed."""
    return not name.startswith(PREFIX) and not name.endswith(("epoch", "_runtime", "_per_second"))
