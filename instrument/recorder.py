"""Recorder: taps on a model, captures into a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import nn

from tensortape.stores import RunWriter, cadence, keys, layout
from tensortape.stores.places.local import Durability
from tensortape.stores.writer import Mode

from . import fitting
from .anatomy import stacks
from .batch import Batch, Given
from .capture import Capture, Pins
from .errors import BatchError, ForwardError
from .modules import is_compiled, refuse_compiled, unwrapped
from .provenance import about
from .rows import Rows, keep
from .session import session_of
from .sites import Selection, Tap, aliases_by_site, resolve
from .steps import Key, Step
from .taps import TapSet
from .targets import Reduction, Target

_SAID = ("attention", "scaled", "sample", "projection")  # of what a capture is about, what the run keeps


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
        mode: `create` refuses a path that exists; `resume` continues a run: it adds examples, and to examples the run has already
            the sites it has not, and seals what a recorder that is gone left open; `overwrite` renames an existing run aside.
        durability: `fsync` or `rename`, as for `RunWriter`.
        memory_budget: bytes that buffered rows, and batches that wait to be written, may take on the host.
        background: write in a thread of its own, while the model goes on; what fails there is raised by the next batch.
        session: what recorders that belong together have in common. The ranks of a process group agree on one by themselves; each
            writes a part of its own, and readers see one run.
        fingerprint: more that a resumed recording must agree with, besides the model's weights; a JSON object.
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
        self._taps = resolve(self._model, fitting.resumed(fitting.items_of(sites), to) if mode == "resume" else sites)
        fitting.refuse_unfitted(self._taps)
        self._pins = Pins(aliases_by_site(self._model), stacks(self._model))
        self._stays = is_compiled(model)
        self._tap_set = TapSet(self._model, self._taps, traceable=self._stays)
        self._expected: set[Key] | None = None
        self._known: dict[str, Any] = {}
        self._batch: Batch | None = None
        self._resumes = mode == "resume"
        said = about(self._model)
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
    ) -> Iterator[Batch]:
        """Record the one forward of the model that runs inside, and its backward: all of its examples in every column, or none.

        Args:
            ids: text or integers, one per example and new to the run, or "content" to use a hash of each example's tokens.
            labels: `example/<name>` to one value per example, `token/<name>` to values [B, T] or one sequence per example.
            tokens: [B, T] input ids, where the call does not show them as `input_ids`.
            mask: [B, T], 1 where a position is a real token, where the call has no 2-D `attention_mask`.
            segments: [B, T] integers, for rows that hold several examples: which one a position belongs to.
            forwards: `generate` for `model.generate(...)`: each forward continues the one before it, and tokens after an example's
                end are left out. A forward that is given a filled KV cache continues without it, too.
            targets: names of everything that is differentiated inside. A resumed run needs them to tell that it has all gradients
                of a site that names no target itself; without them such batches are run again, and what is there is not written.
            ends: the tokens that end an example, where `generate` is given other ones than the model's generation_config names.

        Raises:
            BatchError, LayoutError, ForwardError, SiteNotFoundError, KeyRepeatedError: after the block, and nothing of the batch is
            recorded; whatever the block itself raises passes through.
        """
        if forwards not in ("one", "generate"):
            raise ValueError(f"forwards is 'one' or 'generate', not {forwards!r}")
        given = Given(_checked(ids), labels or {}, tokens, mask, segments, forwards == "generate", ends)
        batch = Batch(given, self._model, self._pins, recorded=not self._has_all(given, set(targets)))
        self._batch = batch
        try:
            with self._taking(batch):
                yield batch
        finally:
            self._batch = None
        if batch.recorded:
            self._write(batch)

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
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        before = self._batch.target
        self._batch.target = Target(name, reduction, torch.as_tensor(factor, dtype=torch.float64) / scale)
        try:
            yield
        finally:
            self._batch.target = before

    def commit(self) -> None:
        """Make everything recorded so far visible and durable."""
        self.writer.commit()

    def close(self) -> None:
        """Commit, remove all hooks, close the run."""
        self._tap_set.remove()
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Recorder of {len(self._taps)} taps on {type(self._model).__name__} to {self.writer!r}>"

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

    def _has_all(self, given: Given, targets: set[str]) -> bool:
        """Whether a resumed run holds every example of a batch already."""
        if not self._resumes or given.examples is None:
            return False
        recorded = [self._recorded_of(tap, targets) for tap in self._taps]
        wanted = set(given.labels).union(*recorded)
        return all(recorded) and not any(self.writer.missing(wanted, id_) for id_ in keys.normalise(given.ids))

    def _recorded_of(self, tap: Tap, targets: set[str]) -> set[str]:
        """The columns a resumed run has of a tap; none where some may be missing."""
        sites = {name: column.site for name, column in self.writer.columns.items() if column.site is not None}
        found = {name: site["port"] for name, site in sites.items() if site.get("tap") == tap.asked}
        if tap.site.is_gradient and tap.site.target is None:
            held = {port.partition("@")[2] for port in found.values()}
            return set(found) if targets and targets <= held else set()
        return set(found)

    def _write(self, batch: Batch) -> None:
        found = batch.whole()
        batch.check(found, self._taps, self._expected)
        self._pins.check_targets(found.captures.values())
        rows = batch.rows(found, self._known)
        if self._expected is None:
            self._learn(found, rows)
        expected = self._expected or set(found.captures)
        found.captures.clear()
        batch.forget()
        for new in self._new_only(rows):
            self.writer.drain(ids=new.ids, columns=new.columns, lengths=new.lengths, nonfinite=new.nonfinite)
        self._expected = expected

    def _new_only(self, rows: Rows) -> list[Rows]:
        """What a resumed run does not have yet, together for examples that miss the same columns."""
        if not self._resumes:
            return [rows]
        missing = [self.writer.missing(rows.columns, id_) for id_ in rows.ids]
        return [
            keep(rows, np.array([other == columns for other in missing]), columns) for columns in dict.fromkeys(missing) if columns
        ]

    def _learn(self, found: Step, rows: Rows) -> None:
        """After the first batch: say what each column is, and remember what an absent one looks like."""
        for taken in found.captures.values():
            options = taken.tap.options
            smaller: dict[str, Any] = {} if taken.is_companion else {"compress": options.compress, "quantize": options.quantize}
            self.writer.describe(taken.column, site=self._described(taken), **smaller)
            if "projection" in taken.about and options.project is not None:
                basis = options.project.basis(str(taken.site))
                self.writer.add_asset(basis.asset, basis.content)
            if options.missing == "absent":
                self._known[taken.column] = rows.columns[taken.column][:0]

    def _described(self, taken: Capture) -> dict[str, Any]:
        site = taken.site
        aliases = self._pins.aliases_of(site, cross=bool(taken.about.get("cross")))
        said: dict[str, Any] = {
            name: taken.about[name] for name in ("attention", "scaled", "sample", "projection") if name in taken.about
        }
        return {
            "path": site.path,
            "port": site.port,
            "call": site.call,
            "aliases": [[alias.stack, alias.name, alias.layer, alias.depth] for alias in aliases],
            "layout": str(taken.layout),
            "reduce": taken.suffix,
            "tap": taken.tap.asked,
            "target": taken.about.get("target"),
            **said,
        }


def _checked(ids: Any) -> Any:
    if ids is None:
        raise BatchError("ids are missing: every example needs one, text or an integer; or ids='content' to hash its tokens")
    if isinstance(ids, str):
        if ids != "content":
            raise BatchError(f"ids must be one per example, or 'content'; got {ids!r}")
        return ids
    found = keys.normalise(ids)
    keys.check_unique(found)
    if not found:
        raise BatchError("a batch needs at least one example; got no ids")
    return found
