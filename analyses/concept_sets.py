"""Concepts as sets of rows, by their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array

from .errors import LabelError
from .spaces import MISSING, Space

Said = str | tuple[str, object]  # "column=value", "column", or (column, value)
RANDOM = "random"


@dataclass(frozen=True)
class Choice:
    """Rows whose label is `value`; if that is None, those whose label is True, or an integer that is not 0."""

    column: Column
    value: object = None

    @property
    def name(self) -> str:
        """`topic=asyncio`."""
        short = self.column.name.partition("/")[2]
        return short if self.value is None else f"{short}={self.value}"

    def of(self, space: Space, level: str) -> Array:
        """Per row 1 for those that are in, 0 for those that are not, -1 where the label is missing; int8.

        Raises:
            LabelError: no row has the value; the labels are of tokens, but the rows are examples.
        """
        if self.column.table != "example" and level == "example":
            raise LabelError(
                f"{self.column.name!r} is a label of tokens, but rows are examples here; use level='token', or a label of examples"
            )
        values = space.values(self.column)
        known = self.column.present[space.owner] & _given(values)
        found = np.where(known, 0, -1).astype(np.int8)
        found[known & self._inside(values, known)] = 1
        return found

    def _inside(self, values: Array, known: Array) -> Array:
        codes, classes = pd.factorize(values)
        names = [str(one) for one in classes]
        if self.value is not None:
            wanted = np.array([name == str(self.value) for name in names], bool)
        elif values.dtype.kind in "biu":
            wanted = np.asarray(classes).astype(bool)
        else:
            raise LabelError(f"{self.column.name!r} holds classes; name one of them, as in {_example(self.column, values, known)}")
        inside: Array = wanted[codes]
        if not (inside & known).any():
            raise LabelError(f"no row is {self.name!r}; there is {_example(self.column, values, known)}")
        return inside


def choice(run: Run, said: Said) -> Choice:
    """What is meant by `column=value`, by `column`, or by (column, value)."""
    if not isinstance(said, str):
        return Choice(run[said[0]], said[1])
    name, equals, value = said.partition("=")
    return Choice(run[name], value if equals else None)


def named(run: Run, said: str | Sequence[Said] | Mapping[str, Said]) -> dict[str, Choice]:
    """Concepts by name. LabelError for two of one name."""
    if isinstance(said, Mapping):
        return {name: choice(run, one) for name, one in said.items()}
    found = [choice(run, one) for one in ([said] if isinstance(said, str) else said)]
    names = [one.name for one in found]
    if len(set(names)) < len(names) or not names:
        raise LabelError(f"concepts need names of their own, at least one; got {names}; give a mapping from names to them")
    return dict(zip(names, found, strict=True))


def _given(values: Array) -> Array:
    """Where a label is not missing."""
    if values.dtype == object:
        found: Array = values != ""
    elif values.dtype.kind == "f":
        found = ~np.isnan(values)
    else:
        found = values != MISSING if values.dtype.kind in "iu" else np.ones(len(values), bool)
    return found


def _example(column: Column, values: Array, known: Array) -> str:
    classes = sorted(map(str, pd.unique(values[known])))
    shown = ", ".join(repr(f"{column.name}={one}") for one in classes[:8])
    return (shown or "no label at all") + (", ..." if len(classes) > 8 else "")
