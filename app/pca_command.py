"""Principal components on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tensortape.analyses import pca
from tensortape.stores import Run

Json = dict[str, Any]


def found(
    run: Run,
    sites: Sequence[str] | None,
    *,
    components: int,
    labels: str | None,
    level: str,
    sample: int,
    seed: int,
    csv: Path | None,
    plot: Path | None,
) -> Json:
    """One row per site and component; also written as a table and as a picture, where asked for."""
    chosen = list(sites) if sites else ["resid_post"]
    projections = pca(run, chosen, components=components, labels=labels, level=level, sample=sample, seed=seed)
    frame = projections.to_pandas()
    if csv is not None:
        frame.to_csv(csv, index=False)
    if plot is not None:
        projections.plot().savefig(plot, dpi=150)
    return {"rows": projections.sites[0].rows, "components": json.loads(frame.to_json(orient="records", double_precision=15))}


def lines(said: Json) -> Iterable[str]:
    """The same for people: a line per site with the share of the variance in each component."""
    width = max(len(row["site"]) for row in said["components"])
    yield f"share of the variance of {said['rows']} rows in each component, and in all of these"
    for site, rows in groupby(said["components"], key=lambda row: str(row["site"])):
        shares = list(rows)
        yield f"{site:<{width}}" + "".join(_share(row["explained"]) for row in shares) + f"  {_share(shares[-1]['cumulated'])}"


def _share(value: float | None) -> str:
    return f"{'':>7}" if value is None else f"{value:>7.1%}"
