"""Normals of one site for concepts and their random sets, all in the same readings."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tensortape.stores.derived import Derived
from tensortape.stores.dtypes import Array

from . import logistic
from .cavs import CAVKind
from .closed import lda_directions
from .directions import SetSums, SetTotals
from .divisions import Division, Side
from .errors import CAVError
from .gram import Gram, Sums, shift_of
from .readings import Reading
from .rows import Rows
from .sweep import Job, sweep
from .tasks import Probe, Selection, Task

TOLERANCE = 1e-9  # of the objective: a direction is off by about the root of it


@dataclass(frozen=True)
class Manner:
    """How to fit: what, with what penalty, by whom, and where sums are kept."""

    kind: CAVKind
    strength: float
    executor: Executor | None
    kept: Derived | None


@dataclass(frozen=True)
class Normal:
    """A concept's vector of length 1, its bias, its length before, and the vectors of its random sets [M, d]."""

    vector: Array
    bias: float
    norm: float
    null: Array


def fit(reading: Reading, division: Division, manner: Manner, site: str) -> list[Normal]:
    """One for each concept. CAVError where there is none."""
    raw = _logistic(reading, division, manner) if manner.kind == "logistic" else _closed(reading, division, manner)
    return [_unit(*one, side, site) for one, side in zip(raw, division.sides, strict=True)]


def _unit(weights: Array, bias: float, side: Side, site: str) -> Normal:
    """Weights [1 + M, d] as vectors of length 1."""
    norms = np.linalg.norm(weights, axis=1)
    if not (norms[0] > 0 and np.isfinite(norms).all()):
        raise CAVError(
            f"{side.concept!r} has no direction at {site!r}: the mean of its rows is that of {side.against!r}, or there are values "
            "that are not finite; leave out the site"
        )
    units = weights / np.maximum(norms, np.finfo(float).tiny)[:, None]
    return Normal(units[0], bias / float(norms[0]), float(norms[0]), units[1:].astype(np.float32))


def _closed(reading: Reading, division: Division, manner: Manner) -> list[tuple[Array, float]]:
    """Of each concept the weights of all its sets, and the bias: half-way between both means."""
    rows = reading.rows(
        {_sets(number): side.sets for number, side in enumerate(division.sides)} | _cohorts(division), division.wanted
    )
    shift = shift_of(rows.first_block()) if reading.weight is None else np.zeros(reading.width)
    sets = [SetSums(shift, _sets(number), side.size) for number, side in enumerate(division.sides)]
    grams = _grams(rows, division, shift) if manner.kind == "lda" else {}
    [found] = sweep([Job(rows, (*sets, *grams.values()))], manner.executor, kept=manner.kept, title="summing")
    totals, sums = found[: len(sets)], dict(zip(grams, found[len(sets) :], strict=True))
    return [_from_totals(one, sums.get(cohort), manner) for one, cohort in zip(totals, division.cohorts, strict=True)]


def _from_totals(totals: SetTotals, sums: Sums | None, manner: Manner) -> tuple[Array, float]:
    if manner.kind == "mean_gradient":
        return totals.means, float("nan")
    weights = totals.differences if sums is None else lda_directions(sums, totals.differences, manner.strength)
    return weights, -float(weights[0] @ (totals.means[0] + totals.rest[0])) / 2


def _logistic(reading: Reading, division: Division, manner: Manner) -> list[tuple[Array, float]]:
    """The same at the optimum of logistic regression; those of the same rows share their scales and every matrix product."""
    names = [[f"{_sets(number)}.{one}" for one in range(side.sets.shape[1])] for number, side in enumerate(division.sides)]
    tags = {name: side.sets[:, n] for some, side in zip(names, division.sides, strict=True) for n, name in enumerate(some)}
    rows = reading.rows(tags | _cohorts(division), division.wanted)
    shift = shift_of(rows.first_block())
    grams = _grams(rows, division, shift)
    [found] = sweep([Job(rows, tuple(grams.values()))], manner.executor, kept=manner.kept, title="summing")
    sums = dict(zip(grams, found, strict=True))
    fits = []
    for number, (some, side, cohort) in enumerate(zip(names, division.sides, division.cohorts, strict=True)):
        here = Selection(_rows(cohort))
        for name in some:
            like = None if name == some[0] else f"random sets of {number}"
            fits.append(logistic.Fit(Task(name, 2, here, here), side.count, sums[cohort], manner.strength, TOLERANCE, like))
    probes = logistic.fit(rows, fits, manner.executor)
    return [_from_probes(probes[first:last]) for first, last in pairwise(np.cumsum([0, *map(len, names)]))]


def _from_probes(probes: Sequence[Probe]) -> tuple[Array, float]:
    weights = np.stack([probe.weights[:, 1] - probe.weights[:, 0] for probe in probes])
    return weights, float(probes[0].bias[1] - probes[0].bias[0] - probes[0].center @ weights[0])


def _grams(rows: Rows, division: Division, shift: Array) -> dict[int, Gram]:
    """The sums that each cohort of concepts shares."""
    return {
        cohort: Gram(shift, Selection(_rows(cohort)), rows.key("gram", division.sides[cohort].fitted, shift))
        for cohort in dict.fromkeys(division.cohorts)
    }


def _cohorts(division: Division) -> dict[str, Array]:
    """Tags of the rows that each cohort is fitted to."""
    fitted = {cohort: division.sides[cohort].fitted for cohort in dict.fromkeys(division.cohorts)}
    return {_rows(cohort): np.where(here, 0, -1).astype(np.int8) for cohort, here in fitted.items()}


def _sets(number: int) -> str:
    return f"sets {number}"


def _rows(cohort: int) -> str:
    return f"rows {cohort}"
