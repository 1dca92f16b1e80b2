"""What comparing sites comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensortape.stores.dtypes import Array

from .results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(Result):
    """Centred kernel alignment of sites: 1 for the same arrangement of rows up to rotation and scale, 0 for unrelated ones.

    Args:
        sites, names: of the rows of the matrix, in full and for pictures.
        others, other_names: of its columns: the same sites, or those of a second run.
        matrix: [sites, others]; NaN where a site is constant.
        error: standard errors of an estimate from minibatches; None for the formula on all rows.
        kind: the kernel. rows: how many rows were compared. batches: in how many minibatches; 0 for the formula on all rows.
        level: what a row is. seed: of the minibatches. joined: whether `others` are of a second run.
    """

    sites: tuple[str, ...]
    names: tuple[str, ...]
    others: tuple[str, ...]
    other_names: tuple[str, ...]
    matrix: Array
    error: Array | None
    kind: str
    rows: int
    batches: int
    level: str
    seed: int
    joined: bool

    @property
    def estimate(self) -> str:
        """How the numbers came about, in words."""
        if self.batches:
            return f"unbiased estimate from {self.batches} minibatches of {self.rows // self.batches} rows"
        return f"formula on all {self.rows} rows"

    def to_pandas(self) -> pd.DataFrame:
        """One row per pair of sites."""
        import pandas as pd

        found = {"site": np.repeat(self.sites, len(self.others)), "other": np.tile(self.others, len(self.sites))}
        error = np.zeros_like(self.matrix) if self.error is None else self.error
        return pd.DataFrame({**found, "cka": self.matrix.ravel(), "error": error.ravel()})

    def plot(self) -> Figure:
        """The matrix. Needs the extra `plots`."""
        from .figures.similarity import similarity_figure

        return similarity_figure(self)

    def __repr__(self) -> str:
        against = "of two runs" if self.joined else "of one run"
        size = f"{len(self.sites)} x {len(self.others)}"
        return f"<Similarity {size} sites {against}, {self.kind} CKA, {self.estimate} ({self.level})>"
