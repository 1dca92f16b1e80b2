"""`tensortape anchors`: flow into label words and what attention to them foretells, as one table and one picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensortape.analyses import AnchorAUC, AnchorFlow, AnchorPositions, anchor_auc, anchor_flow, anchor_positions
from tensortape.stores import Run

from . import models

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Anchors:
    """What was asked for of a run's label words; at least one of the two is there."""

    positions: AnchorPositions
    flow: AnchorFlow | None
    auc: AnchorAUC | None

    @property
    def table(self) -> pd.DataFrame:
        """One row per attention site."""
        frames = [found.to_pandas().drop(columns="prompts") for found in (self.flow, self.auc) if found is not None]
        return frames[0] if len(frames) == 1 else frames[0].merge(frames[1], on=["site", "layer"])

    def to_json(self) -> dict[str, Any]:
        """The table's rows, and how many prompts they are of."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return {"prompts": len(self.positions), "left_out": self.positions.left_out, "sites": rows}

    def draw(self, path: Path) -> None:
        """The picture, as a file."""
        from tensortape.analyses.figures.anchors import anchors_figure

        anchors_figure(self.flow, self.auc).savefig(path, dpi=150)

    def lines(self) -> Iterable[str]:
        """For people."""
        yield repr(self.positions)[1:-1]
        yield self.table.to_string(index=False, float_format=lambda value: f"{value:.4g}")


def find(
    run: Run,
    labels: Sequence[str],
    *,
    prefix: str,
    query: str,
    by: str,
    target: str,
    predictions: str | None,
    flow: bool,
    sites: Sequence[str] | None,
) -> Anchors:
    """Find label words and measure what was recorded of them. Words are text for the recorded tokenizer, or token ids."""
    if not flow and predictions is None:
        raise ValueError("--no-flow leaves nothing to do without --predictions")
    positions = anchor_positions(
        run,
        {word: _tokens(run, word)[0] for word in labels},
        prefix=_tokens(run, prefix) if prefix else (),
        target=query,  # type: ignore[arg-type]
        by=by,  # type: ignore[arg-type]
    )
    chosen = None if sites is None else [int(site) if site.lstrip("-").isdecimal() else site for site in sites]
    return Anchors(
        positions,
        anchor_flow(run, positions, target=target, sites=chosen) if flow else None,
        anchor_auc(run, positions, predictions, sites=chosen) if predictions is not None else None,
    )


def _tokens(run: Run, text: str) -> list[int]:
    """Token ids, given as such with commas between them or as text."""
    if all(part.strip().isdecimal() for part in text.split(",")):
        return [int(part) for part in text.split(",")]
    tokenizer = models.recorded_tokenizer(run)
    if tokenizer is None:
        raise ValueError(f"{text!r} cannot be made tokens: the run has no tokenizer; give token ids instead")
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if not found:
        raise ValueError(f"{text!r} has no tokens")
    return found
