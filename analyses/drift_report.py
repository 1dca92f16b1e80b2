"""What comparing a site across the steps of a training comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensortape.stores.dtypes import Array

from .results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MEASURES = ("cka", "cka_error", "cosine", "norm_ratio")
AGAINST = ("reference", "previous")


@dataclass(frozen=True, eq=False, repr=False)
class Drift(Result):
    """How sites differ from a reference step, and from the step before; `drift` says what the measures are.

    Args:
        sites, names: of each site, in full and for pictures. layers: None for a site that belongs to none.
        steps: training steps [step].
        reference: the step that all are compared with.
        cka, cosine, norm_ratio: [site, step, against]: the reference, and the step before; NaN where there is none.
        cka_error: standard errors of `cka`, where CKA is estimated from minibatches; NaN where it is the formula.
        examples: how many were compared. rows: how many rows of each site [site].
        phase, level: what was compared. seed: of the minibatches.
    """

    sites: tuple[str, ...]
    names: tuple[str, ...]
    layers: tuple[int | None, ...]
    steps: Array
    reference: int
    cka: Array
    cka_error: Array
    cosine: Array
    norm_ratio: Array
    examples: int
    rows: Array
    phase: str
    level: str
    seed: int

    def to_pandas(self) -> pd.DataFrame:
        """One row per site and step; `previous` is the step before, and measures that end in it are held against that one."""
        import pandas as pd

        count = len(self.steps)
        previous = np.append(np.nan, self.steps[:-1])
        found: dict[str, Array] = {
            "site": np.repeat(self.sites, count),
            "layer": np.repeat(np.array(self.layers, float), count),
            "step": np.tile(self.steps, len(self.sites)),
        }
        found.update({name: getattr(self, name)[:, :, 0].ravel() for name in MEASURES})
        found["previous"] = np.tile(previous, len(self.sites))
        found.update({f"{name}_previous": getattr(self, name)[:, :, 1].ravel() for name in MEASURES})
        found["rows"] = np.repeat(self.rows, count)
        return pd.DataFrame(found).astype({"layer": "Int64", "previous": "Int64"})

    def plot(self) -> Figure:
        """One line per site, over steps. Needs the extra `plots`."""
        from .figures.steps import drift_figure

        return drift_figure(self)

    def __repr__(self) -> str:
        estimated = ", CKA estimated from minibatches" if np.isfinite(self.cka_error).any() else ""
        return (
            f"<Drift of {len(self.sites)} sites over {len(self.steps)} steps, {self.steps[0]} to {self.steps[-1]}, from step "
            f"{self.reference}: {self.examples} examples of phase {self.phase!r}, {int(self.rows.max())} rows ({self.level})"
            f"{estimated}>"
        )
