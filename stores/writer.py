"""RunWriter: any source of tensors into a run."""

from __future__ import annotations

import atexit
import json
import os
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from . import keys, layout, names, runs
from .cadence import Cadence
from .dtypes import TEXT
from .errors import BrokenWriterError, DiskShortError, KeyRepeatedError, SchemaError
from .keys import KeySet
from .parts import Description, PartWriter, key_columns, start_columns
from .places.local import Durability, LocalPlace
from .ragged import Cells, Lengths, cells, lengths_of
from .schema import Json, PartDocument

Mode = Literal["create", "resume", "overwrite"]
RESERVE = 8 << 20  # bytes that a disk is left with


class RunWriter:
    """Writes a run, one append at a time.

    Args:
        path: the run's folder, by custom `NAME.zarr`.
        mode: `create` refuses a path that exists; `resume` continues the run (or starts it, if there is none) and skips nothing by
            itself: ask `committed_ids`; `overwrite` renames an existing run aside and starts a new one. Nothing is written, or
            renamed, before the first append.
        durability: `fsync` (a commit survives a power loss) or `rename` (it survives the end of the process).
        memory_budget: bytes that buffers may take. Half of it holds one shard per array; the rest is for what is being appended.
        about: `model`, `provenance`, `fingerprint` and `policy` of the run document, each a JSON object.

    >>> with RunWriter("written.zarr") as writer:
    ...     states = [np.ones((3, 2), np.float16), np.zeros((5, 2), np.float16)]
    ...     writer.append(ids=["a", "b"], columns={"token/state": states, "example/label": [1, 0]})
    ...     writer.commit()
    >>> "a" in writer.committed_ids, len(writer.committed_ids)
    (True, 2)

    Raises:
        RunExistsError, NotARunError, SchemaError (resuming what was recorded from something else).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Mode = "create",
        durability: Durability = "fsync",
        memory_budget: int = layout.DEFAULT_BUDGET,
        about: Mapping[str, Json] | None = None,
    ) -> None:
        self.path = Path(path).absolute()  # the working directory may change while the writer lives
        self._budget = memory_budget
        self._place = LocalPlace(self.path, durability)
        self._mode = mode
        self._run, self._started = runs.document_for(self._place, mode, dict(about or {}))
        self._assets: dict[str, bytes] = {}
        self._session = uuid.uuid4().hex
        self._descriptions: dict[str, Description] = {}
        self._nonfinite: dict[str, int] = {}
        self._pending: set[bytes] = set()
        self._cadence = Cadence()
        self._broken: BaseException | None = None
        self._closed = False
        self.appended_bytes = 0
        self._pid = os.getpid()
        held = runs.holdings(self._place, self._run.uid) if self._started else runs.Holdings(KeySet(), None, {})
        self.committed_ids, self._id_kind = held.keys, held.id_kind
        self._part = PartWriter(self._place, self._part_document(), memory_budget, held.kinds)
        atexit.register(self.close)  # also what is forgotten is committed

    @property
    def uid(self) -> str:
        """The run's identity; a new one after `overwrite`."""
        return self._run.uid

    @property
    def rows(self) -> Mapping[str, int]:
        """Rows of each table appended so far."""
        return self._part.rows

    def describe(
        self, column: str, *, axes: tuple[str, ...] | None = None, site: Json | None = None, attributes: Json | None = None
    ) -> None:
        """Say what a column is, before the first append: names of its feature axes, its site, attributes for all readers."""
        names.split(column)
        if self._part.name:
            raise SchemaError(f"column {column!r} can be described only before the first append")
        for said in (site, attributes):
            _check_json(column, said)
        self._descriptions[column] = Description(axes, site, attributes or {})

    def add_asset(self, name: str, content: bytes) -> None:
        """Keep a file beside the tables (a tokenizer's, say); one that is there already stays. Written with the first append."""
        self._check_usable()
        self._assets[names.to_disk(name)] = content

    def append(
        self,
        *,
        ids: Any,
        columns: Mapping[str, Any],
        lengths: Lengths | None = None,
        phase: str = keys.PHASE,
        step: int = keys.STEP,
        nonfinite: Mapping[str, int] | None = None,
    ) -> None:
        """Append examples: all of them, in every column, or none.

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
        self.drain(ids=ids, columns=dict(columns), lengths=lengths, phase=phase, step=step, nonfinite=nonfinite)

    def drain(
        self,
        *,
        ids: Any,
        columns: dict[str, Any],
        lengths: Lengths | None = None,
        phase: str = keys.PHASE,
        step: int = keys.STEP,
        nonfinite: Mapping[str, int] | None = None,
    ) -> None:
        """As `append`, but empties `columns`, so that the memory of each column may go as soon as it is in the buffers."""
        self._check_usable()
        ids = keys.normalise(ids)
        keys.check_key(phase, step)
        if not ids:
            return
        digests = self._check_ids(ids, phase, step)
        given = self._cells(ids, columns, lengths or {}, phase, int(step))
        size = sum(column.nbytes for column in given.values())
        self.check_disk(size, "what is to be appended")
        self._part.prepare(given, self._descriptions)
        columns.clear()
        with _Breaks(self):
            self._start()
            self._part.append(given)
        self.appended_bytes += size
        self._pending.update(digests)
        self._id_kind = keys.kind_of(ids)
        for name, count in (nonfinite or {}).items():
            self._nonfinite[name] = self._nonfinite.get(name, 0) + int(count)
        if self._cadence.due(size, self._part.held_bytes):
            self.commit()

    def check_disk(self, nbytes: int, what: str) -> None:
        """DiskShortError unless the disk has room for so many bytes more, beside what waits in buffers and a small reserve."""
        needed, free = nbytes + self._part.held_bytes + RESERVE, self._place.free()
        if needed > free:
            raise DiskShortError(
                f"{what} needs about {needed / 1e9:,.3f} GB with what is buffered, but the disk of {self.path} has "
                f"{free / 1e9:,.3f} GB free. What was recorded so far is kept: free some space and go on with mode='resume'; or "
                "record to another disk, fewer sites, or in a smaller dtype"
            )

    def commit(self) -> None:
        """Make everything appended so far visible and durable; acknowledged when this returns."""
        self._check_usable()
        if self._pending:
            self._commit("commit")

    def close(self) -> None:
        """Commit and close the part; the writer cannot be used afterwards. Closing twice does nothing."""
        if self._closed or self._broken is not None or os.getpid() != self._pid:
            return
        if self._part.name:
            self._commit("closed")
        self._closed = True
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self._broken is not None else "open"
        return f"<RunWriter {self.path} {state}: {len(self.committed_ids)} examples committed, {len(self._pending)} pending>"

    def _start(self) -> None:
        """What has to be on disk before the first part: the run, unless it is there, and files beside its tables."""
        if not self._started:
            runs.start(self._place, self._mode, self._run)
            self._started = True
        runs.check_is(self._place, self._run.uid, self.path)
        there = self._place.names("assets") if self._assets else []
        for name, content in self._assets.items():
            if name not in there:
                self._place.create(f"assets/{name}", [content])
        self._assets = {}

    def _part_document(self) -> PartDocument:
        return PartDocument(run=self._run.uid, session=self._session, writer=f"tensortape {version('tensortape')}")

    def _commit(self, kind: str) -> None:
        with _Breaks(self), self._cadence:
            runs.check_is(self._place, self._run.uid, self.path)
            self._part.commit(kind, nonfinite=self._nonfinite)
        self.committed_ids.add(self._pending)
        self._pending = set()

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise BrokenWriterError("this writer belongs to the parent process; open one in the process that writes")
        if self._broken is not None:
            raise BrokenWriterError(
                f"this writer failed before ({self._broken}); reopen the run with mode='resume'"
            ) from self._broken
        if self._closed:
            raise BrokenWriterError("this writer is closed")

    def _check_ids(self, ids: keys.Ids, phase: str, step: int) -> list[bytes]:
        if self._id_kind not in (None, keys.kind_of(ids)):
            raise SchemaError(f"this run's ids are {self._id_kind}, but got {ids[0]!r}; ids are of one kind throughout a run")
        keys.check_unique(ids)
        digests = keys.digests(ids, phase, step)
        for id_, digest in zip(ids, digests, strict=True):
            if digest in self._pending or self.committed_ids.has(digest):
                raise KeyRepeatedError(f"example {id_!r} (phase {phase!r}, step {step}) is already in the run")
        return digests

    def _cells(self, ids: keys.Ids, columns: Mapping[str, Any], lengths: Lengths, phase: str, step: int) -> dict[str, Cells]:
        for name in columns:
            names.refuse_bookkeeping(name)
            if names.split(name)[0] == "step":
                raise SchemaError(f"column {name!r}: rows of the step table belong to training steps, not to examples")
        given = {name: cells(name, values, len(ids), lengths) for name, values in columns.items()}
        found = lengths_of(given, lengths, len(ids))
        return {
            **given,
            **start_columns(found, self._part.rows),
            **key_columns(
                np.array(ids, object if keys.kind_of(ids) == TEXT else np.int64),
                np.full(len(ids), phase, object),
                np.full(len(ids), step, np.int64),
            ),
        }


class _Breaks:
    """Marks the writer unusable when writing fails half-way: its buffers no longer say what is on disk."""

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._writer._broken = error


def _check_json(column: str, said: Json | None) -> None:
    try:
        json.dumps(said, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SchemaError(f"what is said of column {column!r} is not JSON: {error}") from None
