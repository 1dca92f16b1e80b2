"""What statistics of attention heads come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensortape.stores.dtypes import Array

from .results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STATISTICS = ("entropy", "normalised_entropy", "distance", "sink", "previous", "itself", "induction")


@dataclass(frozen=True)
class SiteHeads:
    """The heads of one attention site.

    Args:
        site, stack, kind, layer: where; `kind` is `attention` or `cross_attention`, `layer` None where it is not known.
        examples: how many were read.
        queries: how many queries each statistic is a mean over [statistic].
        heads: the means [head, statistic], in the order of `STATISTICS`; NaN where there was no query to tell.
        uniform: those of a head that attends alike to all that it sees [statistic].
    """

    site: str
    stack: str
    kind: str
    layer: int | None
    examples: int
    queries: Array
    heads: Array
    uniform: Array

    @property
    def label(self) -> str:
        """A short name, for axes."""
        where = self.site if self.layer is None else str(self.layer)
        kind = "cross" if self.kind == "cross_attention" else ""
        return " ".join(part for part in (self.stack.rpartition(".")[2], where, kind) if part)


@dataclass(frozen=True, eq=False, repr=False)
class HeadStats(Result):
    """Statistics of attention heads, as `head_stats` defines them. `stats["entropy"]` is [site, head].

    Beside a number stands what it would be of a head that attends alike to all that it sees: in short texts much mass is on the
    first token, and in texts of few words much is behind earlier occurrences, whatever a head does.
    """

    sites: tuple[SiteHeads, ...]

    def to_pandas(self) -> pd.DataFrame:
        """One row per site and head: the statistics, what they are of uniform attention, and of how many queries."""
        import pandas as pd

        return pd.DataFrame([self._row(site, head) for site in self.sites for head in range(len(site.heads))])

    def plot(self) -> Figure:
        """Heat maps, layer by head, one per statistic. Needs the extra `plots`."""
        from .figures.heads import heads_figure

        return heads_figure(self)

    def __getitem__(self, statistic: str) -> Array:
        """[site, head], NaN beyond a site's last head."""
        at = STATISTICS.index(statistic)
        found = np.full((len(self.sites), max(len(site.heads) for site in self.sites)), np.nan)
        for row, site in zip(found, self.sites, strict=True):
            row[: len(site.heads)] = site.heads[:, at]
        return found

    def __repr__(self) -> str:
        count = sum(len(site.heads) for site in self.sites)
        strongest = "; ".join(text for name in ("sink", "previous", "induction") if (text := self._strongest(name)))
        return f"<HeadStats of {count} heads at {len(self.sites)} sites{strongest and '; strongest: '}{strongest}>"

    def _strongest(self, statistic: str) -> str:
        values = self[statistic]
        if np.isnan(values).all():
            return ""
        row, head = np.unravel_index(int(np.nanargmax(values)), values.shape)
        site = self.sites[int(row)]
        uniform = site.uniform[STATISTICS.index(statistic)]
        return f"{statistic} {values[row, head]:.3f} (uniform {uniform:.3f}) at {site.label} head {head}"

    def _row(self, site: SiteHeads, head: int) -> dict[str, object]:
        where = {"site": site.site, "stack": site.stack, "kind": site.kind, "layer": site.layer, "head": head}
        found = dict(zip(STATISTICS, site.heads[head].tolist(), strict=True))
        uniform = {f"uniform_{name}": value for name, value in zip(STATISTICS, site.uniform.tolist(), strict=True)}
        counts = {"queries": int(site.queries[0]), "induction_queries": int(site.queries[-1])}
        return {**where, **found, **uniform, "examples": site.examples, **counts}
