"""What may be appended to a run: which examples it has, in which columns, and which are on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from . import keys
from .dtypes import Array
from .errors import KeyRepeatedError, SchemaError
from .held import Held, Holdings, Lengths
from .places import Place


@dataclass(frozen=True)
class Written:
    """Examples of one append, and the columns they were given."""

    columns: frozenset[str]
    digests: list[bytes]
    phase: str = keys.PHASE


class Admission:
    """Checks every append against what the run has and will have with the next commit."""

    def __init__(self, place: Place, before: Holdings) -> None:
        self._place = place
        self._held = before.held
        self._id_kind = before.id_kind
        self._lengths: Lengths | None = None
        self._new_columns: dict[str, frozenset[str]] = {}  # by phase, of every append with an example that the run did not have
        self._pending: dict[bytes, frozenset[str]] = {}  # columns of the examples that are not committed
        self.committed: deque[Written] = deque()  # filled by whoever commits, in whatever thread

    @property
    def held(self) -> Held:
        """What is committed."""
        while self.committed:
            written = self.committed.popleft()
            if written.digests:
                self._held.add(written.columns, written.digests)
            for digest in written.digests:
                self._pending.pop(digest, None)
        return self._held

    @property
    def pending(self) -> int:
        """How many examples are not committed yet."""
        return len(self._pending)

    def columns_of(self, digest: bytes) -> frozenset[str]:
        """The columns an example has, or will have with the next commit."""
        return self.held.columns(digest) | self._pending.get(digest, frozenset())

    def are_pending(self, digests: Iterable[bytes]) -> bool:
        """Whether any of these examples is not committed yet."""
        return not self._pending.keys().isdisjoint(digests)

    def admit(self, ids: keys.Ids, phase: str, step: int, columns: Iterable[str]) -> Written:
        """The examples and columns of an append, none of which the run has; SchemaError or KeyRepeatedError."""
        if self._id_kind not in (None, keys.kind_of(ids)):
            raise SchemaError(f"this run's ids are {self._id_kind}, but got {ids[0]!r}; ids are of one kind throughout a run")
        keys.check_unique(ids)
        digests, wanted = keys.digests(ids, phase, step), frozenset(columns)
        for id_, digest in zip(ids, digests, strict=True):
            known = digest in self._pending or self.held.has(digest)
            if known and (not wanted or self.columns_of(digest) & wanted):
                raise KeyRepeatedError(f"example {id_!r} (phase {phase!r}, step {step}) is already in the run")
        return Written(wanted, digests, phase)

    def check(self, run: str, ids: keys.Ids, written: Written, lengths: Mapping[str, Array]) -> None:
        """Examples that are new need the columns of every new one of their phase; those the run has, as many rows as they have."""
        new, first = self._columns_if_new(written), self._new_columns.get(written.phase)
        if new and first and new != first:
            missing, added = sorted(first - new), sorted(new - first)
            raise SchemaError(f"every append needs the same columns as the first; missing: {missing}, new: {added}")
        known = np.flatnonzero([self.held.has(digest) for digest in written.digests])
        if len(known):
            self._check_lengths(
                run, [ids[number] for number in known], [written.digests[number] for number in known], known, lengths
            )

    def take(self, ids: keys.Ids, written: Written) -> None:
        """Remember an append that was admitted and checked."""
        self._id_kind = keys.kind_of(ids)
        new = self._columns_if_new(written)
        if new:
            self._new_columns.setdefault(written.phase, new)
        self._pending.update(dict.fromkeys(written.digests, written.columns))

    def _check_lengths(
        self, run: str, ids: list[str | int], digests: list[bytes], known: Array, lengths: Mapping[str, Array]
    ) -> None:
        if self._lengths is None or not self._lengths.knows(digests):
            self._lengths = Lengths(self._place, run)
        for table, given in lengths.items():
            recorded = self._lengths.of(table, digests)
            wrong = np.flatnonzero((recorded >= 0) & (recorded != given[known]))
            if len(wrong):
                at = int(wrong[0])
                raise SchemaError(
                    f"example {ids[at]!r} has {recorded[at]} rows in table {table!r} of the run, but is given {given[known][at]}; "
                    "is it cut into the same tokens?"
                )

    def _columns_if_new(self, written: Written) -> frozenset[str] | None:
        """The columns of an append, if any of its examples is new to the run."""
        return None if all(map(self.held.has, written.digests)) else written.columns
