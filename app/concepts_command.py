"""What the commands `cav` and `tcav` show and write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensortape.analyses import Result

Json = dict[str, Any]
CAV_COLUMNS = {"concept": "concept", "site": "site", "rows": "concept_rows", "accuracy": "accuracy", "AUC": "auc"}
TCAV_COLUMNS = {
    "concept": "concept", "site": "site", "n": "n", "sign count": "sign_count", "p": "p", "FDR": "p_fdr",
    "mean": "mean", "mean p": "p_mean", "mean FDR": "p_mean_fdr",
}  # fmt: skip


def written(result: Result, csv: Path | None, plot: Path | None, out: Path | None) -> Json:
    """Write what is asked for; the table as JSON, where numbers that are none are null."""
    frame = result.to_pandas()
    if csv is not None:
        frame.to_csv(csv, index=False)
    if plot is not None:
        result.plot().savefig(plot, dpi=150)
    rows = [{str(name): _plain(value) for name, value in row.items()} for row in frame.to_dict("records")]
    return {"summary": repr(result)[1:-1], "rows": rows, "out": None if out is None else str(result.save(out))}


def lines(found: Json, columns: dict[str, str]) -> Iterator[str]:
    """The table for people."""
    yield found["summary"]
    table = [list(columns), *([_shown(row[name]) for name in columns.values()] for row in found["rows"])]
    widths = [max(len(row[place]) for row in table) for place in range(len(columns))]
    for row in table:
        yield "  ".join(_aligned(text, width, place) for place, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip()
    if found["out"]:
        yield f"written to {found['out']}.json and {found['out']}.safetensors"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(text: str, width: int, place: int) -> str:
    """Names to the left, numbers to the right."""
    return text.ljust(width) if place < 2 else text.rjust(width)
