"""Concept activation vectors, and how strongly rows show a concept."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tensortape.stores import Run
from tensortape.stores.dtypes import Array

from .directions import Dots
from .errors import CAVError
from .gram import shift_of
from .readings import states
from .results import Result
from .rows import Pool
from .sweep import Job, sweep

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

CAVKind = Literal["lda", "logistic", "mean_difference", "mean_gradient"]


@dataclass(frozen=True)
class CAV:
    """A direction of one site along which rows show a concept.

    A row h belongs to the concept, says the classifier that the vector is made of, where h . vector + bias > 0.

    Args:
        concept, against: what is told from what.
        site, stack, layer: where; `layer` is None outside the residual stream.
        kind: how it was made.
        vector: [d], float64, of length 1; it points to the concept.
        bias: nan for `mean_gradient`, which tells nothing apart.
        raw_norm: length of the vector before it was brought to 1.
        accuracy, auc: on rows of groups it has not seen; nan if there are none of either side. Of `mean_gradient` nan.
        train_accuracy: on the rows it was fitted to.
        concept_rows, against_rows: fitted to. test_rows: held out, of both sides.
        null: [M, d], float32: vectors of length 1 of random sets of as many of the same rows, made in the same way.
        shuffled: how many units were shuffled for these: groups, or rows where a group has rows of both sides.
        target: what was differentiated, for `mean_gradient`.
    """

    concept: str
    against: str
    site: str
    stack: str
    layer: int | None
    kind: str
    vector: Array
    bias: float
    raw_norm: float
    accuracy: float
    auc: float
    train_accuracy: float
    concept_rows: int
    against_rows: int
    test_rows: int
    null: Array
    shuffled: int
    target: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class CAVs(Result):
    """Concept activation vectors of concepts at sites; `cavs[concept, site]` is one of them.

    A file of them holds the arrays `/cavs/CONCEPT/SITE/vector` and `.../null`, for any reader of safetensors.

    Args:
        cavs: by `CONCEPT/SITE`.
        level, pool: what a row is, and how its tokens are joined: see `fit_cavs`.
        groups: which groups of rows were kept together.
        seed: of the split and of the random sets.
        strength: of the penalty.
        origin: of the run they were fitted on: its uid, and what it says of its model.
    """

    cavs: dict[str, CAV]
    level: str
    pool: Pool
    groups: str
    seed: int
    strength: float
    origin: dict[str, Any]

    def __iter__(self) -> Iterator[CAV]:
        return iter(self.cavs.values())

    def __len__(self) -> int:
        return len(self.cavs)

    def __getitem__(self, name: tuple[str, str]) -> CAV:
        try:
            return self.cavs["/".join(name)]
        except KeyError:
            raise CAVError(f"there is no CAV of {name[0]!r} at {name[1]!r}; there are {', '.join(self.cavs)}") from None

    @property
    def concepts(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(cav.concept for cav in self))

    @property
    def sites(self) -> list[str]:
        """Their sites, in order."""
        return list(dict.fromkeys(cav.site for cav in self))

    def at(self, site: str) -> list[CAV]:
        """Those of one site."""
        return [cav for cav in self if cav.site == site]

    def score(self, run: Run, *, executor: Executor | None = None) -> ConceptScores:
        """h . vector of every row h of a run, which need not be the run they were fitted on.

        Args:
            run: with the same sites.
            executor: who reads and computes; see `sweep`.

        Raises:
            UnknownColumnError: a site was not recorded. CAVError: it is of another width.
        """
        readings = states(run, self.sites, self.level, self.pool)
        jobs = []
        for site, reading in zip(self.sites, readings, strict=True):
            vectors = np.stack([cav.vector for cav in self.at(site)], 1)
            check_width(vectors, reading.width, site)
            rows = reading.rows({})
            jobs.append(Job(rows, (Dots(vectors, shift_of(rows.first_block())),)))
        found = [dots for [dots] in sweep(jobs, executor, title="scoring")]
        owners = [reading.space.owner for reading in readings]
        if any(not np.array_equal(owners[0], other) for other in owners[1:]):
            raise CAVError(
                "the sites of these CAVs were recorded of different rows; score each site by itself, with only(sites=...)"
            )
        return ConceptScores(
            values=np.concatenate(found, 1),
            cavs=tuple((cav.concept, cav.site) for site in self.sites for cav in self.at(site)),
            owner=owners[0],
            ids=tuple(run.ids),
            level=self.level,
        )

    def only(self, *, concepts: list[str] | None = None, sites: list[str] | None = None) -> CAVs:
        """Those of some concepts, and of some sites, alone."""
        kept = {
            name: cav
            for name, cav in self.cavs.items()
            if (concepts is None or cav.concept in concepts) and (sites is None or cav.site in sites)
        }
        if not kept:
            raise CAVError(f"no CAV is of {concepts or 'any concept'} at {sites or 'any site'}; there are {', '.join(self.cavs)}")
        return replace(self, cavs=kept)

    def to_pandas(self) -> pd.DataFrame:
        """One row per vector."""
        import pandas as pd

        shown = [name for name in CAV.__dataclass_fields__ if name not in ("vector", "null")]
        return pd.DataFrame([{**{name: getattr(cav, name) for name in shown}, "random_sets": len(cav.null)} for cav in self])

    def plot(self) -> Figure:
        """Area under the ROC curve by site, one line per concept. Needs the extra `plots`."""
        from .figures.concepts import cavs_figure

        return cavs_figure(self)

    def __repr__(self) -> str:
        best = {
            name: max((cav for cav in self if cav.concept == name), key=lambda cav: np.nan_to_num(cav.auc))
            for name in self.concepts
        }
        shown = "; ".join(f"{name}: held-out AUC {cav.auc:.3f} at {cav.site}" for name, cav in list(best.items())[:4])
        more = f"; and {len(best) - 4} more concepts" if len(best) > 4 else ""
        return f"<CAVs of {len(best)} concepts at {len(self.sites)} sites; {shown}{more}>"


@dataclass(frozen=True, eq=False, repr=False)
class ConceptScores(Result):
    """h . vector of rows and concept activation vectors.

    Args:
        values: [rows, vectors], float64, in units of the site's values.
        cavs: (concept, site) of each vector.
        owner: number of the example of each row.
        ids: of the run's examples.
        level: what a row is.
    """

    values: Array
    cavs: tuple[tuple[str, str], ...]
    owner: Array
    ids: tuple[str | int, ...]
    level: str

    def of(self, concept: str, site: str) -> Array:
        """Of one vector; [rows]."""
        found: Array = self.values[:, self.cavs.index((concept, site))]
        return found

    def to_pandas(self) -> pd.DataFrame:
        """One row per row, one column per vector, named `CONCEPT/SITE`."""
        import pandas as pd

        frame = pd.DataFrame(self.values, columns=["/".join(cav) for cav in self.cavs])
        frame.insert(0, "id", [self.ids[number] for number in self.owner.tolist()])
        return frame

    def plot(self) -> Figure:
        """How scores are distributed. Needs the extra `plots`."""
        from .figures.concepts import scores_figure

        return scores_figure(self)

    def __repr__(self) -> str:
        rows = {"token": "tokens", "example": "examples"}.get(self.level, f"rows of {self.level}")
        return f"<ConceptScores of {len(self.values)} {rows} for {len(self.cavs)} CAVs>"


def check_width(vectors: Array, width: int, site: str) -> None:
    """CAVError if vectors [d, K] are not of the width of a site."""
    if len(vectors) != width:
        raise CAVError(f"CAVs at {site!r} have {len(vectors)} features, but {width} were recorded there; is it the same model?")
