"""The parts that one writer has open: one per set of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from . import codecs, names
from .descriptions import Description
from .dtypes import Array
from .errors import BudgetError
from .parts import PartWriter, start_columns
from .places import Place
from .ragged import Cells
from .schema import ColumnSchema, PartDocument


class OpenParts:
    """Parts by their columns. Usually there is one; topping a run up takes another for examples that have some columns already.

    Args:
        document: makes a part's document, once the part is claimed.
        budget: bytes that buffers of all parts, and one append, may take; as for `RunWriter`.
        known: columns the run has from before.
        compress: for columns of which nothing else is said.
    """

    def __init__(
        self,
        place: Place,
        document: Callable[[], PartDocument],
        budget: int,
        known: Mapping[str, ColumnSchema],
        compress: str = codecs.NONE,
    ) -> None:
        self._place, self._document, self._compress = place, document, compress
        self._budget = budget
        self._known = known
        self._parts: dict[frozenset[str], PartWriter] = {}

    @property
    def started(self) -> bool:
        """Whether anything was appended."""
        return any(part.state is not None for part in self._open())

    @property
    def held_bytes(self) -> int:
        """Bytes that the next commit writes as tails."""
        return sum(part.held_bytes for part in self._open())

    def has(self, columns: Iterable[str]) -> bool:
        """Whether there is an open part for these columns."""
        return _own(columns) in self._parts

    def describes(self, column: str) -> bool:
        """Whether an open part has that column, so that nothing can be said of it any more."""
        return any(column in part.columns for part in self._parts.values())

    def prepare(
        self,
        given: dict[str, Cells],
        lengths: Mapping[str, Array],
        descriptions: Mapping[str, Description],
        retire: Callable[[PartWriter], None],
    ) -> PartWriter:
        """The part for these columns, checked and with `start` and `length` columns added to `given`; writes nothing.

        Where the budget cannot hold one more part, those that are open are handed to `retire`, to be closed.
        """
        columns = _own(given)
        if columns in self._parts:
            return _prepared(self._parts[columns], given, lengths, descriptions)
        try:
            left = self._budget - 2 * sum(part.buffer_bytes for part in self._parts.values())
            part = _prepared(self._new(left), given, lengths, descriptions)
        except BudgetError:
            if not self._parts:
                raise
            part = _prepared(self._new(self._budget), given, lengths, descriptions)
            for other in self._parts.values():
                retire(other)
            self._parts = {}
        self._parts[columns] = part
        return part

    def commit(self, kind: str, assets: Mapping[str, str]) -> None:
        """Commit every part; training steps last, so that whoever sees one sees the examples recorded in it, too."""
        for part in sorted(self._open(), key=lambda part: "step/step" in part.columns):
            part.commit(kind, assets=assets)

    def know(self, columns: Mapping[str, ColumnSchema]) -> None:
        """Take these for the columns the run has from before."""
        self._known = columns

    def forget(self) -> None:
        """Let all parts go, with what they hold."""
        self._parts = {}

    def _open(self) -> list[PartWriter]:
        """All of them, in one step: another thread may be opening one more."""
        return list(self._parts.values())

    def _new(self, budget: int) -> PartWriter:
        return PartWriter(self._place, self._document, budget, self._known, self._compress)


def _own(columns: Iterable[str]) -> frozenset[str]:
    """Columns by which parts are told apart: all but those that every part has."""
    return frozenset(name for name in columns if not names.is_bookkeeping(name))


def _prepared(
    part: PartWriter, given: dict[str, Cells], lengths: Mapping[str, Array], descriptions: Mapping[str, Description]
) -> PartWriter:
    whole = {**given, **start_columns(lengths)}
    part.prepare(whole, descriptions)
    given.update(whole)
    return part
