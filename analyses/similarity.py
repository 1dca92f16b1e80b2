"""Centred kernel alignment: how alike sites arrange the same rows (Kornblith et al. 2019, arXiv 1905.00414)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Literal, get_args

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array
from tensortape.stores.selection import site_name

from .aligned import Aligned, Side, partners, side
from .errors import SizeError
from .gram import Gram, Sums, shift_of
from .hsic import LEAST_ROWS, Hsic, Kernel
from .layers import short_name
from .rows import Pool
from .similarities import Similarity
from .spaces import space
from .sweep import Job, sweep

WIDEST = 4096  # features of all sites together whose products are still summed: 128 MiB, and 34 Mflop per row

Estimate = Literal["auto", "full", "minibatch"]


def cka(
    run: Run,
    sites: str | Sequence[str] = "resid_post",
    other: Run | None = None,
    kind: Kernel = "linear",
    *,
    other_sites: str | Sequence[str] | None = None,
    estimate: Estimate = "auto",
    batches: int = 20,
    batch_rows: int = 512,
    level: str = "token",
    pool: Pool = "mean",
    seed: int = 0,
    executor: Executor | None = None,
) -> Similarity:
    """CKA of each two sites of a run, or of each site of a run and each of another run of the same examples.

    Args:
        run: an open run.
        sites: which recorded sites; see `Run.select`.
        other: a second run, whose examples are joined by key; of the same tokens, unless rows are examples.
        kind: the kernel: `linear`, or `rbf` with the median distance of a minibatch's rows as its width.
        other_sites: sites of the second run, `sites` if not given.
        estimate: `full` is the formula on all rows: one reading, and memory for the square of all features together. `minibatch` is
            the ratio of means of the unbiased HSIC over minibatches (Nguyen, Raghu & Kornblith 2021, arXiv 2010.15327), with its
            error; unlike the formula, it is not biased upwards where rows are few beside features. `auto` is the formula for a
            linear kernel and up to 4096 features.
        batches, batch_rows: how many minibatches of how many rows, drawn at random without replacement.
        level: what a row is: `token`, `example` (tokens pooled), or a column that numbers words or spans within an example.
        pool: how tokens are joined: `first`, `last` or `mean`.
        seed: of the draw.
        executor: who reads and computes; see `sweep`.

    Raises:
        JoinError: runs without examples in common, or with other rows. SizeError: too few rows.
    """
    columns = run.select(sites)
    columns_there = columns if other is None else other.select(sites if other_sites is None else other_sites)
    sides = _sides(columns, run, columns_there, other, level, pool)
    if uses_formula(estimate, kind, sides):
        source = Aligned.whole(sides)
        matrix, error = _full(source, executor), None
    else:
        source = minibatches(sides, batches, batch_rows, seed)
        matrix, error = sampled(source, kind, executor)
    here, there = slice(0, len(columns)), slice(-len(columns_there), None)
    return Similarity(
        sites=tuple(str(site_name(column)) for column in columns),
        names=tuple(map(short_name, columns)),
        others=tuple(str(site_name(column)) for column in columns_there),
        other_names=tuple(map(short_name, columns_there)),
        matrix=matrix[here, there],
        error=None if error is None else error[here, there],
        kind=kind,
        rows=sum(map(len, source.blocks)),
        batches=0 if error is None else len(source.blocks),
        level=level,
        seed=seed,
        joined=other is not None,
    )


def uses_formula(estimate: Estimate, kind: Kernel, sides: Sequence[Side]) -> bool:
    """Whether CKA of some sides is by the formula, on all rows; ValueError where that was asked for and is not possible."""
    if estimate not in get_args(Estimate):
        raise ValueError(f"estimate is one of {', '.join(get_args(Estimate))}, not {estimate!r}")
    if estimate == "full" and kind != "linear":
        raise ValueError(f"kind={kind!r} is only estimated by minibatches; leave out estimate='full'")
    width = sum(sum(one.widths) for one in sides)
    return estimate == "full" or (estimate == "auto" and kind == "linear" and width <= WIDEST)


def _sides(
    columns: Sequence[Column], run: Run, columns_there: Sequence[Column], other: Run | None, level: str, pool: Pool
) -> tuple[Side, ...]:
    mine = space(run, columns, [], level, pool)
    names = [column.name for column in columns]
    if other is None:
        return (side(run, mine, names),)
    theirs = space(other, columns_there, [], level, pool)
    rows, rows_there = partners(mine, theirs)
    return side(run, mine, names, rows), side(other, theirs, [column.name for column in columns_there], rows_there)


def _full(source: Aligned, executor: Executor | None) -> Array:
    """CKA of all columns on all rows, of the covariance of all features together."""
    gram = Gram(shift_of(next(source.pieces()[0].blocks())))
    [[sums]] = sweep([Job(source, (gram,))], executor, title="comparing")
    return linear_cka(sums, source.widths)


def linear_cka(sums: Sums, widths: Sequence[int]) -> Array:
    """|C_ij|^2 / (|C_ii| |C_jj|) of the blocks of a covariance, Frobenius norms; [columns, columns], NaN for constant columns."""
    edges = np.cumsum([0, *widths])
    across = np.add.reduceat(np.add.reduceat(sums.covariance**2, edges[:-1], axis=0), edges[:-1], axis=1)
    return _normalised(across)


def minibatches(sides: tuple[Side, ...], batches: int, batch_rows: int, seed: int) -> Aligned:
    """Rows of some sides, as many minibatches as there are rows for; the same rows for the same seed and number of rows."""
    count = len(sides[0].rows)
    rows = min(batch_rows, count)
    if rows < LEAST_ROWS:
        raise SizeError(f"minibatches of {rows} rows; the estimate needs at least {LEAST_ROWS}")
    most = min(batches, count // rows)
    drawn = np.random.default_rng(seed).choice(count, most * rows, replace=False).reshape(most, rows)
    return Aligned(sides, tuple(np.sort(drawn, axis=1)))


def sampled(source: Aligned, kind: Kernel, executor: Executor | None) -> tuple[Array, Array]:
    """CKA of the HSIC of all minibatches, and its standard error by the jackknife (NaN for one batch); [columns, columns] both."""
    [[found]] = sweep([Job(source, (Hsic(source.widths, kind),))], executor, title="comparing")
    total, count = found.sum(0), len(found)
    if count == 1:
        return _normalised(total), np.full(total.shape, np.nan)
    without = np.stack([_normalised(total - one) for one in found])
    return _normalised(total), np.sqrt((count - 1) * without.var(0))


def _normalised(across: Array) -> Array:
    own = np.diagonal(across)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = across / np.sqrt(np.outer(own, own))
    return found
