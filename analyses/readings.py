"""The rows that concepts are fitted to, scored on and tested with: states of a site, and gradients at it that fit these states.

The state of an example is that of its tokens, pooled. A target's slope along a direction v of the mean of the tokens' states is the
sum over the tokens of gradient * v: moving the mean by v moves every token by v. So where states are averaged, gradients are added
up; where the first or last token stands for all, its gradient does, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array
from tensortape.stores.errors import GradientError, UnknownColumnError
from tensortape.stores.reduced import KINDS

from .errors import CAVError
from .gram import features
from .rows import Pool, Rows
from .spaces import Space, space
from .sweep import Block

WEIGHT = "weight"  # the tag with what rows are multiplied with


@dataclass(frozen=True)
class Reading:
    """One column on the rows of a space. `weight`: what each row is multiplied with; not at all, if None."""

    column: Column
    space: Space
    weight: Array | None = None

    def rows(self, tags: dict[str, Array], wanted: Array | None = None) -> Rows:
        """A source of the rows."""
        weights = {} if self.weight is None else {WEIGHT: self.weight}
        return self.space.rows([self.column], {**tags, **weights}, wanted)

    @property
    def width(self) -> int:
        """Features of a row."""
        return int(np.prod(self.column.shape[1:]))


def weighted(block: Block) -> Array:
    """The rows of a block's first column, multiplied with their weights; [n, d]."""
    rows = features(block)
    return rows * block.tags[WEIGHT][:, None].astype(rows.dtype) if WEIGHT in block.tags else rows


def site_of(column: Column) -> str:
    """`layers.0:out|mean`."""
    return column.name.partition("/")[2]


def states(run: Run, sites: Sequence[str], level: str, pool: Pool) -> list[Reading]:
    """The states of sites, by their full names, on rows of a level."""
    return [_read(run, _Wanted(site, site, level, pool)) for site in sites]


def gradients(
    run: Run, site: str, target: str, level: str, pool: Pool, assume: Literal["sum"] | None, labels: Sequence[Column] = ()
) -> Reading:
    """The gradients of a target at a site, joined as the states are; `labels`: of tokens, that must be there.

    Raises:
        UnknownColumnError: they were not recorded. CAVError: states were joined by their largest value.
        GradientError: nobody has said how the target joins its examples.
    """
    base, bar, kind = site.partition("|")
    if assume not in (None, "sum"):
        raise CAVError(f"assume is 'sum' or None, not {assume!r}")
    if kind == "max":
        raise CAVError(
            f"{site!r} holds the largest value over the tokens, along which no target has a slope; use mean, first or last"
        )
    found = _read(run, _Wanted(site, f"{base}.grad@{target}{bar}{kind}", level, pool, gradient=True), labels)
    if (found.column.site or {})["target"]["reduction"] is None and assume is None:
        raise GradientError(
            f"{found.column.name!r} is the gradient of a scalar of which nobody has said how it joins the examples of its batch, "
            "so what one example's gradient is cannot be told. Declare it when recording, with recorder.target(..., "
            "reduction='sum' or 'mean'), or pass assume='sum' to take the gradients as they are"
        )
    return found


@dataclass(frozen=True)
class _Wanted:
    """A column by its name without a table (`layers.0:out.grad@loss|mean`), of a site, on rows of a level."""

    site: str
    name: str
    level: str
    pool: Pool
    gradient: bool = False

    @property
    def kind(self) -> str | None:
        """How the tokens of an example are one row; None if they are not."""
        kind = self.name.partition("|")[2]
        return kind if kind in KINDS else self.pool if self.level == "example" and not kind else None

    @property
    def whole(self) -> str:
        """The column with a row per token."""
        base, _, kind = self.name.partition("|")
        return base if kind in KINDS else self.name


def _read(run: Run, wanted: _Wanted, labels: Sequence[Column] = ()) -> Reading:
    """Of all tokens, which are then joined, where they were recorded; else of what was joined when recording."""
    columns = {site_of(column): column for column in run.sites}
    kind = wanted.kind
    if wanted.whole in columns and kind != "max":
        column = columns[wanted.whole]
        level, pool = (wanted.level, wanted.pool) if kind is None else ("example", kind)
        found = space(run, [column], labels, level, pool)  # type: ignore[arg-type]
        if wanted.gradient and found.merged is not None and found.merged.pool == "mean":
            found = replace(found, merged=replace(found.merged, pool="sum"))
        return Reading(column, found)
    joined = columns.get(f"{wanted.whole}|{kind}")
    if joined is None:
        near = sorted(name for name in columns if name.startswith(wanted.site.partition("|")[0]))
        raise UnknownColumnError(f"the run has no {wanted.whole!r}; of that site it has {', '.join(map(repr, near)) or 'nothing'}")
    found = space(run, [joined], labels, "example", wanted.pool)
    return Reading(joined, found, _tokens(run, found) if wanted.gradient and kind == "mean" else None)


def _tokens(run: Run, space: Space) -> Array:
    """How many tokens each row's example has: a mean over them becomes their sum."""
    if "token" not in run.tables:
        raise GradientError(
            "gradients were averaged over tokens, but the run does not say how many there are: it has no table 'token'"
        )
    found: Array = run.tables["token"].lengths[space.owner]
    return found
