"""Rows of the step table on their way to the writer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tensortape.stores import RunWriter
from tensortape.stores.dtypes import as_numpy

_MOST_ROWS = 64
_SECONDS = 2.0
_SMALL = 16  # numbers; more is not kept waiting


class StepRows:
    """Collects what loops say of their steps, and hands it on a few steps at a time: a loss is not asked for on every step, which
    would make a GPU wait.
    """

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer
        self._rows: list[tuple[int, dict[str, Any]]] = []
        self._begun = 0.0

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Say more of a step; `values` by name of the column in the step table."""
        if not self._rows:
            self._begun = time.monotonic()
        taken = {name: _taken(value) for name, value in values.items()}
        self._rows.append((step, taken))
        is_large = any(isinstance(value, torch.Tensor) and value.numel() > _SMALL for value in taken.values())
        if is_large or len(self._rows) >= _MOST_ROWS or time.monotonic() - self._begun > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Append everything; steps that have the same columns together."""
        rows, self._rows = self._rows, []
        start = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or _shape(rows[end][1]) != _shape(rows[start][1]):
                self._append(rows[start:end])
                start = end

    def _append(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        columns = {f"step/{name}": _stacked([values[name] for _, values in rows]) for name in rows[0][1]}
        self._writer.append_steps(steps=[step for step, _ in rows], columns=columns)


def _taken(value: Any) -> Any:
    """A value that later steps do not change; single numbers with a fraction in float64, which holds any of them exactly."""
    if not isinstance(value, torch.Tensor):
        return value
    is_number = not value.ndim and value.is_floating_point()
    return value.detach().to(torch.float64) if is_number else value.detach().clone()


def _shape(values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [(name, type(value), getattr(value, "dtype", None), getattr(value, "shape", None)) for name, value in values.items()]


def _stacked(values: list[Any]) -> Any:
    """[rows, *feature] of tensors, arrays or numbers; text stays a list."""
    if isinstance(values[0], torch.Tensor):
        return as_numpy(torch.stack(values))
    return values if isinstance(values[0], str) else np.asarray(values)
