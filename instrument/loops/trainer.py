"""The Trainer of transformers: a callback that records what it trains."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from transformers import TrainerCallback

from tensortape.stores.writer import Mode

from ..errors import UnsupportedModelError
from ..metrics import Log
from ..modules import DATA_PARALLEL
from ..probe_set import ProbeSet
from ..recorder import Recorder
from ..schedule import Every
from ..sites import Selection
from .columns import CONTENT, Columns
from .training import TargetOf, Training

_LAST = "train_runtime"  # the Trainer logs it once, when training is done


class RecorderCallback(TrainerCallback):
    """Records while a Trainer trains.

        recording = RecorderCallback(sites="resid_post", to="run.zarr", every=100, ids="id")
        Trainer(model, args, ..., callbacks=[recording]).train()

    Every micro-batch of a step that is recorded becomes examples keyed (id, "train", step). The step table has, of every step,
    `loss` (what the model returned, over the step's micro-batches as the Trainer joins them) and `lr`; and as `log.<name>` the
    numbers that the Trainer logs. A training that starts from a checkpoint goes on in the run: what that holds of later steps
    counts no more.

    As a context manager around `trainer.train()` it cleans up after a training that fails. Without, that is done by the next
    `train()`, which goes on in the same run, by `close()`, or at the end of the process.

    Args:
        sites, to, every: as for `Recorder`.
        ids: the column of the data set that holds ids, or "content" to hash the tokens of each example.
        labels: `example/<name>` or `token/<name>` to the column of the data set that holds them.
        probe: is recorded just before each step that is recorded, and after the last step.
        target: what `Recorder.target` is to be told of a backward besides its name, as a function of the arguments that the model
            was called with; by default nothing is declared.
        log: a function of (scalars by name, step) for statistics of what was recorded. It is called between two steps, so that it
            may call `trainer.log(scalars)`.
        mode: how a training from the start begins the run; with `resume` it takes the place of what the run holds.
        options: of `Recorder`.

    Raises:
        ValueError: when training begins, if the Trainer removes a column that is named.
        UnsupportedModelError: when training begins, if the Trainer uses nn.DataParallel.
    """

    def __init__(
        self,
        *,
        sites: Selection,
        to: str | os.PathLike[str],
        every: Every,
        ids: str,
        labels: Mapping[str, str] | None = None,
        probe: ProbeSet | None = None,
        target: TargetOf | None = None,
        log: Log | None = None,
        mode: Mode = "create",
        **options: Any,
    ) -> None:
        self._ids, self._labels, self._mode = ids, labels or {}, mode
        self._given: dict[str, Any] = {"target": target, "probe": probe, "log": log}
        self._options = {"sites": sites, "to": to, "every": every, **options}
        self._training: Training | None = None

    @property
    def recorder(self) -> Recorder | None:
        """The recorder of the training under way."""
        return None if self._training is None else self._training.recorder

    def close(self) -> None:
        """Record nothing more: commit, remove all hooks, close the run. What is recorded of a batch under way is dropped."""
        training, self._training = self._training, None
        atexit.unregister(self.close)
        if training is not None:
            training.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        after_failure = self._training is not None
        self.close()
        columns = Columns(self._ids, self._labels, model)
        _refuse(args, columns)
        mode = "resume" if state.global_step or after_failure else self._mode
        goes_on = state.global_step if mode == "resume" else None
        self._training = Training(model, columns, goes_on=goes_on, options={**self._options, "mode": mode}, **self._given)
        atexit.register(self.close)
        if args.torch_compile:
            self._training.recorder.attach()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._training is not None:
            self._training.begin_epoch(state.epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **given: Any) -> None:
        if self._training is not None:
            self._training.between_steps()
            self._training.begin_batch(getattr(optimizer, "scaler", None))

    def on_substep_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **given: Any) -> None:
        if self._training is not None:
            self._training.end_batch()
            self._training.begin_batch(getattr(optimizer, "scaler", None))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._training is not None:
            self._training.end_batch()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **given: Any) -> None:
        """Gradients are zeroed before on_step_end."""
        if self._training is not None:
            self._training.end_step(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._commit(control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A stream of data may end, or a callback stop the epoch, where another micro-batch was expected."""
        if self._training is not None:
            self._training.end_batch(keeps=False)
        self._commit(control.should_save)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """What is logged last comes before the Trainer loads the best checkpoint: the weights are still those of the last step."""
        if self._training is not None and _LAST in logs:
            self._training.between_steps(ends=True)
        elif self._training is not None:
            self._training.note(logs)
        self._commit(control.should_save)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """With save_strategy="best" nobody says before whether there will be a checkpoint."""
        self._commit(control.should_save or args.save_strategy == "best")

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.close()

    def _commit(self, saves: bool) -> None:
        """The run holds every step that a checkpoint has behind it before there is the checkpoint."""
        if self._training is not None and saves:
            self._training.recorder.commit()


def _refuse(args: Any, columns: Columns) -> None:
    if args.n_gpu > 1:
        raise UnsupportedModelError(DATA_PARALLEL)
    removed = sorted(columns.foreign - {"label", "label_ids", *(args.label_names or ())})
    if args.remove_unused_columns and removed:
        raise ValueError(
            f"the Trainer removes the column {removed[0]!r}, because the model's forward does not take it: set "
            f"TrainingArguments(remove_unused_columns=False), or do without the column (ids={CONTENT!r} hashes the tokens instead)"
        )
