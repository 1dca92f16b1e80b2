"""Training steps of one writer: in order, and each once in every column."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from . import names
from .descriptions import Kind
from .dtypes import Array
from .errors import KeyRepeatedError, SchemaError
from .schema import ColumnSchema


class StepOrder:
    """Which step comes next in each column of the step table.

    Columns that came together once lie in one part, and go there whenever all of them are given; so a loop that says now a loss,
    now a loss and a score, writes two parts and not one for every mixture.
    """

    def __init__(self, last: Mapping[str, int], columns: Mapping[str, ColumnSchema]) -> None:
        self._last = dict(last)
        self._kinds: dict[str, Kind] = {name: (schema.dtype, schema.shape) for name, schema in columns.items()}
        self._groups: list[frozenset[str]] = []

    @property
    def last(self) -> int:
        """The latest step of any column; -1 without any."""
        return max(self._last.values(), default=-1)

    def admit(self, steps: Sequence[int], columns: Iterable[str]) -> Array:
        """The steps as int64; SchemaError or KeyRepeatedError unless they may be appended to these columns."""
        numbers = np.asarray(steps)
        if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu":
            raise SchemaError(f"steps are integers, one per row; got {steps!r}")
        if (np.diff(numbers) <= 0).any() or numbers[0] < 0:
            raise SchemaError(f"steps are given in order, each once, and count from 0; got {numbers.tolist()[:10]}")
        for name in columns:
            self._check(name, int(numbers[0]))
        return numbers.astype(np.int64)

    def check_kinds(self, given: Mapping[str, Kind]) -> None:
        """SchemaError unless each column stays what it was, in whatever part: dtype and shape of a row."""
        for name, kind in given.items():
            before = self._kinds.setdefault(name, kind)
            if kind != before:
                raise SchemaError(
                    f"column {name!r} holds {before[0]} rows of shape {before[1]}, but got {kind[0]} of shape {kind[1]}; a column "
                    "of the step table is of one kind at all steps"
                )

    def take(self, steps: Array, columns: Collection[str]) -> list[frozenset[str]]:
        """Remember what was admitted; the columns, grouped by the part they go to."""
        self._last.update(dict.fromkeys(columns, int(steps[-1])))
        left, found = frozenset(columns), []
        for group in self._groups:
            if group <= left:
                found.append(group)
                left -= group
        if left or not found:
            self._groups.append(left)
            found.append(left)
        return found

    def _check(self, name: str, first: int) -> None:
        names.refuse_bookkeeping(name)
        if names.split(name)[0] != "step":
            raise SchemaError(f"column {name!r} belongs to examples; append_steps writes 'step/<column>'")
        last = self._last.get(name, -1)
        if first <= last:
            raise KeyRepeatedError(
                f"column {name!r} has values up to step {last} already, but got step {first}; to go on from a checkpoint, rewind "
                "to the step that comes after it"
            )
