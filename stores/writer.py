"""RunWriter: any source of tensors into a run."""

from __future__ import annotations

import atexit
import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from . import cadence, chain, codecs, keys, layout, names, runs, termination
from .admission import Admission, Written
from .background import Background, Task
from .cadence import Cadence
from .descriptions import Description
from .dtypes import TEXT, Array
from .errors import BrokenWriterError, DiskShortError, SchemaError
from .held import Held, Holdings, holdings
from .open_parts import OpenParts
from .parts import PartWriter, key_columns
from .places import place_at
from .places.local import Durability
from .ragged import Cells, cells, lengths_of
from .ragged import Lengths as GivenLengths
from .schema import Json, PartDocument
from .step_order import StepOrder

Mode = Literal["create", "resume", "overwrite"]
Arrived = Callable[[], Mapping[str, int]]  # waits for values; rows per column that hold NaN or infinity
_log = logging.getLogger(__name__)
RESERVE = 8 << 20  # bytes that a disk is left with


class RunWriter:
    """Writes a run, one append at a time.

    Args:
        path: the run's folder, by custom `NAME.zarr`, or `s3://bucket/path`.
        mode: `create` refuses a path that exists; `resume` continues the run (or starts it, if there is none), adding examples, or
            columns to examples it has; `overwrite` renames an existing run aside and starts a new one. Nothing is written, or
            renamed, before the first append; but `resume` seals at once what other sessions have left open, so that a writer
            which is not gone after all fails at its next commit.
        durability: `fsync` (a commit survives a power loss) or `rename` (it survives the end of the process).
        memory_budget: bytes that buffers may take. Half of it holds one shard per array; the rest is for what is being appended.
        compress: `lz4` or `zstd` for all columns with rows of at least 64 bytes; by default nothing is compressed.
        about: `model`, `provenance`, `fingerprint` and `policy` of the run document, each a JSON object.
        session: what writers that belong together have in common, such as the ranks of one job: they add to one run side by side,
            and an example that several of them write counts once. One of its own by default.
        rank, world_size: which writer of the session this is; kept in the part's document.
        background: write in a thread of its own. `append` then returns when the queue, half of the budget, has room; an error
            of the thread is raised by the next call.
        commit_seconds: commit at the first append after this time, even where that rewrites much.
        commit_bytes: commit after so many bytes, whatever that costs; None for no such limit.
        storage_options: of an object store, what its environment does not say: see docs/object_storage.md.

    >>> with RunWriter("written.zarr") as writer:
    ...     states = [np.ones((3, 2), np.float16), np.zeros((5, 2), np.float16)]
    ...     writer.append(ids=["a", "b"], columns={"token/state": states, "example/label": [1, 0]})
    ...     writer.commit()
    >>> "a" in writer.committed_ids, len(writer.committed_ids)
    (True, 2)

    Raises:
        RunExistsError, NotARunError, SchemaError (resuming what was recorded from something else). With the first append,
        UnsafePlaceError: an object store that cannot keep two writers apart.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Mode = "create",
        durability: Durability = "fsync",
        memory_budget: int = layout.DEFAULT_BUDGET,
        compress: str | None = None,
        about: Mapping[str, Json] | None = None,
        session: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        background: bool = False,
        commit_seconds: float = cadence.SLOWEST,
        commit_bytes: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        codecs.check(compress)
        self._place = place_at(path, durability=durability, storage_options=storage_options)
        self.path = self._place.root
        self._mode = mode
        self._session, self._rank, self._world_size = session or uuid.uuid4().hex, rank, world_size
        self._run, self._started = runs.document_for(self._place, mode, self._session, dict(about or {}))
        self._from_step: int | None = None
        self._take_over()
        self._assets: dict[str, bytes] = {}
        self._asset_digests: dict[str, str] = {}
        self._descriptions: dict[str, Description] = {}
        self._uncommitted: list[Written] = []
        self._cadence = Cadence(commit_seconds, commit_bytes)
        self._broken: BaseException | None = None
        self._closed = False
        self.appended_bytes = 0
        self._rows: Counter[str] = Counter()
        self._pid = os.getpid()
        self._parts = OpenParts(self._place, self._part_document, memory_budget, self.columns, compress or codecs.NONE)
        self._background = Background(memory_budget // 2) if background else None
        self._watched = termination.watch()
        atexit.register(self.close)  # also what is forgotten is committed

    @property
    def committed_ids(self) -> Held:
        """What the run holds: `x in writer.committed_ids` takes an id or a whole (id, phase, step)."""
        return self._admission.held

    def missing(self, columns: Iterable[str], id_: str | int, phase: str = keys.PHASE, step: int = keys.STEP) -> frozenset[str]:
        """Those of the columns that the run does not have for an example yet, nor will have with the next commit."""
        return frozenset(columns) - self._admission.columns_of(keys.digest(id_, phase, step))

    @property
    def uid(self) -> str:
        """The run's identity; a new one after `overwrite`."""
        return self._run.uid

    @property
    def rows(self) -> Mapping[str, int]:
        """Rows of each table appended so far."""
        return self._rows

    def describe(
        self,
        column: str,
        *,
        axes: tuple[str, ...] | None = None,
        site: Json | None = None,
        attributes: Json | None = None,
        compress: str | None = None,
        quantize: str | None = None,
    ) -> None:
        """Say what a column is, before the first append.

        Args:
            axes: names of its feature axes.
            site, attributes: its recorded site, and what else all readers should know; JSON objects.
            compress: `none`, `lz4` or `zstd`, instead of the writer's `compress`.
            quantize: `int8` keeps a float16, bfloat16 or float32 column as codes with a scale per row; what that costs is measured.
        """
        names.split(column)
        if self._parts.describes(column):
            raise SchemaError(f"column {column!r} can be described only before the first append")
        described = Description(axes, site, attributes or {}, compress, quantize)
        described.check(column, self.columns)
        self._descriptions[column] = described

    def add_asset(self, name: str, content: bytes) -> None:
        """Keep a file beside the tables (a tokenizer's, say); one that is there already stays. Written with the first append."""
        self._check_usable()
        self._assets[names.to_disk(name)] = content

    def append(
        self,
        *,
        ids: Any,
        columns: Mapping[str, Any],
        lengths: GivenLengths | None = None,
        phase: str = keys.PHASE,
        step: int = keys.STEP,
        nonfinite: Mapping[str, int] | None = None,
    ) -> None:
        """Append examples: all of them, in every column, or none. What is given may be changed afterwards.

        Args:
            ids: text or integers, one per example; with phase and step they must be new to the run.
            columns: `<table>/<column>` to values. Tables `token`, `token.<stream>`, `pair`: one array [T_i, *feature] per example,
                or with `lengths` one packed array [sum T_i, *feature]. Table `example`: one value, array row or text per example.
                Every append needs the same columns.
            lengths: rows per example of each table that is given packed.
            nonfinite: rows per column that are known to hold NaN or infinity; shown by `tensortape info`.

        Raises:
            SchemaError, KeyRepeatedError, DiskShortError: nothing was appended. Any other OSError: the writer is unusable, what was
            committed stands.
        """
        copies = self._background is not None
        self._add(dict(columns), ids, lengths or {}, phase, step, partial(dict, nonfinite or {}), copies=copies)

    def append_steps(self, *, steps: Sequence[int], columns: Mapping[str, Any]) -> None:
        """Append rows of the step table. What is given may be changed afterwards.

        Args:
            steps: numbers of training steps, in order, and for each column later than those it has.
            columns: `step/<column>` to one value, array row or text per step. Other steps may have other columns.

        Raises:
            SchemaError, KeyRepeatedError, DiskShortError: nothing was appended. Any other OSError, as for `append`.
        """
        self._check_usable()
        numbers = self._step_order.admit(steps, columns)
        given = {name: cells(name, values, len(numbers), {}).copied() for name, values in columns.items()}
        self._step_order.check_kinds({name: (column.dtype, column.shape) for name, column in given.items()})
        for group in self._step_order.take(numbers, given):
            rows = {**{name: given[name] for name in given if name in group}, "step/step": Cells("int64", (), [numbers], None)}
            self._put(rows, {}, Written(group, []), dict, copies=False)

    def rewind(self, step: int) -> None:
        """Begin anew at a training step, as one does from a checkpoint.

        What other sessions recorded at that step or later no longer counts: readers hide it once this writer
        has committed something. Only before the first append.

        Raises:
            BrokenWriterError: something was appended already.
        """
        self._check_usable()
        if self._rows:
            raise BrokenWriterError("a writer rewinds before its first append; open another one with mode='resume'")
        keys.check_key("", step)
        self._from_step = int(step)
        self._take_over()
        self._parts.know(self.columns)
        if 0 <= self._step_order.last < step - 1:
            _log.warning(
                "the steps %d to %d are missing from %s: they were not committed before the checkpoint was saved",
                self._step_order.last + 1,
                step - 1,
                self.path,
            )

    def drain(
        self,
        *,
        ids: Any,
        columns: dict[str, Any],
        lengths: GivenLengths | None = None,
        phase: str = keys.PHASE,
        step: int = keys.STEP,
        arrived: Arrived = dict,
    ) -> None:
        """As `append`, but takes the values over and empties `columns`, so that their memory goes once it is in the buffers.

        Args:
            arrived: called before values of numbers are looked at, in whatever thread writes; returns `nonfinite`.
        """
        self._add(columns, ids, lengths or {}, phase, step, arrived, copies=False)

    def _add(
        self,
        columns: dict[str, Any],
        ids: Any,
        lengths: GivenLengths,
        phase: str,
        step: int,
        arrived: Arrived,
        *,
        copies: bool,
    ) -> None:
        self._check_usable()
        ids = keys.normalise(ids)
        keys.check_key(phase, step)
        if not ids:
            return
        written = self._admission.admit(ids, phase, step, columns)
        if self._admission.are_pending(written.digests):
            self.commit()  # they get further columns, and what the run has of them is looked up there
        given, found = _cells(ids, columns, lengths, phase, int(step))
        self._admission.check(self._run.uid, ids, written, found)
        columns.clear()
        self._put(given, found, written, arrived, copies=copies)
        self._admission.take(ids, written)

    def _put(
        self,
        given: dict[str, Cells],
        found: Mapping[str, Array],
        written: Written,
        arrived: Arrived,
        *,
        copies: bool,
    ) -> None:
        """Hand rows that were admitted to the part of their columns. `found` are the lengths of ragged tables."""
        size = sum(column.nbytes for column in given.values())
        rows = {names.split(name)[0]: column.rows for name, column in given.items()}
        self.check_disk(size, "what is to be appended")
        if self._background is not None:
            self._background.make_room(size)  # before anything is changed: whoever waits may be interrupted
        if copies:
            given = {name: column.copied() for name, column in given.items()}
        if not self._parts.has(given):
            arrived()  # how columns are coded is decided by the first values
        part = self._parts.prepare(given, found, self._descriptions, self._retire)
        self._do(size, partial(self._append, part, given, written, arrived))
        self.appended_bytes += size
        self._rows.update(rows)

    def check_disk(self, nbytes: int, what: str) -> None:
        """DiskShortError unless the disk has room for so many bytes more, beside what waits in buffers and a small reserve."""
        waiting = 0 if self._background is None else self._background.waiting
        needed, free = nbytes + waiting + self._parts.held_bytes + RESERVE, self._place.free()
        if free is not None and needed > free:
            raise DiskShortError(
                f"{what} needs about {needed / 1e9:,.3f} GB with what is buffered, but the disk of {self.path} has "
                f"{free / 1e9:,.3f} GB free. What was recorded so far is kept: free some space and go on with mode='resume'; or "
                "record to another disk, fewer sites, or in a smaller dtype"
            )

    def commit(self) -> None:
        """Make everything appended so far visible and durable; acknowledged when this returns."""
        self._check_usable()
        self._do(0, self._commit_pending)
        self._wait()

    def close(self) -> None:
        """Commit and close the part; the writer cannot be used afterwards. Closing twice does nothing.

        Whoever interrupts it with Ctrl-C leaves what is still to be written to be written at exit.
        """
        if self._closed or os.getpid() != self._pid:
            return
        with termination.postponed():
            try:
                self._finish()
            except KeyboardInterrupt:
                raise
            except BaseException:
                self._release()
                raise
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self._broken is not None else "open"
        return f"<RunWriter {self.path} {state}: {len(self.committed_ids)} examples committed, {self._admission.pending} pending>"

    def _finish(self) -> None:
        """Commit what is left, unless writing has failed; raise that if nobody knows of it yet."""
        if self._broken is None:
            self._do(0, partial(self._commit, "closed"))
            self._wait()
        elif self._background is not None:
            self._background.check()

    def _take_over(self) -> None:
        """Learn what the run holds, once nobody else adds to it."""
        before = Holdings()
        if self._started:
            chain.seal_others(self._place, self._run.uid, self._session)
            before = holdings(self._place, self._run.uid, self._session, self._from_step)
        self.columns = before.columns
        self._admission = Admission(self._place, before)
        self._step_order = StepOrder(before.steps.get(self._rank, {}), self.columns)
        self.last_step = before.last_step

    def _do(self, size: int, task: Task) -> None:
        """Do a step of writing: now, or in the background."""
        if self._background is None:
            task()
        else:
            self._background.add(size, task)

    def _wait(self) -> None:
        if self._background is not None:
            self._background.wait()

    def _release(self) -> None:
        self._closed = True
        atexit.unregister(self.close)
        if self._background is not None:
            self._background.stop()
        self._unwatch()

    def _break(self, error: BaseException) -> None:
        self._broken = error
        self._parts.forget()
        self._unwatch()
        if self._background is None:
            atexit.unregister(self.close)  # else closing still has to raise what the thread has failed with

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            termination.unwatch()

    def _append(self, part: PartWriter, given: dict[str, Cells], written: Written, arrived: Arrived) -> None:
        size = sum(column.nbytes for column in given.values())
        with termination.postponed():
            with _Breaks(self):
                self._start()
                part.append(given, arrived())
            self._uncommitted.append(written)
            if self._cadence.due(size, self._parts.held_bytes):
                self._commit_pending()

    def _commit_pending(self) -> None:
        if self._uncommitted:
            self._commit("commit")

    def _commit(self, kind: str) -> None:
        if not self._parts.started:
            return
        with termination.postponed():
            with _Breaks(self), self._cadence:
                runs.check_is(self._place, self._run.uid, self.path)
                self._parts.commit(kind, self._asset_digests)
            self._admission.committed.extend(self._uncommitted)
            self._uncommitted = []

    def _retire(self, part: PartWriter) -> None:
        """Close a part before the others."""
        self._do(0, partial(self._close_part, part))

    def _close_part(self, part: PartWriter) -> None:
        with termination.postponed(), _Breaks(self):
            runs.check_is(self._place, self._run.uid, self.path)
            part.commit("closed", assets=self._asset_digests)

    def _start(self) -> None:
        """What has to be on disk before the first part: the run, unless it is there, and files beside its tables."""
        if not self._started:
            self._run = runs.start(self._place, self._mode, self._run)
            self._started = True
        runs.check_is(self._place, self._run.uid, self.path)
        while self._assets:  # more may be added meanwhile
            name, content = self._assets.popitem()
            self._asset_digests[name] = runs.keep_asset(self._place, name, content)

    def _part_document(self) -> PartDocument:
        return PartDocument(
            run=self._run.uid,
            session=self._session,
            rank=self._rank,
            world_size=self._world_size,
            from_step=self._from_step,
            writer=f"tensortape {version('tensortape')}",
            nonce=uuid.uuid4().hex,
        )

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise BrokenWriterError("this writer belongs to the parent process; open one in the process that writes")
        if self._background is not None:
            self._background.check()
        if self._broken is not None:
            raise BrokenWriterError(
                f"this writer failed before ({self._broken}); reopen the run with mode='resume'"
            ) from self._broken
        if self._closed:
            raise BrokenWriterError("this writer is closed")


class _Breaks:
    """Marks the writer unusable when writing fails half-way: its buffers no longer say what is on disk."""

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._writer._break(error)


def _cells(
    ids: keys.Ids, columns: Mapping[str, Any], lengths: GivenLengths, phase: str, step: int
) -> tuple[dict[str, Cells], dict[str, Array]]:
    """Cells of all columns but `start` and `length`, and the rows per example of each ragged table."""
    for name in columns:
        names.refuse_bookkeeping(name)
        if names.split(name)[0] == "step":
            raise SchemaError(
                f"column {name!r}: rows of the step table belong to training steps, not to examples; use append_steps"
            )
    given = {name: cells(name, values, len(ids), lengths) for name, values in columns.items()}
    own = key_columns(
        np.array(ids, object if keys.kind_of(ids) == TEXT else np.int64),
        np.full(len(ids), phase, object),
        np.full(len(ids), step, np.int64),
    )
    return {**given, **own}, lengths_of(given, lengths, len(ids))
