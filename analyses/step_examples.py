"""The examples of a phase, step by step: what is compared when a training is looked at across its steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array

from .errors import StepError

PHASE = "probe"  # what a probe set is recorded as
Numbers = dict[str | int, int]  # of the examples of one step, by id


@dataclass(frozen=True)
class StepExamples:
    """Examples that each of some steps has, by id.

    Args:
        steps: training steps, in order; int64 [step].
        numbers: of the examples in the run, in the same order of ids at every step; int64 [step, example].
    """

    steps: Array
    numbers: Array

    def at(self, step: int) -> Array:
        """Numbers of the examples at a step; int64 [example]."""
        found: Array = self.numbers[int(np.searchsorted(self.steps, step))]
        return found


def step_examples(run: Run, columns: Sequence[Column], phase: str = PHASE, steps: Iterable[int] | None = None) -> StepExamples:
    """The examples that have all of some columns at every step, matched by id within a phase.

    Args:
        run: an open run.
        columns: what they have to have.
        phase: a phase that records the same examples again and again, as a probe set does.
        steps: which training steps; all of the phase if not given.

    Raises:
        StepError: no such phase or step, or no example that is at all of them.
    """
    by_step = _by_step(run, columns, phase)
    asked = sorted(by_step if steps is None else {int(step) for step in steps})
    missing = [step for step in asked if step not in by_step]
    if missing or not asked:
        raise StepError(
            f"nothing of phase {phase!r} is recorded of the sites at step {missing[0] if missing else '(none asked for)'}; it has "
            f"{_listed(sorted(by_step))}"
        )
    first, *others = (by_step[step] for step in asked)
    common = [id_ for id_ in first if all(id_ in other for other in others)]
    if not common:
        raise StepError(
            f"no example of phase {phase!r} is recorded at each of the steps {_listed(asked)}; steps are compared on examples that "
            "all of them have: record a probe set (tensortape.instrument.ProbeSet), or give the steps= that have some in common"
        )
    return StepExamples(np.array(asked), np.array([[by_step[step][id_] for id_ in common] for step in asked]))


def _by_step(run: Run, columns: Sequence[Column], phase: str) -> dict[int, Numbers]:
    """The examples of a phase that have all of some columns; StepError if there are none."""
    here = np.logical_and.reduce([column.present for column in columns])
    found: dict[int, Numbers] = {}
    for number, (id_, of, step) in enumerate(run.keys):
        if of == phase and here[number]:
            found.setdefault(step, {})[id_] = number
    if not found:
        phases = ", ".join(sorted({key[1] for key in run.keys})) or "none"
        raise StepError(
            f"the run has no example of phase {phase!r} with {', '.join(column.name for column in columns)}; its phases are "
            f"{phases}"
        )
    return found


def _listed(steps: Sequence[int], most: int = 10) -> str:
    """The first few steps, in words."""
    more = f", ... ({len(steps)} of them)" if len(steps) > most else ""
    return f"{', '.join(map(str, steps[:most]))}{more}"
