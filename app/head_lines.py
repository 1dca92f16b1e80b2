"""Statistics of attention heads as lines of text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from tensortape.analyses.head_report import STATISTICS

_SHORT = {"normalised_entropy": "/ ln keys"}


def lines(rows: list[dict[str, Any]]) -> Iterable[str]:
    """A line per head and one per site for uniform attention; what is not defined is left blank."""
    width = max(len(row["site"]) for row in rows)
    yield f"{'site':<{width}}     head" + "".join(f"{_SHORT.get(name, name):>11}" for name in STATISTICS)
    for site, heads in groupby(rows, key=lambda row: str(row["site"])):
        for row in heads:
            yield f"{site:<{width}}  {row['head']:>7}" + "".join(_number(row[name]) for name in STATISTICS)
        yield f"{site:<{width}}  uniform" + "".join(_number(row[f"uniform_{name}"]) for name in STATISTICS)
    yield "entropy in nats, distance in tokens, the rest shares of attention; uniform: a head that attends alike to all it sees"


def _number(value: float | None) -> str:
    return f"{'' if value is None else f'{value:.3f}':>11}"
