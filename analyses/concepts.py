"""Concept activation vectors: directions along which states show a concept (Kim et al. 2018, arXiv 1711.11279)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Literal, get_args

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array
from tensortape.stores.patterns import Alias

from .cavs import CAV, CAVKind, CAVs
from .concept_fits import Manner, Normal, fit
from .concept_sets import RANDOM, Choice, Said, choice, named
from .directions import Dots
from .divisions import Division, divide
from .errors import CAVError
from .gram import shift_of
from .readings import Reading, gradients, site_of
from .rows import Pool
from .spaces import group_column, space
from .sweep import Job, sweep


def fit_cavs(
    run: Run,
    *,
    concepts: str | Sequence[Said] | Mapping[str, Said],
    sites: str | Sequence[str] = "resid_post",
    kind: CAVKind = "lda",
    against: Said | None = None,
    target: str | None = None,
    level: str | None = None,
    pool: Pool = "mean",
    groups: str | None = None,
    test_share: float = 0.25,
    strength: float = 1.0,
    null: int = 200,
    assume: Literal["sum"] | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    keep: bool = True,
) -> CAVs:
    """Fit one concept activation vector per concept and site. All concepts and their random sets share each reading of a site.

    Args:
        run: an open run.
        concepts: each is a set of rows: `example/topic=asyncio` (a column of labels and one of its classes), `example/is_code` (a
            column of True and False, or of 1 and 0), or a pair of a column and a class. One, a list, or a mapping from names.
        sites: which recorded sites; see `Run.select`.
        kind: `lda` is the normal of linear discriminant analysis with a small penalty, which needs one reading. `logistic` is that
            of logistic regression at its optimum. `mean_difference` is the difference of both means. `mean_gradient` is something
            else: the mean over the concept's rows of the gradient of `target`, an average sensitivity of the model, which detects
            nothing and is told from nothing.
        against: what the concept is told from, as for `concepts`; by default all other rows that have a label, `random` as many of
            them as the concept has.
        target: what was differentiated, for `mean_gradient`.
        level: what a row is: `example` (its tokens pooled), `token`, or a column that numbers words or spans within an example. By
            default what the labels are of.
        pool: how tokens are joined: `first`, `last` or `mean`; their gradients as `tcav` says.
        groups: the example column whose values must not be split between training and test; by default `example/document` where
            there is one, else each example is its own group.
        test_share: about this share of the rows is held out; 0 fits to all of them and tests on none.
        strength: of the penalty on standardised features, for `lda` and `logistic`: 1 / C of scikit-learn's
            `LogisticRegression`, alpha of its `Ridge`.
        null: how many random sets of the same size to fit for each concept, which `tcav` holds the concept against; at least 100
            for a test, and more where many are made together.
        assume: `sum` takes gradients of an undeclared reduction as they are.
        seed: of the split and the random sets.
        executor: who reads and computes; see `sweep`.
        keep: keep sums in the run, so that they are not computed twice.

    Raises:
        LabelError: a concept without rows, or with nothing to tell it from.
        CAVError: a site where concept and rest have the same mean, or values that are not finite; an option that is none.
        UnknownColumnError: no such column or site. GradientError: gradients of an undeclared reduction.
    """
    _check(kind, pool, target, test_share, strength, null)
    chosen = named(run, concepts)
    rest = against if against is None or against == RANDOM else choice(run, against)
    columns, labels = run.select(sites), _of_tokens([*chosen.values(), rest])
    level = level or ("token" if labels else "example")
    manner = Manner(kind, strength, executor, run.derived if keep else None)
    if target is None:
        shared = space(run, columns, labels, level, pool)
        readings = [Reading(column, shared) for column in columns]
    else:
        readings = [gradients(run, site_of(column), target, level, pool, assume, labels) for column in columns]
    found: dict[str, CAV] = {}
    division: Division | None = None
    for column, reading in zip(columns, readings, strict=True):
        if division is None or division.space is not reading.space:
            division = divide(reading.space, level, chosen, rest, groups, 0.0 if target else test_share, null, seed)
        alias = next((alias for alias in run.aliases(column) if alias.layer is not None), Alias("", ""))
        found |= {f"{cav.concept}/{cav.site}": cav for cav in _cavs(column, alias, reading, division, manner, target)}
    return CAVs(
        cavs=found,
        level=level,
        pool=pool,
        groups=groups or group_column(run),
        seed=seed,
        strength=strength,
        origin={"run": run.uid, "model": {name: value for name, value in run.model.items() if name != "config"}},
    )


def _check(kind: str, pool: str, target: str | None, test_share: float, strength: float, null: int) -> None:
    """CAVError for options that are none."""
    for name, value, known in (("kind", kind, get_args(CAVKind)), ("pool", pool, get_args(Pool))):
        if value not in known:
            raise CAVError(f"{name} is one of {', '.join(known)}, not {value!r}")
    if (kind == "mean_gradient") != (target is not None):
        raise CAVError("kind='mean_gradient' and target= need each other: the other kinds are made of states, not of gradients")
    if not 0 <= test_share < 1 or strength < 0 or null < 0:
        raise CAVError(
            f"test_share is at least 0 and below 1, strength and null at least 0; got {test_share}, {strength} and {null}"
        )


def _of_tokens(chosen: Sequence[Choice | str | None]) -> list[Column]:
    """The columns of labels that are of tokens (or their like)."""
    columns = [one.column for one in chosen if isinstance(one, Choice)]
    return [column for column in columns if column.table != "example"]


def _cavs(column: Column, alias: Alias, reading: Reading, division: Division, manner: Manner, target: str | None) -> list[CAV]:
    """Those of one site."""
    normals = fit(reading, division, manner, site_of(column))
    tested = _tested(reading, division, normals, manner) if target is None else [(float("nan"),) * 3] * len(normals)
    return [
        CAV(
            concept=side.concept,
            against=side.against,
            site=site_of(column),
            stack=alias.stack,
            layer=alias.layer,
            kind=manner.kind,
            vector=normal.vector,
            bias=normal.bias,
            raw_norm=normal.norm,
            accuracy=accuracy,
            auc=auc,
            train_accuracy=train_accuracy,
            concept_rows=side.size,
            against_rows=side.count - side.size,
            test_rows=0 if target else int(side.tested.sum()),
            null=normal.null,
            shuffled=side.shuffled,
            target=target,
        )
        for side, normal, (accuracy, auc, train_accuracy) in zip(division.sides, normals, tested, strict=True)
    ]


def _tested(reading: Reading, division: Division, normals: Sequence[Normal], manner: Manner) -> list[tuple[float, float, float]]:
    """Accuracy and AUC on held-out rows, and accuracy on those fitted to, of each concept; one more reading."""
    rows = reading.rows({}, division.wanted)
    dots = Dots(np.stack([normal.vector for normal in normals], 1), shift_of(rows.first_block()))
    [[products]] = sweep([Job(rows, (dots,))], manner.executor, title="trying")
    return [
        _measured(products[:, number] + normal.bias, side.labels[division.wanted], side.fitted[division.wanted])
        for number, (side, normal) in enumerate(zip(division.sides, normals, strict=True))
    ]


def _measured(scores: Array, labels: Array, fitted: Array) -> tuple[float, float, float]:
    """Accuracy and area under the ROC curve on rows with a label that were not fitted to, and accuracy on those that were."""
    from sklearn.metrics import roc_auc_score  # slow to import

    tested = (labels >= 0) & ~fitted
    both = len(np.unique(labels[tested])) == 2
    right = (scores > 0) == (labels == 1)
    auc = float(roc_auc_score(labels[tested], scores[tested])) if both else float("nan")
    return float(right[tested].mean()) if both else float("nan"), auc, float(right[fitted].mean())
