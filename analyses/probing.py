"""Linear probes: how well a label can be read off each site by a linear classifier.

P(y | h) = softmax(W h + b), fitted by scikit-learn's multinomial logistic regression on standardised features (Alain & Bengio 2016,
arXiv 1610.01644). The split is by document, never by token: windows of one document leak into one another. Accuracy stands beside
two baselines that look at no activation: the majority class, and the most frequent label of a token's type (`type_lookup`). A probe
that does not beat the look-up has read the token, not its context; and failure of a linear probe is not absence of the information.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tensortape.stores import Column, Run, Table, names
from tensortape.stores.dtypes import Array
from tensortape.stores.patterns import Alias

from .errors import LabelError
from .results import ProbeReport, ProbeScore

MISSING = -100
DOCUMENT = "example/document"


def fit_probes(
    run: Run,
    *,
    labels: str,
    sites: str | Sequence[str] = "resid_post",
    groups: str | None = None,
    test_share: float = 0.25,
    max_rows: int = 20_000,
    seed: int = 0,
) -> ProbeReport:
    """Fit one linear probe per site for one column of token labels.

    Args:
        run: an open run.
        labels: a column of the token table, or of the table of a sample of tokens; -100 and empty text are missing.
        sites: which recorded sites; see `Run.select`.
        groups: the example column whose values must not be split between training and test; by default `example/document` where
            there is one, else each example is its own group.
        test_share: share of the groups that is held out.
        max_rows: at most so many rows, a seeded sample, are used for fitting, and as many for testing; they are held in memory.
        seed: of the split, the sample and the solver.

    Raises:
        LabelError: fewer than two classes, fewer than two groups, or sites that are recorded on other rows than the labels.
        UnknownColumnError: no such column or site.
    """
    table = run.tables[names.split(run[labels].name)[0]]
    columns = _on_rows_of(table, run.select(sites))
    y, rows = _labelled(run[labels])
    owner = _groups(run, groups)[_examples(table)[rows]]
    train, test = _split(rows, owner, test_share, max_rows, seed)
    of_row = dict(zip(rows.tolist(), y.tolist(), strict=True))
    known, held_out = (np.array([of_row[row] for row in part]) for part in (train.tolist(), test.tolist()))
    types = table.get("input_ids")
    return ProbeReport(
        labels=labels,
        classes=tuple(sorted(set(map(str, known)))),
        scores=tuple(_score(run, column, train, test, known, held_out, seed) for column in columns),
        majority=float(np.mean(held_out == _most_common(known))),
        type_lookup=None if types is None else _type_lookup(types.rows(train), known, types.rows(test), held_out),
        train_rows=len(train),
        test_rows=len(test),
        seed=seed,
    )


def _labelled(column: Column) -> tuple[Array, Array]:
    """(labels, token rows) where a label is not missing."""
    values = column.rows()
    rows = np.flatnonzero(values != ("" if values.dtype == object else MISSING))
    if len(set(values[rows].tolist())) < 2:
        raise LabelError(f"labels {column.name!r} have fewer than two classes; a probe needs at least two")
    return values[rows], rows


def _on_rows_of(table: Table, columns: list[Column]) -> list[Column]:
    """The columns; LabelError if one has its values on other rows."""
    for column in columns:
        other = names.split(column.name)[0]
        if other != table.name:
            raise LabelError(
                f"{column.name!r} has values on the rows of {other!r}, the labels on those of {table.name!r}; give labels of "
                f"{other!r}, or select other sites"
            )
    return columns


def _examples(table: Table) -> Array:
    """Example of every row."""
    lengths = np.maximum(table.lengths, 0)
    return np.repeat(np.arange(len(lengths)), lengths)


def _groups(run: Run, name: str | None) -> Array:
    """A group number per example."""
    if name is None and DOCUMENT.partition("/")[2] not in run.tables["example"]:
        return np.arange(len(run))
    return np.asarray(pd.factorize(run[name or DOCUMENT].rows())[0])


def _split(rows: Array, owner: Array, test_share: float, most: int, seed: int) -> tuple[Array, Array]:
    if len(np.unique(owner)) < 2:
        raise LabelError(
            "all labelled tokens belong to one group, so nothing can be held out; record more documents or give groups="
        )
    train, test = next(GroupShuffleSplit(1, test_size=test_share, random_state=seed).split(rows, groups=owner))
    random = np.random.default_rng(seed)
    return _sample(rows[train], most, random), _sample(rows[test], most, random)


def _sample(rows: Array, most: int, random: np.random.Generator) -> Array:
    return rows if len(rows) <= most else np.sort(random.choice(rows, most, replace=False))


def _score(run: Run, column: Column, train: Array, test: Array, known: Array, held_out: Array, seed: int) -> ProbeScore:
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, random_state=seed))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe.fit(_features(column, train), known)
    predicted = probe.predict(_features(column, test))
    alias = next((alias for alias in run.aliases(column) if alias.layer is not None), Alias("", ""))
    return ProbeScore(
        site=column.name.partition("/")[2],
        stack=alias.stack,
        layer=alias.layer,
        accuracy=float(np.mean(predicted == held_out)),
        macro_f1=float(f1_score(held_out, predicted, average="macro", zero_division=0)),
        converged=not any(issubclass(warning.category, ConvergenceWarning) for warning in caught),
    )


def _features(column: Column, rows: Array) -> Any:
    return column.rows(rows).reshape(len(rows), -1).astype(np.float32)


def _most_common(labels: Array) -> Any:
    return pd.Series(labels).mode()[0]


def _type_lookup(train: Array, known: Array, test: Array, held_out: Array) -> float:
    """Accuracy of each token type's most frequent training label, the majority class for types never seen."""
    frequent = pd.DataFrame({"type": train, "label": known}).groupby("type")["label"].agg(lambda found: found.mode()[0])
    predicted = pd.Series(test).map(frequent).fillna(_most_common(known))
    return float(np.mean(predicted.to_numpy() == held_out))
