"""The join of parts: which example (or training step) is which, and where its rows of a column lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .dtypes import Array
from .errors import DamagedError, SchemaError
from .names import is_bookkeeping, is_ragged
from .part_reader import PartReader


@dataclass(frozen=True)
class Places:
    """Per example of the run: the part (by position, -1 for absent), first row and number of rows of one column."""

    part: Array
    start: Array
    length: Array


class Index:
    """Examples of a run in order: those of the first part, then what each later part adds."""

    def __init__(self, parts: list[PartReader]) -> None:
        self._parts = parts

    def __getstate__(self) -> dict[str, list[PartReader]]:
        return {"_parts": self._parts}  # all else is soon found again, and would make every pickle as long as the run has examples

    @cached_property
    def numbers(self) -> list[Array]:
        """For each part the run's number of each of its examples; int64."""
        codes = iter(np.split(self._codes, np.cumsum([len(part.kept) for part in self._own])))
        by_name: dict[str, Array] = {}
        for part in self._parts:
            by_name[part.state.name] = next(codes) if part in self._own else _aligned(part, by_name)
        return list(by_name.values())

    @cached_property
    def keys(self) -> tuple[Array, Array, Array]:
        """ids, phases and steps of all examples, in order."""
        first = np.unique(self._codes, return_index=True)[1]
        ids, phases, steps = (column[first] for column in self._all_keys)
        return ids, phases, steps

    def all(self) -> list[tuple[str | int, str, int]]:
        """(id, phase, step) of all examples, in order."""
        return list(zip(*(column.tolist() for column in self.keys), strict=True))

    def id(self, number: int) -> str | int:
        """The id of an example, as it was given."""
        found: str | int = self.keys[0][number : number + 1].tolist()[0]
        return found

    def __len__(self) -> int:
        return len(self.keys[0])

    def places(self, column: str) -> Places:
        """Where each example's rows of a column lie; SchemaError if two sessions wrote the same cell."""
        count = len(self)
        part, start, length = np.full(count, -1), np.zeros(count, np.int64), np.zeros(count, np.int64)
        for position, (reader, numbers) in enumerate(zip(self._parts, self.numbers, strict=True)):
            if column not in reader.state.columns:
                continue
            first, rows = _bounds(reader, column)
            free = self._free(column, part[numbers], position, numbers)
            chosen = numbers[free]
            part[chosen], start[chosen], length[chosen] = position, first[free], rows[free]
        return Places(part, start, length)

    def lengths(self, table: str) -> Array:
        """Rows of each example in a ragged table, -1 where it has none recorded; SchemaError where parts disagree."""
        found = np.full(len(self), -1, np.int64)
        for reader, numbers in zip(self._parts, self.numbers, strict=True):
            if table not in reader.state.rows:
                continue
            lengths = reader.bounds(table)[1]
            wrong = np.flatnonzero((found[numbers] >= 0) & (found[numbers] != lengths))
            if len(wrong):
                example = numbers[wrong[0]]
                raise SchemaError(
                    f"part {reader.state.name} has {lengths[wrong[0]]} rows of table {table!r} for example "
                    f"{self.id(int(example))!r}, where an earlier part has {found[example]}"
                )
            found[numbers] = lengths
        return found

    def _free(self, column: str, taken: Array, position: int, numbers: Array) -> Array:
        """Which of a part's examples have no value yet. The same cell twice is fine only within one session (sampler padding).

        Keys and bounds stand in every part.
        """
        session = self._parts[position].state.document.session
        for earlier in np.unique(taken[taken >= 0]):
            if self._parts[earlier].state.document.session != session and not is_bookkeeping(column):
                example = numbers[np.flatnonzero(taken == earlier)[0]]
                raise SchemaError(
                    f"column {column!r} has two values for example {self.id(int(example))!r}, in parts "
                    f"{self._parts[earlier].state.name} and {self._parts[position].state.name} of different sessions"
                )
        return taken < 0

    @cached_property
    def _own(self) -> list[PartReader]:
        """Parts whose keys are looked up; where examples are given up or superseded, those that line up with others do not."""
        there = {part.state.name: part.state.examples for part in self._parts}
        spans = [span for part in self._parts for span in part.state.aligned]
        fewer = any(part.state.withdrawn or part.state.hidden_from is not None for part in self._parts)
        lost = fewer or any(there.get(name, 0) < a + n for name, a, n in spans)
        return [part for part in self._parts if lost or not part.state.aligned]

    @cached_property
    def _all_keys(self) -> tuple[Array, Array, Array]:
        columns = zip(*(part.keys() for part in self._own), strict=True)
        ids, phases, steps = ([value for part in column for value in part] for column in columns) if self._own else ([], [], [])
        if len({part.id_kind for part in self._own}) > 1:
            raise DamagedError("the ids of some parts are text and those of others are numbers: they are of different runs")
        kind = object if ids and isinstance(ids[0], str) else np.int64
        return np.array(ids, kind), np.array(phases, object), np.array(steps, np.int64)

    @cached_property
    def _codes(self) -> Array:
        """A number per key of all parts, in order of first appearance."""
        combined = np.zeros(len(self._all_keys[0]), np.int64)
        for values in self._all_keys:
            codes = _codes(values)
            combined = combined * (int(codes.max(initial=0)) + 1) + codes
        return _codes(combined)


def _codes(values: Array) -> Array:
    """A number per distinct value, in order of first appearance (exactly: pandas would cut text at a zero byte)."""
    seen: dict[str | int, int] = {}
    return np.array([seen.setdefault(value, len(seen)) for value in values.tolist()], np.int64)


def _aligned(part: PartReader, numbers: dict[str, Array]) -> Array:
    """What a part lines up with; `_own` has seen that the examples are there."""
    spans = part.state.aligned
    if not {name for name, _, _ in spans} <= numbers.keys() or sum(count for _, _, count in spans) != part.state.examples:
        raise DamagedError(
            f"parts/{part.state.name}: it is said to line up with parts that do not come before it, or have other rows"
        )
    return np.concatenate([numbers[name][first : first + count] for name, first, count in spans])


def _bounds(reader: PartReader, column: str) -> tuple[Array, Array]:
    table = reader.state.columns[column].table
    if is_ragged(table):
        return reader.bounds(table)
    return reader.kept, np.ones(len(reader.kept), np.int64)
