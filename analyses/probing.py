"""Linear probes: how well labels can be read off each site by a linear classifier (Alain & Bengio 2016, arXiv 1610.01644)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array
from tensortape.stores.patterns import Alias

from . import controls
from .errors import LabelError
from .examples import Examples, example_mask
from .probe_report import LabelSet, ProbeReport, ProbeScore
from .rows import Pool
from .spaces import Labels, group_column, read_labels, space
from .splits import split
from .study import Kind, Manner, Study
from .tasks import CELL, Probe
from .trials import GROUP, Trial


def fit_probes(
    run: Run,
    *,
    labels: str | Sequence[str],
    sites: str | Sequence[str] = "resid_post",
    fit: Kind = "exact",
    control: bool = False,
    mdl: bool = False,
    baseline: Run | None = None,
    level: str | None = None,
    pool: Pool = "mean",
    groups: str | None = None,
    test_share: float = 0.25,
    folds: int | None = None,
    strength: float = 1.0,
    bootstrap: int = 1000,
    examples: Examples = None,
    seed: int = 0,
    executor: Executor | None = None,
    keep: bool = True,
) -> ProbeReport:
    """Fit one linear probe per site for each set of labels. All sets, controls and folds share each reading of a site.

    Args:
        run: an open run.
        labels: columns of labels, of the rows of the sites or of examples; -100 and empty text are missing.
        sites: which recorded sites; see `Run.select`.
        fit: `exact` is logistic regression at its optimum: mean cross-entropy + strength |W|^2 / (2 n) of standardised features.
            `lda` and `ridge` are closed forms that need a single reading.
        control: also fit a control task, in which each token type has a random label (Hewitt & Liang 2019); its accuracy is what
            memory of types alone gives.
        mdl: also measure the bits of an online code of the training labels (Voita & Titov 2020), by logistic regression.
        baseline: the same examples recorded from a model that was not trained; its accuracy is reported beside.
        level: what a row is: `token`, `example` (tokens pooled), or a column that numbers words or spans within an example, of
            which consecutive equal numbers are pooled and negative ones left out. By default what the labels are of.
        pool: how tokens are joined: `first`, `last` or `mean`.
        groups: the example column whose values must not be split between training and test; by default `example/document` where
            there is one, else each example is its own group.
        test_share: about this share of the rows is held out.
        folds: instead, test on each of so many folds, trained on the others. `probe` is then the last fold's.
        strength: of the penalty; 1 / C of scikit-learn.
        bootstrap: draws for the interval of the accuracy.
        examples: so many, drawn by `seed`; numbers of examples (as of `run.where`); or a mask. All if not given. Of a baseline,
            those with the same ids.
        seed: of the split, the control task and the draws.
        executor: who reads and computes; see `sweep`.
        keep: keep sums in the run, so that they are not computed twice.

    Raises:
        LabelError: fewer than two classes or groups, or sites that are recorded on other rows than the labels.
        UnknownColumnError: no such column or site.
    """
    names = [labels] if isinstance(labels, str) else list(labels)
    columns, label_columns = run.select(sites), [run[name] for name in names]
    if not 0 < test_share < 1 or (folds is not None and folds < 2):
        raise ValueError(f"test_share={test_share} is a share between 0 and 1, and folds={folds} at least 2")
    if mdl and (folds is not None or fit != "exact"):
        raise LabelError("an online code is sent in order, by logistic regression: mdl=True needs fit='exact' and no folds")
    manner = Manner(fit, strength, executor, keep)
    here = example_mask(run, examples, seed)
    rows = space(run, columns, label_columns, level, pool, here)
    of_groups = rows.groups(groups)
    parts = split(of_groups, rows.owner, test_share=test_share, folds=folds, blocks=mdl, seed=seed)
    study = Study(rows, parts, {CELL: parts.of_row, GROUP: np.unique(of_groups, return_inverse=True)[1][rows.owner]})
    sets = [
        _Set(study, replace(read_labels(rows, column), name=name), control=control, mdl=mdl, seed=seed)
        for name, column in zip(names, label_columns, strict=True)
    ]
    fitted = {column.name: study.fit(column, manner) for column in columns}
    untrained = None if baseline is None else fit_probes(
        baseline, labels=names, sites=sites, fit=fit, level=level, pool=pool, groups=groups, test_share=test_share, folds=folds,
        strength=strength, bootstrap=0, examples=_alike(baseline, run, here), seed=seed, executor=executor, keep=keep,
    )  # fmt: skip
    found = [one.score(run, column, fitted[column.name], bootstrap) for one in sets for column in columns]
    return ProbeReport(
        sets=tuple(one.described() for one in sets),
        scores=tuple(found if untrained is None else _beside(found, untrained)),
        fit=fit,
        groups=groups or group_column(run),
        level=rows.level,
        seed=seed,
    )


class _Set:
    """One set of labels: its tasks in a study, and what their results say together."""

    def __init__(self, study: Study, labels: Labels, *, control: bool, mdl: bool, seed: int) -> None:
        self._study, self._labels, self._seed = study, labels, seed
        self._real = study.add(labels.name, labels, labels.name)
        self._types = study.space.types()
        self._control = study.add(f"{labels.name} control", self._control_task(), labels.name) if control else None
        self._code = study.add_code(labels.name, labels) if mdl else None

    def score(self, run: Run, column: Column, fitted: Sequence[tuple[Probe, Trial]], bootstrap: int) -> ProbeScore:
        """How one site does."""
        tested = reduce(add, (one for _, one in fitted[self._real]))
        low, high = tested.interval(bootstrap, self._seed)
        alias = next((alias for alias in run.aliases(column) if alias.layer is not None), Alias("", ""))
        bits, compression = (None, None) if self._code is None else self._online(fitted[self._code])
        return ProbeScore(
            labels=self._labels.name,
            site=column.name.partition("/")[2],
            stack=alias.stack,
            layer=alias.layer,
            accuracy=tested.accuracy,
            low=low,
            high=high,
            macro_f1=tested.macro_f1,
            f1=tested.f1,
            cross_entropy=tested.nats / tested.rows / np.log(2),
            probe=fitted[self._real][-1][0],
            control=None if self._control is None else reduce(add, (one for _, one in fitted[self._control])).accuracy,
            bits=bits,
            compression=compression,
        )

    def described(self) -> LabelSet:
        """The labels, and baselines that see no activation; of all folds together."""
        of_row, tags = self._labels.of_row, self._study.tags
        pairs = [(task.trained.rows(tags), task.tested.rows(tags)) for task in self._study.tasks[self._real]]
        tested = np.array([test.sum() for _, test in pairs])
        majority = [controls.majority(of_row[train], of_row[test]) for train, test in pairs]
        lookup = [self._looked_up(train, test) for train, test in pairs] if self._types is not None else None
        return LabelSet(
            name=self._labels.name,
            classes=self._labels.classes,
            train_rows=int(pairs[-1][0].sum()),
            test_rows=int(tested.sum()),
            majority=float(np.average(majority, weights=tested)),
            type_lookup=None if lookup is None else float(np.average(lookup, weights=tested)),
        )

    def _looked_up(self, train: Array, test: Array) -> float:
        of_row, types = self._labels.of_row, self._types
        assert types is not None
        return controls.type_lookup(types[train], of_row[train], types[test], of_row[test])

    def _control_task(self) -> Labels:
        if self._types is None:
            raise LabelError(
                "a control task gives each token type a random label, but these rows have no types: they are of examples, or the "
                "run has no input_ids; leave out control=True"
            )
        return replace(self._labels, of_row=controls.control_labels(self._labels, self._types, self._seed))

    def _online(self, fitted: Sequence[tuple[Probe, Trial]]) -> tuple[float, float]:
        """Bits of the code, and how many times shorter it is than a uniform one."""
        first = int(self._study.tasks[self._code][0].trained.rows(self._study.tags).sum())  # type: ignore[index]
        classes = len(self._labels.classes)
        bits = controls.code_bits(first, classes, [tested.nats for _, tested in fitted])
        rows = first + sum(tested.rows for _, tested in fitted)
        return bits, float(rows * np.log2(classes) / bits)


def _beside(scores: Sequence[ProbeScore], untrained: ProbeReport) -> list[ProbeScore]:
    accuracy = {(score.labels, score.site): score.accuracy for score in untrained.scores}
    return [replace(score, random_init=accuracy.get((score.labels, score.site))) for score in scores]


def _alike(other: Run, run: Run, here: Array) -> Array:
    """The examples of another run whose ids those chosen of this one have, all where all are chosen; bool."""
    if here.all():
        return np.ones(len(other), bool)
    chosen = {id_ for id_, wanted in zip(run.ids, here.tolist(), strict=True) if wanted}
    return np.array([id_ in chosen for id_ in other.ids], bool)
