"""Statistics of attention heads on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tensortape.analyses import head_stats
from tensortape.analyses.head_report import STATISTICS
from tensortape.stores import Run

Json = dict[str, Any]
_SHORT = {"normalised_entropy": "/ ln keys"}


def found(
    run: Run, sites: Sequence[str] | None, *, examples: int | None, seed: int, csv: Path | None, plot: Path | None
) -> list[Json]:
    """One row per head; also written as a table and as a picture, where asked for."""
    stats = head_stats(run, sites=[_site(site) for site in sites] if sites else None, examples=examples, seed=seed)
    frame = stats.to_pandas()
    if csv is not None:
        frame.to_csv(csv, index=False)
    if plot is not None:
        stats.plot().savefig(plot)
    rows: list[Json] = json.loads(frame.to_json(orient="records", double_precision=15))  # NaN as null
    return rows


def lines(rows: list[Json]) -> Iterable[str]:
    """The same for people: a line per head and one per site for uniform attention; what is not defined is left blank."""
    width = max(len(row["site"]) for row in rows)
    yield f"{'site':<{width}}     head" + "".join(f"{_SHORT.get(name, name):>11}" for name in STATISTICS)
    for site, heads in groupby(rows, key=lambda row: str(row["site"])):
        for row in heads:
            yield f"{site:<{width}}  {row['head']:>7}" + "".join(_number(row[name]) for name in STATISTICS)
        yield f"{site:<{width}}  uniform" + "".join(_number(row[f"uniform_{name}"]) for name in STATISTICS)
    yield "entropy in nats, distance in tokens, the rest shares of attention; uniform: a head that attends alike to all it sees"


def _site(text: str) -> str | int:
    return int(text) if text.lstrip("-").isdigit() else text


def _number(value: float | None) -> str:
    return f"{'' if value is None else f'{value:.3f}':>11}"
