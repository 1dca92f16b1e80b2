"""What testing with concept activation vectors comes to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tensortape.stores.dtypes import Array

from .cavs import CAV
from .results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TCAVScore:
    """How a target changes along one concept at one site.

    Args:
        concept, against, site, stack, layer, kind: of the vector.
        sign_count: share of rows whose gradient * vector is above 0; Kim et al.'s TCAV score.
        mean: mean of gradient * vector, per unit of the site's values. What captum calls magnitude.
        relu_ratio: sum of the positive products over the sum of the absolute ones.
        n: rows.
        per_example: gradient * vector of each row; [n], float64.
        null_sign_count, null_mean: the same of the vectors of random sets; [M].
        p, p_mean: how likely a random set has a sign count as far from 1/2, a mean as far from 0; two-sided, by permutation.
        p_fdr, p_mean_fdr: the false discovery rate at which it is called significant, over all concepts and sites of the report.
    """

    concept: str
    against: str
    site: str
    stack: str
    layer: int | None
    kind: str
    sign_count: float
    mean: float
    relu_ratio: float
    n: int
    per_example: Array
    null_sign_count: Array
    null_mean: Array
    p: float
    p_mean: float
    p_fdr: float = float("nan")
    p_mean_fdr: float = float("nan")


@dataclass(frozen=True, eq=False, repr=False)
class TCAV(Result):
    """Concepts and a target at sites.

    Args:
        scores: one for each vector.
        target: what was differentiated.
        examples: which examples, in words.
        owner: number of the example of each row.
        level, pool: what a row is, and how the tokens' states were joined.
        origin: uid of the run with the gradients.
    """

    scores: tuple[TCAVScore, ...]
    target: str
    examples: str
    owner: Array
    level: str
    pool: str
    origin: str

    def __iter__(self) -> Iterator[TCAVScore]:
        return iter(self.scores)

    def of(self, concept: str, site: str) -> TCAVScore:
        """The score of a concept at a site; KeyError without one."""
        for score in self.scores:
            if (score.concept, score.site) == (concept, site):
                return score
        raise KeyError(f"no score of {concept!r} at {site!r}")

    def significant(self, rate: float = 0.05, by: Literal["sign_count", "mean"] = "sign_count") -> list[TCAVScore]:
        """Those whose sign count, or mean, is called significant at a false discovery rate."""
        return [score for score in self.scores if (score.p_fdr if by == "sign_count" else score.p_mean_fdr) <= rate]

    def to_pandas(self) -> pd.DataFrame:
        """One row per concept and site."""
        import pandas as pd

        arrays = ("per_example", "null_sign_count", "null_mean")
        shown = [name for name in TCAVScore.__dataclass_fields__ if name not in arrays]
        return pd.DataFrame(
            [{**{name: getattr(score, name) for name in shown}, "random_sets": len(score.null_mean)} for score in self.scores]
        )

    def plot(self) -> Figure:
        """Sign counts by site with the band of random sets; one panel per concept. Needs the extra `plots`."""
        from .figures.concepts import tcav_figure

        return tcav_figure(self)

    def __repr__(self) -> str:
        counts, means = self.significant(by="sign_count"), self.significant(by="mean")
        said = f"{len(counts)} sign counts and {len(means)} means of {len(self.scores)} significant (false discovery rate 5 %)"
        return f"<TCAV of {self.target!r} over {self.scores[0].n} rows of {self.examples}: {said}>"


def scored(cav: CAV, dots: Array, positive: Array, mean: Array, p: tuple[float, float]) -> TCAVScore:
    """A score from the products of gradients with a vector, and from what random vectors gave."""
    absolute = abs(dots).sum()
    return TCAVScore(
        concept=cav.concept,
        against=cav.against,
        site=cav.site,
        stack=cav.stack,
        layer=cav.layer,
        kind=cav.kind,
        sign_count=float((dots > 0).mean()),
        mean=float(dots.mean()),
        relu_ratio=float(dots[dots > 0].sum() / absolute) if absolute else float("nan"),
        n=len(dots),
        per_example=dots,
        null_sign_count=positive,
        null_mean=mean,
        p=p[0],
        p_mean=p[1],
    )
