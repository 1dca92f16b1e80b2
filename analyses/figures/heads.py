"""Heads as heat maps, layer by head, and attention as heat maps, query by key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tensortape.stores.dtypes import Array

from ..head_report import STATISTICS, HeadStats
from .canvas import SEQUENTIAL, new_figure
from .texts import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
_TO_ONE = ("normalised_entropy", "sink", "previous", "itself", "induction")
_MOST_LABELS = 40


def heads_figure(stats: HeadStats) -> Figure:
    """One heat map per statistic; grey where a statistic is not defined."""
    labels = [site.label for site in stats.sites]
    known = [name for name in STATISTICS if not np.isnan(stats[name]).all()] or ["entropy"]
    rows, columns = _grid(len(known))
    height = min(1.3 + 0.28 * len(labels), 9)
    figure = new_figure(3.4 * columns, height * rows)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for panel, name in zip(axes.flat, known, strict=False):
        limits = (0, 1) if name in _TO_ONE else (0, None)
        _heat(figure, panel, stats[name], TITLES[name], limits)
        _ticks(panel.yaxis, labels)
        panel.set(xlabel="head", ylabel="layer")
    for panel in axes.flat[len(known) :]:
        panel.axis("off")
    return figure


def matrices_figure(
    matrices: Array, titles: Sequence[str], tokens: tuple[Sequence[str], Sequence[str]], title: str, unit: str
) -> Figure:
    """One heat map per matrix [n, query, key], on one scale, with the tokens along both axes where there are not too many."""
    rows, columns = _grid(len(matrices))
    sizes = [1.2 + 0.17 * min(max(count, 9), _MOST_LABELS) for count in matrices.shape[1:]]
    figure = new_figure(max(columns * sizes[1], 4), rows * sizes[0] + 0.8)
    axes: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    largest = np.nanmax(matrices) if np.isfinite(matrices).any() else 1
    for panel, matrix, name in zip(axes.flat, matrices, titles, strict=False):
        image = panel.imshow(matrix, cmap=_colours(), vmin=0, vmax=largest, interpolation="nearest")
        panel.set_title(name, fontsize="small", parse_math=False)
    for panel in axes.flat[len(matrices) :]:
        panel.axis("off")
    for panel in axes[-1]:
        _ticks(panel.xaxis, tokens[1], rotation=90)
    for panel in axes[:, 0]:
        _ticks(panel.yaxis, tokens[0])
    figure.supxlabel("key", fontsize="medium")
    figure.supylabel("query", fontsize="medium")
    figure.suptitle(title, fontsize="medium", parse_math=False)
    figure.colorbar(image, ax=axes, label=unit, shrink=0.6)
    return figure


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns for so many panels."""
    columns = min(count, 4)
    return math.ceil(count / columns), columns


def _heat(figure: Figure, axes: Axes, values: Array, title: str, limits: tuple[float, float | None]) -> None:
    image = axes.imshow(values, cmap=_colours(), vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=axes)


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps[SEQUENTIAL].with_extremes(bad="#cccccc")


def _ticks(axis: Any, labels: Sequence[str], **how: Any) -> None:
    """Every label, as long as they can be read; else the numbers that matplotlib chooses."""
    if 0 < len(labels) <= _MOST_LABELS:
        axis.set_ticks(range(len(labels)), [shown(label) for label in labels], fontsize="x-small", parse_math=False, **how)
