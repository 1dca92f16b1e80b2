"""Heads as heat maps, layer by head, and attention as heat maps, query by key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tensortape.stores.dtypes import Array

from ..head_report import STATISTICS, HeadStats
from .canvas import ORANGE, SEQUENTIAL, new_figure
from .texts import tick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "entropy": "entropy (nats)",
    "normalised_entropy": "entropy / ln(visible keys)",
    "distance": "mean distance (tokens)",
    "sink": "mass on the first token",
    "previous": "mass on the previous token",
    "itself": "mass on the token itself",
    "induction": "induction: mass after an\nearlier occurrence of the token",
}
_MOST_LABELS = 40


def heads_figure(stats: HeadStats) -> Figure:
    """One heat map per statistic, each on its own scale, on which a line marks uniform attention; grey where it is not defined."""
    labels = [site.label for site in stats.sites]
    known = [name for name in STATISTICS if not np.isnan(stats[name]).all()] or ["entropy"]
    rows, columns = _grid(len(known))
    figure = new_figure(3.4 * columns, min(1.3 + 0.28 * len(labels), 9) * rows + 0.3)
    axes = _panels(figure, rows, columns, len(known))
    for panel, name in zip(axes.flat, known, strict=False):
        image = panel.imshow(stats[name], cmap=_colours(), vmin=0, aspect="auto", interpolation="nearest")
        panel.set_title(TITLES[name], fontsize="medium")
        _mark(figure.colorbar(image, ax=panel), stats, name)
        _ticks(panel.yaxis, labels)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set(xlabel="head", ylabel="layer")
    figure.suptitle("attention heads; the mark on a scale is attention to all visible tokens alike", fontsize="medium")
    return figure


def matrices_figure(
    matrices: Array, titles: Sequence[str], tokens: tuple[Sequence[str], Sequence[str]], title: str, unit: str
) -> Figure:
    """One heat map per matrix [n, query, key], all on one scale, which spreads small values; with the tokens along both axes where
    they can be read."""
    from matplotlib.colors import PowerNorm

    rows, columns = _grid(len(matrices))
    height, width = (1.2 + 0.17 * max(count, 9) if count <= _MOST_LABELS else 3.4 for count in matrices.shape[1:])
    figure = new_figure(max(columns * width, 3) + 1.2, rows * height + 0.8)
    axes = _panels(figure, rows, columns, len(matrices), sharex=True, sharey=True)
    scale = PowerNorm(0.5, 0, float(np.nanmax(matrices, initial=0)) or 1)
    for number, (panel, matrix, name) in enumerate(zip(axes.flat, matrices, titles, strict=False)):
        image = panel.imshow(matrix, cmap=_colours(), norm=scale, interpolation="nearest")
        panel.set_title(name, fontsize="small", parse_math=False)
        _ticks(panel.xaxis, [tick(token) for token in tokens[1]], rotation=90)
        _ticks(panel.yaxis, [tick(token) for token in tokens[0]])
        panel.xaxis.set_tick_params(labelbottom=number + columns >= len(matrices))  # nothing is below
    figure.supxlabel("key", fontsize="medium")
    figure.supylabel("query", fontsize="medium")
    figure.suptitle(title, fontsize="medium", parse_math=False)
    figure.colorbar(image, ax=axes, label=unit, shrink=0.7)
    return figure


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns for so many panels."""
    columns = min(count, 4)
    return math.ceil(count / columns), columns


def _panels(figure: Figure, rows: int, columns: int, count: int, **how: Any) -> Any:
    """Axes [rows, columns], of which as many as asked for are shown."""
    axes: Any = figure.subplots(rows, columns, squeeze=False, **how)
    for panel in axes.flat[count:]:
        panel.axis("off")
    return axes


def _mark(bar: Any, stats: HeadStats, statistic: str) -> None:
    """What the statistic is of uniform attention, on its scale."""
    at = STATISTICS.index(statistic)
    for value in {float(site.uniform[at]) for site in stats.sites}:
        bar.ax.axhline(value, color=ORANGE, linewidth=2)


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps[SEQUENTIAL].with_extremes(bad="#cccccc")


def _ticks(axis: Any, labels: Sequence[str], **how: Any) -> None:
    """Every label, as long as they can be read; else the numbers that matplotlib chooses."""
    if 0 < len(labels) <= _MOST_LABELS:
        axis.set_ticks(range(len(labels)), labels, fontsize="x-small", parse_math=False, **how)
