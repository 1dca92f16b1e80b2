"""The samples of tokens that the sites of one batch ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tensortape.stores.dtypes import Array, as_numpy
from tensortape.stores.names import split

from .capture import Capture
from .sampling import Sample
from .streams import table_of


class Draws:
    """Draws each sample of a batch once, for all sites that share it."""

    def __init__(self, ids: Sequence[str | int]) -> None:
        self._ids = ids
        self._drawn: dict[tuple[Sample, str], list[Array]] = {}

    def of(self, taken: Capture) -> Capture:
        """The capture with the rows that its site's sample draws; any other as it is."""
        sample = taken.sample
        if sample is None or taken.lengths is None:
            return taken
        drawn = self._draw(sample, taken.layout.stream, taken.lengths)
        rows = torch.from_numpy(np.flatnonzero(np.concatenate(drawn)))
        return replace(taken, rows=taken.rows[rows.to(taken.rows.device)], lengths=[int(one.sum()) for one in drawn])

    def beside(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """For the table of each sample, what the run says of the tokens drawn: their part of columns of the whole stream."""
        return {
            f"{sample.table(table_of(stream))}/{split(name)[1]}": _part(values, drawn)
            for (sample, stream), drawn in self._drawn.items()
            for name, values in columns.items()
            if split(name)[0] == table_of(stream)
        }

    def _draw(self, sample: Sample, stream: str, lengths: Sequence[int]) -> list[Array]:
        if (sample, stream) not in self._drawn:
            self._drawn[sample, stream] = [sample.drawn(id_, length) for id_, length in zip(self._ids, lengths, strict=True)]
        return self._drawn[sample, stream]


def _part(values: Any, drawn: list[Array]) -> Any:
    """Of rows in one array, or of one sequence per example."""
    if not isinstance(values, list):
        return values[np.concatenate(drawn)]
    return [_array(one)[chosen] for one, chosen in zip(values, drawn, strict=True)]


def _array(values: Any) -> Array:
    """Labels of one example's tokens; text as objects, so that none drawn is no text and not no number."""
    return np.array(values, object) if isinstance(values, list) else as_numpy(values)
