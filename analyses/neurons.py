"""Neurons one by one: how they are distributed, what they tell apart, what depends on them, and where they are highest."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import combinations
from typing import Any

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array
from tensortape.stores.selection import site_name

from .errors import LabelError
from .gradients import Assume, gradient_at
from .gram import ClassSums, ClassTotals, shift_of
from .highest import Highest, Peaks
from .moments import Moments, Products, Spread
from .neuron_table import NeuronTable, Selectivity, TopExamples
from .passages import Decode, read_passages
from .ranks import Order, Ranks, sizes
from .rows import Pool
from .spaces import Labels, Space, read_labels, space
from .sweep import Accumulator, Job, sweep

SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
LABEL = "label"  # the tag with each row's class


def neuron_table(
    run: Run,
    site: str,
    labels: str | None = None,
    *,
    top: int = 10,
    target: str | None = None,
    assume: Assume = None,
    level: str = "token",
    pool: Pool = "mean",
    shares: Sequence[float] = SHARES,
    memory: int = 256 << 20,
    context: int = 40,
    decode: Decode | None = None,
    executor: Executor | None = None,
) -> NeuronTable:
    """Numbers of every neuron of a site, from one reading: moments, sparsity, quantiles, selectivity, importance, highest rows.

    The rows are those of all examples that have the site and, where asked for, labels and gradients.

    Args:
        run: an open run.
        site: a recorded site, by name or a pattern that fits one.
        labels: a column of classes, of the rows of the site or of examples; -100 and empty text are missing.
        top: how many of the highest rows to keep of each neuron.
        target: what a neuron's importance is for, a target y whose gradient was recorded at the site: mean |a * dy/da|.
        assume: `sum` takes gradients of an undeclared reduction as they are.
        level: what a row is: `token`, `example` (tokens pooled), or a column that numbers words or spans within an example.
        pool: how tokens are joined: `first`, `last` or `mean`.
        shares: which quantiles.
        memory: about how many bytes of rows to hold for quantiles and AUC, in all and in each task that runs. They are exact if all
            rows fit; else sketched, and the result says how far they may be off.
        context: characters of text before and after each of the highest rows.
        decode: the text of some token ids, for a run that keeps no text.
        executor: who reads and computes; see `sweep`.

    Raises:
        LabelError: fewer than two classes, or labels of other rows than the site's; importance of rows that are pooled.
        GradientError: nobody has said how the target joins the examples of its batch.
        UnknownColumnError: no such site, labels or gradient.
    """
    column, classes = run[site], [] if labels is None else [run[labels]]
    gradient = None if target is None else gradient_at(run, str(site_name(column)), target, assume=assume)
    columns = [column] if gradient is None else [column, gradient]
    rows = space(run, columns, classes, level, pool)
    if gradient is not None and rows.merged is not None:
        raise LabelError(f"importance is of single rows, but level={level!r} pools them; leave out level= or target=")
    told = read_labels(rows, classes[0]) if classes else None
    found = _read(rows, columns, told, top, memory, executor)
    spread: Spread = found[Moments]
    order: Order = found[Ranks]
    unknown = np.where(np.isnan(spread.mean), np.nan, 0.0)  # of features with NaN in a row nothing can be said that sorts rows
    return NeuronTable(
        site=str(site_name(column)),
        level="example" if rows.table == "example" else level,
        spread=spread,
        shares=tuple(shares),
        quantiles=order.quantiles(shares) + unknown,
        rank_error=order.error,
        selectivity=None if told is None else _selectivity(told, spread, found[ClassSums], order, unknown),
        target=target,
        attribution=found.get(Products),
        top=_top(rows, found[Highest], context, decode) if top else None,
    )


def _read(
    space: Space, columns: Sequence[Column], told: Labels | None, top: int, memory: int, executor: Executor | None
) -> dict[type[Accumulator], Any]:
    """What each accumulator makes of the rows, in one reading."""
    rows = space.rows(columns, {} if told is None else {LABEL: told.of_row})
    first = rows.first_block()
    shift = shift_of(first)
    counts = [len(space)] if told is None else np.bincount(told.of_row + 1, minlength=len(told.classes) + 1).tolist()
    made: list[Accumulator] = [
        Moments(shift),
        Ranks(sizes(counts, first.values[0][0].nbytes, memory), None if told is None else LABEL),
    ]
    made += [] if told is None else [ClassSums(shift, LABEL, len(told.classes))]
    made += [Products()] if len(columns) == 2 else []
    made += [Highest(top)] if top else []
    [found] = sweep([Job(rows, tuple(made))], executor, title="neurons")
    return dict(zip(map(type, made), found, strict=True))


def _selectivity(told: Labels, spread: Spread, totals: ClassTotals, order: Order, unknown: Array) -> Selectivity:
    means, rows = totals.offsets, totals.counts
    others = (totals.totals.sum(0) - totals.totals) / (rows.sum() - rows)[:, None]
    return Selectivity(
        labels=told.name,
        classes=told.classes,
        rows=rows,
        difference=(means - others) / spread.unit,
        auc=order.areas() + unknown,
        auc_error=order.area_errors(),
        probeless=np.sum([np.abs(means[one] - means[other]) for one, other in combinations(range(len(rows)), 2)], axis=0),
    )


def _top(space: Space, peaks: Peaks, context: int, decode: Decode | None) -> TopExamples:
    rows, passage = np.unique(peaks.rows, return_inverse=True)
    return TopExamples(peaks.values, passage.reshape(peaks.rows.shape), read_passages(space, rows, context, decode))
