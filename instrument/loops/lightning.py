"""RecorderCallback: records while a Trainer of Lightning trains."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BatchError
from ..metrics import Log
from ..probe_set import ProbeSet
from ..recorder import Recorder
from ..schedule import Every
from ..sites import Selection
from ..targets import Reduction

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("RecorderCallback needs lightning: pip install 'tensortape[lightning]'") from error

Of = str | int | Callable[[Any], Any]  # a key or an index of a batch, or a function of it
_log = logging.getLogger(__name__)


@dataclass
class _Step:
    """The training step under way: what the trainer counted when it began, and what was said of it so far."""

    global_step: int
    losses: list[torch.Tensor] = field(default_factory=list)
    lr: float | None = None


class RecorderCallback(Callback):
    """Records chosen sites while a Trainer trains, in the steps that are due; checkpoints of the Trainer carry where it was.

    A step is one that an optimizer takes, however many batches it accumulates: `trainer.global_step` of them are done. With manual
    optimization it is a batch in which any optimizer has stepped, however many did. The step table gets `loss`, the sum of what the
    step differentiated (Lightning divides each loss by `accumulate_grad_batches`), and `lr`, the first group's.

    Args:
        sites, to, every: as for `Recorder`.
        module: path of the module that is recorded, in the LightningModule; left out, the LightningModule itself, where
            `training_step` calls that. It is called once per batch.
        ids: one per example of a batch: a key of it, an index, a function of it, or "content" to hash the tokens. None where
            `training_step` says itself what to record, `with callback.recorder.batch(ids=...)` around each forward.
        labels: `example/<name>` or `token/<name>` to a key, an index or a function of the batch.
        probe: recorded before each step that is due, and after the last step.
        reduction: how the loss joins its examples, `mean` or `sum`; gradients are then those of each example's own loss. Undeclared
            they are what the backward computed.
        options: of `Recorder`. `log` goes to the Trainer's loggers unless it says otherwise. A training that goes on from a
            checkpoint of one with this callback goes on with its run, whatever `mode` says.

    Raises:
        whatever `Recorder` does, from `trainer.fit`.
    """

    def __init__(
        self,
        *,
        sites: Selection,
        to: str | os.PathLike[str],
        every: Every,
        module: str | None = None,
        ids: Of | None = "id",
        labels: Mapping[str, Of] | None = None,
        probe: ProbeSet | None = None,
        reduction: Reduction | None = None,
        **options: Any,
    ) -> None:
        self._given: dict[str, Any] = {"sites": sites, "to": to, "every": every, **options}
        self._module, self._ids, self._labels = module, ids, dict(labels or {})
        self._probe, self._reduction = probe, reduction
        self._recorder: Recorder | None = None
        self._is_open = False
        self._fits = False
        self._state: dict[str, int] | None = None  # of the checkpoint, or the training, that the next one goes on from
        self._step: _Step | None = None
        self._batch: ExitStack | None = None

    @property
    def recorder(self) -> Recorder:
        """The recorder of the training that runs, or ran last."""
        if self._recorder is None:
            raise RuntimeError("there is no recorder yet: trainer.fit(...) makes it when the training begins")
        return self._recorder

    @property
    def state_key(self) -> str:
        """What its state in a checkpoint is found by: the run's name."""
        return self._generate_state_key(to=Path(self._given["to"]).name)

    def state_dict(self) -> dict[str, Any]:
        """How many steps are done; commits, so that the run holds what the checkpoint has behind it."""
        return dict(self.recorder.state_dict() if self._is_open else self._state or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep where the training goes on from: Lightning restores callbacks before it trains."""
        if self._is_open and state_dict["step"] != self.recorder.steps:
            self.recorder.load_state_dict(state_dict)
        if self._fits:
            self._state = dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the training before, unless the same trainer goes on with it."""
        self._fits = stage == "fit"
        if self._fits and not trainer.global_step:
            self._state = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the run; weights and callbacks are restored by now, with every strategy."""
        resumed: dict[str, Any] = {} if self._state is None else {"mode": "resume"}
        done = trainer.global_step if self._state is None or pl_module.automatic_optimization else self._state["step"]
        self._recorder = Recorder(self._recorded(trainer, pl_module), **{"log": _log_of(trainer), **self._given, **resumed})
        self._is_open, self._step = True, None
        if done or resumed:
            self._recorder.load_state_dict({"step": done})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For schedules that name epochs."""
        self.recorder.begin_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take this batch, if its step is due; before the step's first one the probe set."""
        begins = self._step is None
        self._step = self._step or _Step(trainer.global_step)
        if self.recorder.is_due:
            if begins:
                self._record_probe(trainer)
            if self._ids is not None:
                self._enter(trainer, batch, self._ids)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """The step's last backward is done, gradients are not clipped yet; manual optimization may have more of them to come."""
        if self._step is not None and self._step.lr is None:
            self._step.lr = optimizer.param_groups[0].get("lr")
        if pl_module.automatic_optimization:
            self._leave()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Gradients are there until the next batch's backward, so a step that was taken ends here."""
        self._leave()
        step = self._step
        if step is None:
            return
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), torch.Tensor):
            step.losses.append(outputs["loss"])
        if trainer.global_step > step.global_step:
            self._step = None
            self.recorder.step(loss=torch.stack(step.losses).sum() if step.losses else None, lr=step.lr)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A module that skips the rest of an epoch does so between the start of a batch and its forward."""
        self._leave(StopIteration())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The probe set sees the last weights, too."""
        self._record_probe(trainer, always=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model without hooks and the run closed, without the batch that failed; what failed is raised by the trainer."""
        try:
            self._leave(exception)
            self._close()
        except Exception:
            _log.exception("the run could not be closed, after the training had failed with %r", exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the run."""
        self._close()

    def _recorded(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        """The module to record."""
        name, children = type(pl_module).__name__, ", ".join(path for path, _ in pl_module.named_children()) or "none"
        if self._module is not None:
            try:
                return pl_module.get_submodule(self._module)
            except AttributeError:
                raise ValueError(f"module={self._module!r} is no module of {name}, which has {children}") from None
        if type(pl_module).forward is LightningModule.forward:
            raise ValueError(f"{name} has no forward of its own; say which of its modules to record with module=: {children}")
        if trainer.model is not pl_module:
            strategy = type(trainer.strategy).__name__
            raise ValueError(
                f"{strategy} calls training_step by the forward of {name}, so that one cannot be told from the model's; put the "
                f"model into a module of its own, and record that one with module=: {children}"
            )
        return pl_module

    def _record_probe(self, trainer: Trainer, *, always: bool = False) -> None:
        if self._probe is not None:
            with trainer.precision_plugin.val_step_context():
                self._probe.record(self.recorder, always=always)

    def _enter(self, trainer: Trainer, batch: Any, ids: Of) -> None:
        """Record what the model does from here on, until `_leave`."""
        labels = {name: _picked(batch, of) for name, of in self._labels.items()}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = 1 if self._reduction is None else trainer.accumulate_grad_batches
        with ExitStack() as stack:
            stack.enter_context(self.recorder.batch(ids=ids if ids == "content" else _picked(batch, ids), labels=labels))
            stack.enter_context(self.recorder.target("loss", reduction=self._reduction, factor=factor, scaler=scaler))
            self._batch = stack.pop_all()

    def _leave(self, error: BaseException | None = None) -> None:
        """The batch is done; with an error it is not recorded."""
        stack, self._batch = self._batch, None
        if stack is None:
            return
        if error is None:
            stack.close()
        else:
            stack.__exit__(type(error), error, error.__traceback__)

    def _close(self) -> None:
        if self._is_open:
            self._is_open, self._state = False, {"step": self.recorder.steps}
            self.recorder.close()


def _picked(batch: Any, of: Of) -> Any:
    """What a key, an index or a function gives of a batch."""
    if callable(of):
        return of(batch)
    try:
        return batch[of]
    except (KeyError, IndexError, TypeError):
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise BatchError(
            f"the batch has no {of!r}; it is a {type(batch).__name__}{keys}. ids= and labels= name a key, an index or a function"
        ) from None


def _log_of(trainer: Trainer) -> Log | None:
    """Scalars to all loggers of a trainer, under the number that the step has in the run."""
    loggers = trainer.loggers

    def log(scalars: dict[str, float], step: int) -> None:
        for logger in loggers:
            logger.log_metrics(scalars, step)

    return log if loggers else None
