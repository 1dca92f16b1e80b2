"""What commands that analyse do with a result: a table, and files where they are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # commands that analyse nothing should not wait for these
    import pandas as pd

    from tensortape.analyses import Result

Csv = Annotated[Path | None, typer.Option("--csv", help="Write the table to this file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a picture to this file (needs the extra plots).")]
Out = Annotated[Path | None, typer.Option("--out", help="Keep the result: OUT.json and OUT.safetensors.")]


def present(result: Result, *, csv: Path | None, plot: Path | None, out: Path | None, as_json: bool) -> None:
    """Print a result as a table and a line, or as JSON; write the files."""
    from .show import printable

    frame = result.to_pandas()
    if csv is not None:
        frame.to_csv(csv, index=False)
    if plot is not None:
        result.plot().savefig(plot, dpi=150)
    if out is not None:
        result.save(out)
    typer.echo(_as_json(frame) if as_json else f"{_as_text(frame)}\n{printable(repr(result))}")


def _as_json(frame: pd.DataFrame) -> str:
    return json.dumps(json.loads(frame.to_json(orient="records")), indent=2)


def _as_text(frame: pd.DataFrame) -> str:
    """Columns that say something, numbers short."""
    from .show import printable

    said = frame.dropna(axis=1, how="all").map(lambda value: printable(value) if isinstance(value, str) else value)
    return said.to_string(index=False, float_format=lambda number: f"{number:.4g}", na_rep="-")
