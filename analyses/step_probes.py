"""Probes step by step: what can be read off a model while it learns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensortape.stores import Run
from tensortape.stores.dtypes import Array

from .probe_report import LabelSet, ProbeReport, ProbeScore
from .probing import fit_probes
from .results import Result
from .rows import Pool
from .step_examples import PHASE, step_examples
from .study import Kind

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class ProbeSteps(Result):
    """Probes of the same examples at each of some steps.

    Args:
        steps: training steps [step]. reports: what `fit_probes` says of each.
        examples: how many were probed at each step. phase: of these examples.
    """

    steps: Array
    reports: tuple[ProbeReport, ...]
    examples: int
    phase: str

    @property
    def sets(self) -> tuple[LabelSet, ...]:
        """The sets of labels, the same at every step."""
        return self.reports[0].sets

    def scores(self, labels: str) -> tuple[tuple[ProbeScore, ...], ...]:
        """For each step the scores of all sites for a set of labels."""
        return tuple(tuple(score for score in report.scores if score.labels == labels) for report in self.reports)

    def accuracy(self, labels: str) -> Array:
        """Of a set of labels; [step, site]."""
        return np.array([[score.accuracy for score in scores] for scores in self.scores(labels)])

    def to_pandas(self) -> pd.DataFrame:
        """One row per step, set of labels and site."""
        import pandas as pd

        frames = [report.to_pandas() for report in self.reports]
        found = pd.concat(frames, ignore_index=True)
        found.insert(0, "step", np.repeat(self.steps, [len(frame) for frame in frames]))
        return found

    def plot(self) -> Figure:
        """Accuracy as a heat map, layer by step, one per set of labels. Needs the extra `plots`."""
        from .figures.steps import probe_steps_figure

        return probe_steps_figure(self)

    def __repr__(self) -> str:
        said = "; ".join(self._said(one) for one in self.sets)
        return f"<ProbeSteps over {len(self.steps)} steps, {self.examples} examples of phase {self.phase!r}; {said}>"

    def _said(self, one: LabelSet) -> str:
        first, last = (report.best(one.name) for report in (self.reports[0], self.reports[-1]))
        return (
            f"{one.name}: best {first.accuracy:.3f} at step {self.steps[0]}, {last.accuracy:.3f} at step {self.steps[-1]} "
            f"(majority {one.majority:.3f})"
        )


def probe_steps(
    run: Run,
    labels: str | Sequence[str],
    sites: str | Sequence[str] = "resid_post",
    *,
    phase: str = PHASE,
    steps: Iterable[int] | None = None,
    fit: Kind = "exact",
    control: bool = False,
    level: str | None = None,
    pool: Pool = "mean",
    groups: str | None = None,
    test_share: float = 0.25,
    folds: int | None = None,
    strength: float = 1.0,
    bootstrap: int = 1000,
    seed: int = 0,
    executor: Executor | None = None,
    keep: bool = True,
) -> ProbeSteps:
    """Fit the probes of `fit_probes` at each step of a training, on the same examples, split between training and test alike.

    Step 0 is the model before training: what is read off its sites is owed to the input and the architecture, not to learning.

    Args:
        run: an open run of a training, with the same examples recorded again and again.
        labels: columns of labels, recorded with these examples.
        sites: which recorded sites; see `Run.select`.
        phase: of these examples; a probe set's by default. They are matched by id, and those that some step lacks are left out.
        steps: which training steps; all that have the phase if not given.
        fit, control, level, pool, groups, test_share, folds, strength, bootstrap, seed, executor, keep: as for `fit_probes`.

    Raises:
        StepError: no such phase or step, or no example that is at all of them. LabelError, UnknownColumnError: as `fit_probes`.
    """
    named = [labels] if isinstance(labels, str) else list(labels)
    examples = step_examples(run, [*run.select(sites), *(run[name] for name in named)], phase, steps)
    reports = [
        fit_probes(
            run, labels=named, sites=sites, examples=numbers, fit=fit, control=control, level=level, pool=pool, groups=groups,
            test_share=test_share, folds=folds, strength=strength, bootstrap=bootstrap, seed=seed, executor=executor, keep=keep,
        )
        for numbers in examples.numbers
    ]  # fmt: skip
    return ProbeSteps(examples.steps, tuple(reports), examples.numbers.shape[1], phase)
