"""Results: frozen values with a table and a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ProbeScore:
    """How well one site's probe does on held-out documents. `layer` is None outside the residual stream."""

    site: str
    stack: str
    layer: int | None
    accuracy: float
    macro_f1: float
    converged: bool


@dataclass(frozen=True)
class ProbeReport:
    """Probes of one label column, beside baselines that see no activation."""

    labels: str
    classes: tuple[str, ...]
    scores: tuple[ProbeScore, ...]
    majority: float
    type_lookup: float | None
    train_rows: int
    test_rows: int
    seed: int

    def to_pandas(self) -> pd.DataFrame:
        """One row per site."""
        frame = pd.DataFrame([asdict(score) for score in self.scores])
        return frame.assign(majority=self.majority, type_lookup=self.type_lookup)

    def plot(self) -> Figure:
        """Accuracy by site, with the baselines as lines; needs the extra `plots`."""
        from .figures import probe_figure

        return probe_figure([self])

    def __repr__(self) -> str:
        best = max(self.scores, key=lambda score: score.accuracy)
        lookup = "" if self.type_lookup is None else f", type look-up {self.type_lookup:.3f}"
        return (
            f"<ProbeReport {self.labels}: best {best.site} at {best.accuracy:.3f} accuracy (majority {self.majority:.3f}{lookup}) "
            f"on {self.test_rows} held-out tokens>"
        )
