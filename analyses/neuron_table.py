"""What neurons come to: one row of numbers each, and the texts in which they are highest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tensortape.stores.dtypes import Array

from .moments import Attribution, Spread
from .passages import Passage
from .results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

By = Literal["importance", "selectivity", "deviation"]


@dataclass(frozen=True)
class TopExamples:
    """The rows in which each neuron is highest, highest first; of equal values the first rows.

    Args:
        values: [d, k]; as activations are computed with, so bfloat16 and float16 as float32.
        passage: where each is in `passages`; [d, k].
        passages: every row that any neuron has here, once, in the run's order.
    """

    values: Array
    passage: Array
    passages: tuple[Passage, ...]

    def of(self, neuron: int) -> list[Passage]:
        """The rows of one neuron, highest first."""
        return [self.passages[number] for number in self.passage[neuron].tolist()]

    def to_pandas(self) -> pd.DataFrame:
        """One row per neuron and rank."""
        import pandas as pd

        neurons, ranks = np.indices(self.values.shape)
        places = pd.DataFrame([vars(one) for one in self.passages]).iloc[self.passage.ravel()].reset_index(drop=True)
        numbers = pd.DataFrame({"neuron": neurons.ravel(), "rank": ranks.ravel(), "value": self.values.ravel()})
        return pd.concat([numbers, places], axis=1)


@dataclass(frozen=True)
class Selectivity:
    """How neurons differ between classes of rows.

    Args:
        labels, classes, rows: the column, its classes, and the rows of each [K].
        difference: mean of a class less that of the other classes' rows, in standard deviations of the neuron; [K, d].
        auc: area under the ROC curve of a class against the others, the neuron's value being the score; [K, d].
        auc_error: how far it may be off; 0 where all rows fitted in memory; [K].
        probeless: summed differences of the means of each two classes (Antverg & Belinkov 2022, arXiv 2110.07483); [d].
    """

    labels: str
    classes: tuple[str, ...]
    rows: Array
    difference: Array
    auc: Array
    auc_error: Array
    probeless: Array

    @property
    def strength(self) -> Array:
        """Distance of the AUC from 0.5, of the class that a neuron tells best; [d]."""
        found: Array = np.abs(self.auc - 0.5).max(0)
        return found


@dataclass(frozen=True, eq=False, repr=False)
class NeuronTable(Result):
    """Numbers of every neuron of a site: of every feature of its rows, numbered as they lie in memory.

    Args:
        site: its name. level: what a row is.
        spread: means, deviations, extremes, shares of zeros and of positive values.
        shares, quantiles: which quantiles [q, d]: the least value that at least such a share of the rows does not exceed.
        rank_error: how far the rank of a quantile may be off, as a share of the rows; 0 where all rows fitted in memory.
        selectivity: by class, if labels were given.
        target, attribution: mean |a * dy/da| and a * dy/da, if a target y was given.
        top: the rows in which each is highest, if any were asked for.
    """

    site: str
    level: str
    spread: Spread
    shares: tuple[float, ...]
    quantiles: Array
    rank_error: float
    selectivity: Selectivity | None = None
    target: str | None = None
    attribution: Attribution | None = None
    top: TopExamples | None = None

    def __len__(self) -> int:
        return len(self.spread.mean)

    def to_pandas(self) -> pd.DataFrame:
        """One row per neuron; of each class the columns `difference.<class>` and `auc.<class>`."""
        import pandas as pd

        names = ("mean", "deviation", "least", "greatest", "zero", "positive")
        columns = {"neuron": np.arange(len(self)), **{name: getattr(self.spread, name) for name in names}}
        columns |= {f"q{share:g}": one for share, one in zip(self.shares, self.quantiles, strict=True)}
        if self.attribution is not None:
            columns |= {"importance": self.attribution.importance, "signed": self.attribution.signed}
        if self.selectivity is not None:
            columns["probeless"] = self.selectivity.probeless
            for number, name in enumerate(self.selectivity.classes):
                columns |= {f"difference.{name}": self.selectivity.difference[number], f"auc.{name}": self.selectivity.auc[number]}
        return pd.DataFrame(columns)

    def plot(self) -> Figure:
        """Quantiles of every neuron; importance and selectivity of the first ones where they are known. Needs the extra `plots`."""
        from .figures.neurons import neuron_figure

        return neuron_figure(self)

    def ranked(self, by: By | None = None) -> Array:
        """Numbers of the neurons, first the one with most; those that are NaN last.

        Args:
            by: `importance`, `selectivity` (how far from 0.5 the AUC is for the class told best) or `deviation`; the first of them
                that is known if not given. ValueError for one that is not known.
        """
        known = self._known
        if by is not None and by not in known:
            raise ValueError(f"neurons of this table can be ranked by {', '.join(known)}, not by {by!r}")
        values = next(iter(known.values())) if by is None else known[by]
        return np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")

    @property
    def _known(self) -> dict[By, Array]:
        """What neurons can be ranked by."""
        found: dict[By, Array] = {} if self.attribution is None else {"importance": self.attribution.importance}
        found |= {} if self.selectivity is None else {"selectivity": self.selectivity.strength}
        return {**found, "deviation": self.spread.deviation}

    def __repr__(self) -> str:
        error = "exact" if not self.rank_error else f"ranks within {self.rank_error:.2%}"
        told = "" if self.selectivity is None else f", {len(self.selectivity.classes)} classes of {self.selectivity.labels}"
        aimed = "" if self.target is None else f", importance for {self.target}"
        dead = int((self.spread.positive == 0).sum())
        return (
            f"<NeuronTable {self.site}: {len(self)} neurons on {self.spread.count} rows ({self.level}), {dead} never positive; "
            f"quantiles {error}{told}{aimed}>"
        )
