"""Rows of a site in few dimensions: principal components, and t-SNE of a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Self

import numpy as np
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits

from tensortape.stores import Column, Run
from tensortape.stores.derived import Derived
from tensortape.stores.dtypes import Array
from tensortape.stores.selection import site_name

from .errors import SizeError
from .gram import Gram, Sums, features, shift_of
from .layers import layer_of, short_name
from .projections import Embedding2D, Projection, Projections, Sample, coordinates
from .rows import Pool
from .spaces import Space, read_labels, space
from .sweep import Accumulator, Block, Job, sweep

TSNE_COMPONENTS = 50  # van der Maaten & Hinton (2008, section 4.2) reduce to 30, their programs to 50


def pca(
    run: Run,
    sites: str | Sequence[str] = "resid_post",
    *,
    components: int = 10,
    labels: str | None = None,
    level: str = "token",
    pool: Pool = "mean",
    sample: int = 2000,
    seed: int = 0,
    executor: Executor | None = None,
    keep: bool = True,
) -> Projections:
    """Principal components of each site, of the covariance of all rows: one reading, memory for [d, d] numbers.

    Args:
        run: an open run.
        sites: which recorded sites; see `Run.select`.
        components: how many.
        labels: a column of classes, to colour a picture by; only rows that have one are shown, and only examples that have the
            column count.
        level: what a row is: `token`, `example` (tokens pooled), or a column that numbers words or spans within an example.
        pool: how tokens are joined: `first`, `last` or `mean`.
        sample: how many rows to show, drawn at random; their coordinates are part of the result.
        seed: of the draw.
        executor: who reads and computes; see `sweep`.
        keep: keep sums in the run, so that they are not computed twice.

    Raises:
        SizeError: more components than features. LabelError: fewer than two classes, or labels of other rows.
    """
    columns = run.select(sites)
    _check(columns, components)
    rows = space(run, columns, [] if labels is None else [run[labels]], level, pool)
    shown = _sample(rows, None if labels is None else run[labels], sample, seed)
    kept = run.derived if keep else None
    return Projections(tuple(_project(rows, column, components, shown, executor, kept) for column in columns), shown, level)


def tsne(
    run: Run,
    site: str,
    *,
    labels: str | None = None,
    perplexity: float = 30.0,
    components: int = TSNE_COMPONENTS,
    level: str = "token",
    pool: Pool = "mean",
    sample: int = 2000,
    seed: int = 0,
    executor: Executor | None = None,
    keep: bool = True,
) -> Embedding2D:
    """t-SNE (van der Maaten & Hinton 2008) of a sample of the rows, in their first principal components, by scikit-learn.

    Distances between far groups, and the sizes of groups, mean little in it; other seeds and perplexities give other pictures.

    Args:
        run, labels, level, pool, sample, seed, executor, keep: as of `pca`.
        site: a recorded site, by name or a pattern that fits one.
        perplexity: about how many neighbours a row has; less than the rows of the sample.
        components: of the site's principal components (all of them where it has fewer features).

    Raises:
        SizeError: no more rows than the perplexity. LabelError: fewer than two classes, or labels of other rows.
    """
    from sklearn.manifold import TSNE

    column = run[site]
    rows = space(run, [column], [] if labels is None else [run[labels]], level, pool)
    shown = _sample(rows, None if labels is None else run[labels], sample, seed)
    if len(shown.rows) <= perplexity:
        few = f"needs more rows than the {len(shown.rows)} of the sample"
        raise SizeError(f"a perplexity of {perplexity:g} {few}; lower perplexity=, or raise sample=")
    count = min(components, math.prod(column.shape[1:]))
    scores = _project(rows, column, count, shown, executor, run.derived if keep else None).scores
    with threadpool_limits(1):  # the same bits; where cores are busy, its threads wait for one another ten times as long
        model = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit(scores)
    return Embedding2D(str(site_name(column)), model.embedding_, shown, float(model.kl_divergence_), perplexity, seed)


def _check(columns: Sequence[Column], components: int) -> None:
    for column in columns:
        width = math.prod(column.shape[1:])
        if not 0 < components <= width:
            raise SizeError(f"components={components} of {column.name!r}, which has {width} features; give 1 to {width}")


def _sample(space: Space, labels: Column | None, count: int, seed: int) -> Sample:
    """Rows to show: so many, or all; with labels, of those that have one."""
    told = None if labels is None else read_labels(space, labels)
    known = np.arange(len(space)) if told is None else np.flatnonzero(told.of_row >= 0)
    rows = np.sort(np.random.default_rng(seed).choice(known, min(count, len(known)), replace=False))
    if told is None:
        return Sample(rows, space.owner[rows])
    return Sample(rows, space.owner[rows], told.name, told.classes, told.of_row[rows])


def _project(
    space: Space, column: Column, components: int, shown: Sample, executor: Executor | None, kept: Derived | None
) -> Projection:
    rows = space.rows([column], {})
    shift = shift_of(rows.first_block())
    gram = Gram(shift, None, rows.key("gram", np.ones(len(rows), bool), shift))
    [[sums]] = sweep([Job(rows, (gram,))], executor, kept=kept, title="summing")
    variances, axes = principal(sums, components)
    wanted = np.zeros(len(rows), bool)
    wanted[shown.rows] = True
    [[scores]] = sweep([Job(space.rows([column], {}, wanted), (Coordinates(sums.mean, axes),))], executor, title="projecting")
    total = float(np.trace(sums.covariance)) * _unbiased(sums)
    return Projection(
        str(site_name(column)), short_name(column), layer_of(column), sums.count, sums.mean, axes, variances, total, scores
    )


def principal(sums: Sums, count: int) -> tuple[Array, Array]:
    """Variances [k], of a sample, and principal components [k, d] with the greatest, falling; both float64.

    The entry of a component that is greatest in size is positive.
    """
    width = len(sums.mean)
    values, vectors = eigh(sums.covariance, subset_by_index=(width - count, width - 1))
    components = vectors.T[::-1]
    signs = np.sign(components[np.arange(count), np.abs(components).argmax(1)])
    return np.maximum(values[::-1], 0) * _unbiased(sums), components * signs[:, None]


def _unbiased(sums: Sums) -> float:
    return sums.count / max(sums.count - 1, 1)


class Coordinates(Accumulator):
    """Coordinates of all rows in principal components [k, d]; [n, k]."""

    found: list[Array]

    def __init__(self, mean: Array, components: Array) -> None:
        self.mean, self.components = mean, components

    def init(self) -> Self:
        """No rows yet."""
        empty = super().init()
        empty.found = []
        return empty

    def update(self, block: Block) -> None:
        """Take the rows of a block."""
        self.found.append(coordinates(features(block), self.mean, self.components))

    def merge(self, other: Self) -> None:
        """Take the rows of another."""
        self.found += other.found

    def finalize(self) -> Array:
        """All of them, in order."""
        return np.concatenate(self.found)
