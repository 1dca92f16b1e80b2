"""What probes come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensortape.stores.dtypes import Array

from .results import Result
from .tasks import Probe

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ProbeScore:
    """How well one site's probe does on rows of groups it has not seen.

    Args:
        labels: what it was to tell.
        site, stack, layer: where; `layer` is None outside the residual stream.
        accuracy, low, high: with its 95 % interval, drawing groups.
        macro_f1: mean F1 of the classes. f1: of each class [K].
        cross_entropy: bits per row; nan for ridge, which gives no probabilities.
        control: accuracy on the control task, where types have random labels; None without one.
        bits, compression: of an online code of the training labels, and how many times shorter than a uniform code it is.
        random_init: accuracy in a second run, of a model that was not trained.
        probe: the classifier.
    """

    labels: str
    site: str
    stack: str
    layer: int | None
    accuracy: float
    low: float
    high: float
    macro_f1: float
    f1: Array
    cross_entropy: float
    probe: Probe
    control: float | None = None
    bits: float | None = None
    compression: float | None = None
    random_init: float | None = None

    @property
    def selectivity(self) -> float | None:
        """Accuracy less that on the control task."""
        return None if self.control is None else self.accuracy - self.control


@dataclass(frozen=True)
class LabelSet:
    """One set of labels: its classes, the rows fitted to and tested on, and the accuracy of baselines that see no activation.

    `majority` says the most frequent class; `type_lookup` the most frequent class of a token's type (None without token ids).
    """

    name: str
    classes: tuple[str, ...]
    train_rows: int
    test_rows: int
    majority: float
    type_lookup: float | None


@dataclass(frozen=True, eq=False, repr=False)
class ProbeReport(Result):
    """Probes of every site for every set of labels, beside their baselines.

    A probe that does not beat the look-up has read the token, not its context; one that does no better on the real task than on its
    control has memorised types. And a linear probe that fails does not show that the information is not there.
    """

    sets: tuple[LabelSet, ...]
    scores: tuple[ProbeScore, ...]
    fit: str
    groups: str
    level: str
    seed: int

    def to_pandas(self) -> pd.DataFrame:
        """One row per set of labels and site."""
        import pandas as pd

        return pd.DataFrame([self._row(score) for score in self.scores])

    def plot(self) -> Figure:
        """Accuracy by site, with the baselines; one panel per set of labels. Needs the extra `plots`."""
        from .figures.probes import probe_figure

        return probe_figure(self)

    def of(self, labels: str) -> LabelSet:
        """One set of labels by name."""
        return next(one for one in self.sets if one.name == labels)

    def best(self, labels: str) -> ProbeScore:
        """The site with the highest accuracy for a set of labels."""
        return max((score for score in self.scores if score.labels == labels), key=lambda score: score.accuracy)

    def __repr__(self) -> str:
        lines = [self._line(one) for one in self.sets]
        return f"<ProbeReport {'; '.join(lines)}; failure of a linear probe is not absence>"

    def _line(self, one: LabelSet) -> str:
        best = self.best(one.name)
        beside = [f"majority {one.majority:.3f}"]
        beside += [] if one.type_lookup is None else [f"type look-up {one.type_lookup:.3f}"]
        beside += [] if best.control is None else [f"control {best.control:.3f}"]
        return f"{one.name}: {best.accuracy:.3f} at {best.site} ({', '.join(beside)}) on {one.test_rows} rows"

    def _row(self, score: ProbeScore) -> dict[str, object]:
        one = self.of(score.labels)
        return {
            "labels": score.labels,
            "site": score.site,
            "stack": score.stack,
            "layer": score.layer,
            "accuracy": score.accuracy,
            "low": score.low,
            "high": score.high,
            "macro_f1": score.macro_f1,
            "cross_entropy": score.cross_entropy,
            "control": score.control,
            "selectivity": score.selectivity,
            "bits": score.bits,
            "compression": score.compression,
            "random_init": score.random_init,
            "majority": one.majority,
            "type_lookup": one.type_lookup,
            "train_rows": one.train_rows,
            "test_rows": one.test_rows,
            "objective": score.probe.objective,
            "gap": score.probe.gap,
            "passes": score.probe.passes,
            "converged": score.probe.converged,
        }


def tick(site: str, layer: int | None) -> str:
    """A short name of a site, for axes."""
    return str(layer) if layer is not None else site.rpartition(":")[0].rpartition(".")[2]
