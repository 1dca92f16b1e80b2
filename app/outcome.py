"""What commands that analyse do with a result: a table, and files where they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # commands that analyse nothing should not wait for these
    import pandas as pd

    from tensortape.analyses import Result

Csv = Annotated[Path | None, typer.Option("--csv", help="Write the table to this file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a picture to this file (needs the extra plots).")]
Out = Annotated[Path | None, typer.Option("--out", help="Keep the result: OUT.json and OUT.safetensors.")]


Lines = Callable[[list[dict[str, Any]]], Iterable[str]]


def present(
    result: Result, *, csv: Path | None, plot: Path | None, out: Path | None, as_json: bool, lines: Lines | None = None
) -> None:
    """Print a result as a table (as `lines` has it, if given) and a line, or as JSON; write the files."""
    from .show import printable

    frame = result.to_pandas()
    if csv is not None:
        frame.to_csv(csv, index=False)
    if plot is not None:
        result.plot().savefig(plot, dpi=150)
    if out is not None:
        result.save(out)
    rows = json.loads(frame.to_json(orient="records", double_precision=15))  # NaN as null
    table = "\n".join(map(printable, lines(rows))) if lines is not None else _as_text(frame)
    typer.echo(json.dumps(rows, indent=2) if as_json else f"{table}\n{printable(repr(result))}")


def _as_text(frame: pd.DataFrame) -> str:
    """Columns that say something, numbers short."""
    from .show import printable

    said = frame.dropna(axis=1, how="all").map(lambda value: printable(value) if isinstance(value, str) else value)
    return said.to_string(index=False, float_format=lambda number: f"{number:.4g}", na_rep="-")


def echo(found: Any, lines: Any, *, as_json: bool) -> None:
    """JSON, or lines for people: what they show of a run may be anything, and must do nothing to a terminal."""
    from .show import printable

    shown = [printable(line) for text in ([] if as_json else lines(found)) for line in text.split("\n")]
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(shown))
