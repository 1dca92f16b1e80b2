"""How far sites move while a model trains: the same examples at each step, held against a reference and against the step before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array
from tensortape.stores.selection import site_name

from .aligned import Aligned, Side, rows_of, side
from .drift_report import AGAINST, MEASURES, Drift
from .errors import JoinError
from .gram import Gram, features, shift_of
from .layers import layer_of, short_name
from .rows import Pool
from .similarity import Estimate, linear_cka, minibatches, sampled, uses_formula
from .spaces import space
from .step_examples import PHASE, StepExamples, step_examples
from .sweep import Accumulator, Block, Job, sweep


def drift(
    run: Run,
    sites: str | Sequence[str] = "resid_post",
    *,
    phase: str = PHASE,
    steps: Iterable[int] | None = None,
    reference: int | None = None,
    level: str = "token",
    pool: Pool = "mean",
    estimate: Estimate = "auto",
    batches: int = 20,
    batch_rows: int = 512,
    seed: int = 0,
    executor: Executor | None = None,
) -> Drift:
    """What training does to sites, on examples that every step has: each step beside a reference step and beside the one before.

    `cka` is linear centred kernel alignment: 1 as long as rows are arranged alike, whatever rotation and scale. `cosine` is the
    mean, over rows, of the cosine of a row now and then, so it notices rotations too; it is not centred, and features that are far
    from zero in every row bring it near 1. `norm_ratio` is the mean norm of the rows now over that then. A step is read beside the
    two it is held against and no others, so memory does not grow with the steps.

    Args:
        run: an open run of a training, with the same examples recorded again and again.
        sites: which recorded sites; see `Run.select`.
        phase: of these examples; a probe set's by default. They are matched by id.
        steps: which training steps; all that have the phase if not given.
        reference: the step to compare with, any that is recorded; the first of `steps` if not given.
        level: what a row is: `token`, `example` (tokens pooled), or a column that numbers words or spans within an example.
        pool: how tokens are joined: `first`, `last` or `mean`.
        estimate, batches, batch_rows: how CKA is computed, as for `cka`, of three times a site's features at once: `auto` is the
            formula up to 1365 features, and else an estimate from the same minibatches of rows at every step.
        seed: of the minibatches.
        executor: who reads and computes; see `sweep`.

    Raises:
        StepError: no such phase or step, or no example that is at all of them. JoinError: an example has more rows at one step than
            at another. UnknownColumnError: no such site.
    """
    columns = run.select(sites)
    asked: list[int] = step_examples(run, columns, phase, steps).steps.tolist()
    reference = asked[0] if reference is None else reference
    examples = step_examples(run, columns, phase, {*asked, reference})
    how = _How(level, pool, estimate, batches, batch_rows, seed, executor)
    found = [_of_site(run, column, examples, asked, reference, how) for column in columns]
    measured = np.moveaxis(np.stack([one for one, _ in found]), -1, 0)
    return Drift(
        sites=tuple(str(site_name(column)) for column in columns),
        names=tuple(map(short_name, columns)),
        layers=tuple(map(layer_of, columns)),
        steps=np.array(asked),
        reference=reference,
        **dict(zip(MEASURES, measured, strict=True)),
        examples=examples.numbers.shape[1],
        rows=np.array([rows for _, rows in found]),
        phase=phase,
        level=level,
        seed=seed,
    )


class Moved(Accumulator):
    """Mean cosine of the rows of the first side with those of each other, and the ratio of the mean norms; [others, 2], float64.

    Rows of zeros have no direction, and are left out of the cosine.

    Args:
        sides: how many there are; their features, as many of each, lie side by side.
    """

    state = ("cosines", "directed", "norms")
    cosines: Array
    directed: Array
    norms: Array

    def __init__(self, sides: int) -> None:
        self.sides = sides

    def update(self, block: Block) -> None:
        """Take the rows of a block into account."""
        x = features(block).astype(np.float64).reshape(len(block.rows), self.sides, -1)
        norms = np.linalg.norm(x, axis=2)
        unit = x / np.where(norms == 0, 1, norms)[..., None]
        self.add("cosines", np.einsum("nd,nkd->k", unit[:, 0], unit[:, 1:]))
        self.add("directed", (norms[:, :1] * norms[:, 1:] != 0).sum(0))
        self.add("norms", norms.sum(0))

    def finalize(self) -> Array:
        """NaN where no row has a direction."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack([self.cosines / self.directed, self.norms[0] / self.norms[1:]], 1)


@dataclass(frozen=True)
class _How:
    """How sites are compared, as `drift` has been told."""

    level: str
    pool: Pool
    estimate: Estimate
    batches: int
    batch_rows: int
    seed: int
    executor: Executor | None


@dataclass(frozen=True)
class _Seen:
    """A site at one step: the examples' rows, in their order, and how many each has."""

    step: int
    side: Side
    lengths: Array


def _of_site(
    run: Run, column: Column, examples: StepExamples, steps: Sequence[int], reference: int, how: _How
) -> tuple[Array, int]:
    """The measures of a column [step, against, measure], NaN where there is no step before; and of how many rows they are."""
    found = np.full((len(steps), len(AGAINST), len(MEASURES)), np.nan)
    first = _seen(run, column, examples, reference, how)
    before: list[_Seen] = []
    for at, step in enumerate(steps):
        now = _seen(run, column, examples, step, how)
        _check_rows(run, examples, first, now)
        held = [first, *before]
        found[at, : len(held)] = _measured((now.side, *(one.side for one in held)), how)
        before = [now]
    return found, len(first.side.rows)


def _seen(run: Run, column: Column, examples: StepExamples, step: int, how: _How) -> _Seen:
    numbers = examples.at(step)
    found = space(run, [column], [], how.level, how.pool, np.isin(np.arange(len(run)), numbers))
    lengths = np.bincount(found.owner, minlength=len(run))[numbers]
    return _Seen(step, side(run, found, [column.name], rows_of(found, numbers)), lengths)


def _check_rows(run: Run, examples: StepExamples, one: _Seen, other: _Seen) -> None:
    differ = np.flatnonzero(one.lengths != other.lengths)
    if len(differ):
        at = differ[0]
        raise JoinError(
            f"example {run.ids[examples.at(one.step)[at]]!r} has {one.lengths[at]} rows at step {one.step} and {other.lengths[at]} "
            f"at step {other.step}; compare steps of the same tokens, or level='example'"
        )


def _measured(sides: tuple[Side, ...], how: _How) -> Array:
    """The measures of the first side beside each other one, [others, measure]."""
    source, moved = Aligned.whole(sides), Moved(len(sides))
    if uses_formula(how.estimate, "linear", sides):
        gram = Gram(shift_of(next(source.pieces()[0].blocks())))
        [[sums, rows]] = sweep([Job(source, (gram, moved))], how.executor, title="comparing")
        cka = linear_cka(sums, source.widths)
        error = np.full_like(cka, np.nan)
    else:
        cka, error = sampled(minibatches(sides, how.batches, how.batch_rows, how.seed), "linear", how.executor)
        [[rows]] = sweep([Job(source, (moved,))], how.executor, title="comparing")
    return np.column_stack([cka[0, 1:], error[0, 1:], rows])
