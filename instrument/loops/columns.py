"""Columns of a data set that are for the recorder: ids of the examples, and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..arguments import parameters_of
from ..errors import BatchError
from ..modules import unwrapped

CONTENT = "content"


class Columns:
    """Takes ids and labels out of the arguments that a model is called with.

    Args:
        ids: the column that holds ids, or "content" for a hash of each example's tokens.
        labels: `example/<name>` or `token/<name>` to the column that holds them.
        model: goes on without those of the columns that its forward does not take.

    >>> columns = Columns("id", {"example/topic": "topic"}, nn.Linear(2, 3))
    >>> call = {"input": [[3, 1], [4, 1]], "id": ["a", "b"], "topic": [0, 1]}
    >>> given = columns.taken_out_of(call)
    >>> call, columns.ids_of(given), columns.labels_of(given)
    ({'input': [[3, 1], [4, 1]]}, ['a', 'b'], {'example/topic': [0, 1]})
    """

    def __init__(self, ids: str, labels: Mapping[str, str], model: nn.Module) -> None:
        self._ids, self._labels = ids, dict(labels)
        self.foreign = frozenset({ids, *self._labels.values()} - {CONTENT} - parameters_of(unwrapped(model)))

    def taken_out_of(self, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call as they were; `call` is left without what is foreign to the model."""
        given = dict(call)
        for column in self.foreign:
            call.pop(column, None)
        return given

    def ids_of(self, given: Mapping[str, Any]) -> Any:
        """Ids for `Recorder.batch`; BatchError where the column is not there."""
        return CONTENT if self._ids == CONTENT else _column(given, self._ids)

    def labels_of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Labels for `Recorder.batch`; BatchError where a column is not there."""
        return {name: _column(given, column) for name, column in self._labels.items()}


def _column(given: Mapping[str, Any], column: str) -> Any:
    if column not in given:
        raise BatchError(
            f"the model was called without {column!r}, only with {', '.join(given)}: the data set has no such column, or the "
            "collator drops it, as those of transformers do with text; use numbers, or a collator that keeps it"
        )
    return given[column]
