"""Testing with concept activation vectors: does a target of the model grow along a concept? (Kim et al. 2018, arXiv 1711.11279)"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Literal

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array

from .cavs import CAV, CAVs, check_width
from .concept_sets import Choice, Said, choice
from .errors import CAVError, DegenerateGradientsError, LabelError
from .readings import Reading, gradients, site_of
from .sensitivities import Sensitivities, Sensitivity
from .significance import discovery_rates, permutation_p
from .sweep import Job, sweep
from .tcav_report import TCAV, TCAVScore, scored


def tcav(
    run: Run,
    cavs: CAVs | Sequence[CAVs],
    *,
    target: str,
    examples: Said | Sequence[int] | Array | None = None,
    sites: str | Sequence[str] | None = None,
    assume: Literal["sum"] | None = None,
    executor: Executor | None = None,
) -> TCAV:
    """Test whether a target of the model changes along concepts, by its gradients at the sites of their vectors.

    Where states of tokens were averaged, a target's slope along a vector v of that average is the sum of gradient * v over the
    example's tokens: moving the average by v moves each token by v. Where the first or last token stands for all, only its gradient
    counts. Of vectors of tokens (or words), each token (or word) is a row of its own.

    Each vector is held against those of the random sets it was fitted with (`null` of `fit_cavs`): p is the share of these, the
    concept itself among them, whose sign count is at least as far from 1/2.

    Args:
        run: with gradients of the target at the sites; it need not be the run that the vectors were fitted on.
        cavs: of `fit_cavs`, or several of them.
        target: what was differentiated.
        examples: those of the class that is tested, as `example/label=asyncio`; or their numbers, or a mask; all by default.
        sites: only the vectors at these: their names, or patterns of sites of the run, as for `Run.select`.
        assume: `sum` takes gradients of an undeclared reduction as they are.
        executor: who reads and computes; see `sweep`.

    Raises:
        UnknownColumnError: no gradients of that target at a site.
        GradientError: nobody has said how the target joins its examples.
        DegenerateGradientsError: all rows of a site have the same gradient, or none.
        CAVError: vectors of mean gradients beside others, rows of different kinds, or another width.
        LabelError: fewer than two rows.
    """
    several = [cavs] if isinstance(cavs, CAVs) else list(cavs)
    chosen = [cav for one in several for cav in one]
    _check(several, chosen)
    level, pool = several[0].level, several[0].pool
    if sites is not None:
        chosen = _at(run, chosen, [sites] if isinstance(sites, str) else sites)
    which = choice(run, examples) if isinstance(examples, (str, tuple)) else examples
    labels = [which.column] if isinstance(which, Choice) and which.column.table != "example" else []
    at = {site: gradients(run, site, target, level, pool, assume, labels) for site in dict.fromkeys(cav.site for cav in chosen)}
    tests = {site: _Test(reading, [cav for cav in chosen if cav.site == site], level, which) for site, reading in at.items()}
    found = sweep([test.job() for test in tests.values()], executor, title="testing")
    scores = [score for test, [one] in zip(tests.values(), found, strict=True) for score in test.scores(one)]
    rates = zip(scores, *(discovery_rates([getattr(score, name) for score in scores]) for name in ("p", "p_mean")), strict=True)
    first = next(iter(tests.values()))
    return TCAV(
        scores=tuple(replace(score, p_fdr=sign, p_mean_fdr=mean) for score, sign, mean in rates),
        target=target,
        examples=which.name if isinstance(which, Choice) else "all examples" if which is None else "chosen examples",
        owner=first.reading.space.owner[first.wanted],
        level=level,
        pool=pool,
        origin=run.uid,
    )


def _at(run: Run, cavs: Sequence[CAV], sites: Sequence[str]) -> list[CAV]:
    """Those at some sites; CAVError for none."""
    known = dict.fromkeys(cav.site for cav in cavs)
    patterns = [site for site in sites if site not in known]
    wanted = {*sites, *(map(site_of, run.select(patterns)) if patterns else ())}
    found = [cav for cav in cavs if cav.site in wanted]
    if not found:
        raise CAVError(f"no CAV is at {', '.join(map(repr, sites))}; there are CAVs at {', '.join(known)}")
    return found


class _Test:
    """The vectors of one site, and the gradients there."""

    def __init__(self, reading: Reading, cavs: Sequence[CAV], level: str, which: Choice | Sequence[int] | Array | None) -> None:
        self.reading, self.cavs = reading, cavs
        self.wanted = _rows(reading, level, which)
        self.vectors = np.stack([cav.vector for cav in cavs], 1)
        check_width(self.vectors, reading.width, cavs[0].site)

    def job(self) -> Job:
        """What is to be read."""
        random = np.concatenate([cav.null for cav in self.cavs]).T
        return Job(self.reading.rows({}, self.wanted), (Sensitivities(self.vectors, random),))

    def scores(self, found: Sensitivity) -> list[TCAVScore]:
        """One for each vector."""
        _check_spread(found.spread, self.reading.column)
        bounds = np.cumsum([0, *(len(cav.null) for cav in self.cavs)])
        scores = []
        for number, cav in enumerate(self.cavs):
            here = slice(bounds[number], bounds[number + 1])
            dots, positive, mean = found.dots[:, number], found.positive[here], found.mean[here]
            p = permutation_p(float((dots > 0).mean()), positive, 0.5), permutation_p(float(dots.mean()), mean, 0.0)
            scores.append(scored(cav, dots, positive, mean, p))
        return scores


def _rows(reading: Reading, level: str, which: Choice | Sequence[int] | Array | None) -> Array:
    """Which rows are of the examples that are tested; bool."""
    owner = reading.space.owner
    if isinstance(which, Choice):
        found: Array = which.of(reading.space, level) == 1
    else:
        mask = np.zeros(len(reading.space.run), bool)
        mask[slice(None) if which is None else np.asarray(which)] = True
        found = mask[owner]
    if found.sum() < 2:
        count = int(found.sum())
        raise LabelError(f"{count} rows with gradients at {reading.column.name!r} are of these examples; at least 2 are needed")
    return found


def _check(several: Sequence[CAVs], cavs: Sequence[CAV]) -> None:
    """CAVError for vectors that do not belong in one table."""
    kinds = {cav.kind for cav in cavs}
    if "mean_gradient" in kinds and len(kinds) > 1:
        raise CAVError(
            f"the vectors are of the kinds {', '.join(sorted(kinds))}: mean gradients say what the model is sensitive to, the "
            "others where a concept lies, so their scores do not compare; test them in tables of their own"
        )
    rows = {(one.level, one.pool) for one in several}
    if len(rows) != 1:
        raise CAVError(f"vectors of different rows do not go into one table: they are of (level, pool) {sorted(rows)}")


def _check_spread(spread: float, column: Column) -> None:
    """DegenerateGradientsError for gradients that differ by no more than rounding would make them; CAVError if not finite."""
    if np.isinf(spread):
        raise CAVError(f"gradients of {column.name!r} are not finite; leave out their examples or give other sites=")
    if np.isnan(spread):
        raise DegenerateGradientsError(
            f"all gradients of {column.name!r} are 0: the target does not depend on this site or these tokens; give other sites="
        )
    if spread < (0.03 if column.dtype.itemsize <= 2 else 1e-4):
        raise DegenerateGradientsError(
            f"every row of {column.name!r} has the same gradient (they differ by {spread:.1g} of their length), as behind the last "
            "nonlinearity of a model: every vector then has a sign count of 0 or 1, whatever its concept; give other sites="
        )
