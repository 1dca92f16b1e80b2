"""Recorder: taps on a model, captures into a run."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import nn

from tensortape.stores import RunWriter, cadence, keys, layout
from tensortape.stores.errors import KeyRepeatedError
from tensortape.stores.places.local import Durability
from tensortape.stores.writer import Mode

from . import fitting
from .anatomy import stacks
from .batch import Batch, Given, checked_ids
from .batch_writer import BatchWriter
from .capture import Pins
from .errors import ForwardError
from .loop_order import LoopOrder
from .metrics import Log, Metrics
from .modules import is_compiled, refuse_compiled, unwrapped
from .parameters import ParameterTaps, is_of_parameters, resolve_parameters
from .progress import Progress
from .provenance import about
from .schedule import Every, schedule
from .session import session_of
from .sites import Selection, aliases_by_site, resolve
from .step_rows import StepRows
from .storing import OnError, Storing
from .taps import TapSet
from .targets import Reduction, Target


class Recorder:
    """Records chosen sites of a model into a run, batch by batch, from any loop.

    >>> from tensortape.stores import open_run
    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), num_layers=3).eval()
    >>> states, pads = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    >>> with torch.no_grad(), Recorder(model, sites=["resid_post", "layers.0.linear1:in"], to="recorded.zarr") as recorder:
    ...     with recorder.batch(ids=["a", "b"], labels={"example/topic": [0, 1]}):
    ...         outputs = model(states, src_key_padding_mask=pads)
    >>> [column.name for column in open_run("recorded.zarr").select("resid_post")]
    ['token/layers.0:out', 'token/layers.1:out', 'token/layers.2:out']
    >>> open_run("recorded.zarr")["layers.1:out"][1].shape
    (3, 8)

    The model is called exactly as before and computes exactly the same: hooks are in place only inside `batch`, and only copy.

    Args:
        model: any torch module; DDP, FSDP and torch.compile wrappers are looked through.
        sites: one pattern, `Site` or callable `(path, module) -> ports`, or a list of them; see `tensortape.stores.patterns`.
        to: the run's folder, or `s3://bucket/path`.
        every: while a model trains, the steps to record: every Nth one, a `Schedule`, the steps themselves, or a function of a
            step's number. Hooks are in place in those steps only, and `recorder.step()` says where a step ends. Left out, every
            batch is recorded, outside of any training.
        on_error: what a failing disk or store does: `raise` at the next batch or step, or `drop` what cannot be stored, log that
            once, and let the training go on; `recorder.dropped` counts.
        log: a function of (scalars by name, step) that is given statistics of what was recorded in each recorded step: a tracker's.
        mode: `create` refuses a path that exists; `resume` continues a run: it adds examples, and to examples the run has already
            the sites it has not, and seals what a recorder that is gone left open; `overwrite` renames an existing run aside.
        durability: `fsync` or `rename`, as for `RunWriter`.
        memory_budget: bytes that buffered rows, and batches that wait to be written, may take on the host.
        background: write in a thread of its own, while the model goes on; what fails there is raised by the next batch.
        session: what recorders that belong together have in common. The ranks of a process group agree on one by themselves; each
            writes a part of its own, and readers see one run.
        fingerprint: more that a resumed recording must agree with, besides the model's weights (their shapes, where it trains); a
                JSON object.
        commit_seconds, commit_bytes: as for `RunWriter`.
        recompile: if the model is compiled already, reset torch.compile so that it is compiled anew with the hooks.
        storage_options: as for `RunWriter`.

    Raises:
        SiteNotFoundError, CompiledModelError, UnsupportedModelError; RunExistsError and the other errors of `RunWriter`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sites: Selection,
        to: str | os.PathLike[str],
        every: Every | None = None,
        on_error: OnError = "raise",
        log: Log | None = None,
        mode: Mode = "create",
        durability: Durability = "fsync",
        memory_budget: int = layout.DEFAULT_BUDGET,
        recompile: bool = False,
        background: bool = True,
        session: str | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        commit_seconds: float = cadence.SLOWEST,
        commit_bytes: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        refuse_compiled(model, recompile=recompile)
        self._model = unwrapped(model)
        items = fitting.items_of(sites)
        activations = [item for item in items if not is_of_parameters(item)]
        parameters = resolve_parameters(self._model, [item for item in items if is_of_parameters(item)])
        activations = fitting.resumed(activations, to) if mode == "resume" else activations
        self._taps = resolve(self._model, activations) if activations or not parameters else []
        fitting.refuse_unfitted(self._taps)
        self._progress = Progress(None if every is None else schedule(every))
        if parameters and every is None:
            raise ValueError(f"{parameters[0].column} is a row per training step: give every=, and call recorder.step() after each")
        self._pins = Pins(aliases_by_site(self._model), stacks(self._model))
        self._stays = is_compiled(model)
        self._tap_set = TapSet(self._model, self._taps, traceable=self._stays)
        self._batch: Batch | None = None
        self._scale = 1.0
        self._is_closed = False
        said = about(self._model, trains=self._progress.counts)
        found = session_of(os.fspath(to), session)
        self.writer = RunWriter(
            to,
            mode=mode,
            durability=durability,
            memory_budget=memory_budget,
            about={**said, "fingerprint": {**said["fingerprint"], **(fingerprint or {})}},
            session=found.name,
            rank=found.rank,
            world_size=found.world_size,
            background=background,
            commit_seconds=commit_seconds,
            commit_bytes=commit_bytes,
            storage_options=storage_options,
        )
        self._batches = BatchWriter(self.writer, self._taps, self._pins, resumes=mode == "resume")
        self._storing = Storing(on_error)
        self._metrics = Metrics(log)
        self._steps = StepRows(self.writer)
        atexit.register(self._steps.flush)  # before the writer is closed, which has registered itself already
        self._parameters = ParameterTaps(parameters, lambda: self._scale)
        self._order = LoopOrder(self._model, has_taps=bool(self._taps), kinds={tap.kind for tap in parameters})
        self._resumes, self._is_placed = mode == "resume" and self._progress.counts, False
        self._open_step()

    @property
    def model(self) -> nn.Module:
        """The model, without DDP, FSDP or torch.compile around it."""
        return self._model

    @property
    def dropped(self) -> int:
        """Batches and steps that could not be stored, with `on_error="drop"`."""
        return self._storing.dropped

    @property
    def steps(self) -> int:
        """Training steps that are done."""
        return self._progress.done

    @property
    def is_due(self) -> bool:
        """Whether the training step under way is recorded; a probe set is due when it has just begun."""
        return self._progress.is_due

    @property
    def has_gradients(self) -> bool:
        """Whether any of the sites is a gradient."""
        return any(tap.site.is_gradient for tap in self._taps)

    def attach(self) -> None:
        """Place the hooks now and keep them until `close`, so that a later torch.compile compiles them in."""
        self._stays = True
        if not self._tap_set.attached:
            self._tap_set = TapSet(self._model, self._taps, traceable=True)
            self._tap_set.attach()

    @contextmanager
    def batch(
        self,
        *,
        ids: Any,
        labels: Mapping[str, Any] | None = None,
        tokens: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        forwards: Literal["one", "generate"] = "one",
        ends: int | Sequence[int] | None = None,
        targets: Iterable[str] = (),
        phase: str | None = None,
    ) -> Iterator[Batch]:
        """Record the one forward of the model that runs inside, and its backward: all of its examples in every column, or none.

        In a training step that is not due, nothing is recorded and no hook is in place.

        Args:
            ids: text or integers, one per example and new to the run (in a training, to the step); "content" to use a hash of each
                example's tokens (in a training, a text that comes several times in a step is recorded once); or a function that
                gives the ids when the forward begins.
            labels: `example/<name>` to one value per example, `token/<name>` to values [B, T] or one sequence per example.
            tokens: [B, T] input ids, where the call does not show them as `input_ids`.
            mask: [B, T], 1 where a position is a real token, where the call has no 2-D `attention_mask`.
            segments: [B, T] integers, for rows that hold several examples: which one a position belongs to.
            forwards: `generate` for `model.generate(...)`: each forward continues the one before it, and tokens after an example's
                end are left out. A forward that is given a filled KV cache continues without it, too.
            targets: names of everything that is differentiated inside. A resumed run needs them to tell that it has all gradients
                of a site that names no target itself; without them such batches are run again, and what is there is not written.
            ends: the tokens that end an example, where `generate` is given other ones than the model's generation_config names.
            phase: part of the examples' keys, for loops that give one model several batches of the same examples in a step (a GAN's
                two losses); `train` in a training, else `record`.

        Raises:
            BatchError, LayoutError, ForwardError, SiteNotFoundError, KeyRepeatedError: after the block, and nothing of the batch is
            recorded; whatever the block itself raises passes through.
        """
        if forwards not in ("one", "generate"):
            raise ValueError(f"forwards is 'one' or 'generate', not {forwards!r}")
        moment = self._progress.moment(phase)
        if moment.step != keys.STEP and not moment.evaluates:
            self._check_place()
            self._order.batch_begins(self._progress.done)
        given = Given(ids, labels or {}, tokens, mask, segments, forwards == "generate", ends)
        batch = Batch(given, self._model, self._pins, moment=moment, recorded=False)
        if moment.is_due and not self._storing.has_ended:
            batch.given = replace(given, ids=checked_ids(ids))
            batch.recorded = not self._batches.has_all(batch, set(targets))
        self._batch = batch
        try:
            with self._taking(batch):
                yield batch
        except BaseException:
            self._parameters.forget()
            raise
        finally:
            self._batch = None
        if batch.recorded:
            with self._storing:
                self._batches.write(batch, self._metrics)

    @contextmanager
    def target(self, name: str, *, reduction: Reduction | None = None, factor: Any = 1.0, scaler: Any = None) -> Iterator[None]:
        """Say what a backward inside differentiates; without it a backward is that of target `loss`, reduction undeclared.

        Args:
            name: gradients go to columns `...@<name>`.
            reduction: how the scalar joins its examples: `sum`, or `mean`, which the gradients are multiplied with the number of
                examples for. Analyses of single examples refuse gradients of an undeclared reduction.
            factor: what each example's gradient is multiplied with besides, one number or one per example: for a mean over all
                tokens of the batch, their number divided by the example's own.
            scaler: a GradScaler whose present scale is taken out of the gradients.
        """
        if self._batch is None:
            raise ForwardError("recorder.target(...) brackets a backward inside `with recorder.batch(...)`")
        scale = 1.0 if scaler is None or not self._batch.moment.is_due else float(scaler.get_scale())  # asking makes a GPU wait
        before, self._scale = (self._batch.target, self._scale), scale
        self._batch.target = Target(name, reduction, torch.as_tensor(factor, dtype=torch.float64) / scale)
        try:
            yield
        finally:
            self._batch.target, self._scale = before

    def step(self, *, loss: Any = None, lr: float | None = None, **values: Any) -> None:
        """A training step is done: its row of the step table, and parameters if it was recorded.

        Call it after `optimizer.step()` and before `zero_grad()`, once per step: several batches before it are one step with
        accumulated gradients.

        Args:
            loss, lr: one number each.
            values: what else to say of the step, recorded or not: numbers, text, or tensors, each of one shape at all steps.
        """
        if not self._progress.counts:
            raise ValueError("recorder.step() counts training steps: give the Recorder every=, such as every=1 for all of them")
        self._check_place()
        given = {"loss": _number("loss", loss), "lr": _number("lr", lr), **values}
        row = {name: value for name, value in given.items() if value is not None}
        number = self._progress.done + 1
        self._order.step_ends(number, is_due=self._progress.is_due)
        row.update(self._parameters.end())
        self._progress.go_to(number)
        if row and not self._storing.has_ended:
            with self._storing:
                self._steps.add(number, row)
        self._metrics.send(number, self.writer)
        self._open_step()

    def note(self, **values: Any) -> None:
        """Say more of the step that is done than was known then, such as the result of an evaluation. Each value once a step."""
        if values and not self._storing.has_ended:
            with self._storing:
                self._steps.add(self._progress.done, values)

    def begin_epoch(self, epoch: int) -> None:
        """The step under way is the first of an epoch, of this number from 0; for schedules that name epochs."""
        self._progress.begin_epoch(epoch)
        self._open_step()

    @contextmanager
    def evaluating(self, phase: str) -> Iterator[None]:
        """Record every batch inside with the weights as they are now: of this phase, at the step that is done. No gradients."""
        if self._progress.counts:
            self._order.evaluation_begins(self._progress.done)
        with self._progress.evaluating(phase):
            yield
        self._metrics.send(max(self._progress.done, 0), self.writer)

    def state_dict(self) -> dict[str, int]:
        """Where the training is, for a checkpoint; commits, so that the run holds every step that the checkpoint has behind it."""
        if not self._is_closed:
            self.commit()
        return {"step": self._progress.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint: what the run holds of later steps counts no more, once this recorder has committed something.

        Args:
            state: what `state_dict` gave; `{"step": 0}` begins anew.

        Raises:
            BrokenWriterError: something was recorded already; load the checkpoint before the first step.
        """
        done = state.get("step") if isinstance(state, Mapping) else None
        if not isinstance(done, int) or done < 0 or not self._progress.counts:
            raise ValueError(
                f"load_state_dict takes what state_dict gave, such as {{'step': 100}}, and a Recorder with every=; got {state!r}"
            )
        self._parameters.forget()
        self.writer.rewind(done + 1)
        self._progress.resume(done)
        self._order.begin_anew()
        self._is_placed = True
        self._open_step()

    def commit(self) -> None:
        """Make everything recorded so far visible and durable."""
        if not self._storing.has_ended:
            with self._storing:
                self._steps.flush()
                self.writer.commit()

    def close(self) -> None:
        """Commit, remove all hooks, close the run."""
        self._tap_set.remove()
        self._parameters.forget()
        atexit.unregister(self._steps.flush)
        try:
            with self._storing:
                if not (self._storing.has_ended or self._is_closed):
                    self._steps.flush()
        finally:
            with self._storing:
                self.writer.close()
            if not self._is_closed:
                self._storing.say()
            self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Recorder of {len(self._taps)} taps on {type(self._model).__name__} to {self.writer!r}>"

    def _check_place(self) -> None:
        """KeyRepeatedError where a resumed run holds what is about to be recorded, of another trajectory."""
        if self._resumes and not self._is_placed:
            if self.writer.last_step > self._progress.done:
                raise KeyRepeatedError(
                    f"the run holds steps up to {self.writer.last_step}, and this training begins with step "
                    f"{self._progress.done + 1}: call recorder.load_state_dict(...) with what the checkpoint has of the recorder "
                    "({'step': 0} to begin anew) before the first batch, or record with mode='overwrite'"
                )
            self._is_placed = True

    def _open_step(self) -> None:
        """A step begins; what is to be known of its parameters is listened to from now on."""
        if self._progress.counts and self._progress.is_due:
            self._parameters.begin()

    @contextmanager
    def _taking(self, batch: Batch) -> Iterator[None]:
        """Let the taps send to a batch, if it is to be recorded."""
        if not batch.recorded:
            yield
            return
        with self._hooks(), self._tap_set.sending_to(batch):
            yield

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        if self._stays:
            if not self._tap_set.attached:
                self._tap_set.attach()
            yield
            return
        with self._tap_set:
            yield


def _number(name: str, value: Any) -> Any:
    """A loss or a learning rate, in float64 however the loop came by it; ValueError for more than one number."""
    if getattr(value, "ndim", 0):
        if value.numel() != 1 if isinstance(value, torch.Tensor) else np.size(value) != 1:
            raise ValueError(f"recorder.step({name}=...) is one number, but has the shape {list(value.shape)}; give its mean, say")
        return value.reshape(())
    return float(value) if isinstance(value, int) else value
