"""What comes of projecting rows into few dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensortape.stores.dtypes import Array

from .results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Sample:
    """Rows that are shown: their numbers, and those of their examples, [n]; int64.

    Args:
        labels, classes, of_row: the column of their classes, its classes, and the class of each [n]; None and () without labels.
    """

    rows: Array
    examples: Array
    labels: str | None = None
    classes: tuple[str, ...] = ()
    of_row: Array | None = None


@dataclass(frozen=True)
class Projection:
    """Principal components of one site.

    Args:
        site, name, layer: where; a short name for pictures; `layer` is None for a site that belongs to none.
        rows: how many there were.
        mean: [d]. components: unit vectors by falling variance, [k, d]. variances: over rows - 1, [k]. All float64.
        total: the variance of all features together.
        scores: coordinates of the rows that are shown, [n, k].
    """

    site: str
    name: str
    layer: int | None
    rows: int
    mean: Array
    components: Array
    variances: Array
    total: float
    scores: Array

    @property
    def explained(self) -> Array:
        """Share of the variance that each component has; [k]."""
        found: Array = self.variances / self.total if self.total else np.full(len(self.variances), np.nan)
        return found

    def transform(self, rows: Array) -> Array:
        """Coordinates [n, k] of any rows [n, *feature] of the site."""
        x = rows.reshape(len(rows), -1)
        return coordinates(x if x.dtype == np.float64 else x.astype(np.float32), self.mean, self.components)


def coordinates(rows: Array, mean: Array, components: Array) -> Array:
    """Rows [n, d] less a mean, in components [k, d]; [n, k] of the rows' dtype."""
    center = mean.astype(rows.dtype)
    found: Array = (rows - center) @ components.T.astype(rows.dtype) + ((center - mean) @ components.T).astype(rows.dtype)
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Projections(Result):
    """Principal components of several sites, with the same rows shown of each."""

    sites: tuple[Projection, ...]
    sample: Sample
    level: str

    def of(self, site: str) -> Projection:
        """One site by its full name; KeyError if it is not here."""
        return {one.site: one for one in self.sites}[site]

    def to_pandas(self) -> pd.DataFrame:
        """One row per site and component."""
        import pandas as pd

        return pd.concat([self._table(one) for one in self.sites], ignore_index=True)

    def plot(self) -> Figure:
        """The rows that are shown in the first two components, one panel per site, by class. Needs the extra `plots`."""
        from .figures.projection import projection_figure

        return projection_figure(self)

    def _table(self, one: Projection) -> pd.DataFrame:
        import pandas as pd

        numbers = np.arange(len(one.variances))
        shares = {"explained": one.explained, "cumulated": np.cumsum(one.explained)}
        return pd.DataFrame({"site": one.site, "layer": one.layer, "component": numbers, "variance": one.variances, **shares})

    def __repr__(self) -> str:
        parts = [f"{one.site} {one.explained.sum():.1%}" for one in self.sites]
        first = self.sites[0]
        return (
            f"<Projections on {first.rows} rows ({self.level}); variance in {len(first.variances)} components: {', '.join(parts)}>"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Embedding2D(Result):
    """t-SNE of one site.

    Args:
        site: where. xy: [n, 2], of the rows in `sample`. kl: what was minimised. perplexity, seed: as asked for.
    """

    site: str
    xy: Array
    sample: Sample
    kl: float
    perplexity: float
    seed: int

    def to_pandas(self) -> pd.DataFrame:
        """One row per row that is shown."""
        import pandas as pd

        found = {"row": self.sample.rows, "example": self.sample.examples, "x": self.xy[:, 0], "y": self.xy[:, 1]}
        if self.sample.of_row is not None:
            found[self.sample.labels or ""] = np.array(self.sample.classes, object)[self.sample.of_row]
        return pd.DataFrame(found)

    def plot(self) -> Figure:
        """The rows, by class. Needs the extra `plots`."""
        from .figures.projection import embedding_figure

        return embedding_figure(self)

    def __repr__(self) -> str:
        return f"<Embedding2D {self.site}: {len(self.xy)} rows, perplexity {self.perplexity:g}, KL {self.kl:.3f}, seed {self.seed}>"
