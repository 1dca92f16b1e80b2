"""Rows in two dimensions, coloured by class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tensortape.stores.dtypes import Array

from ..projections import Embedding2D, Projection, Projections, Sample
from .canvas import BLUE, COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 4
MARKERS = "o^sDvP*X"


def projection_figure(found: Projections) -> Figure:
    """One panel per site: the rows that are shown, in its first two components."""
    across = min(ACROSS, len(found.sites))
    down = -(-len(found.sites) // across)
    figure = new_figure(3.4 * across + 0.9, 3.2 * down)
    axes = list(np.ravel(figure.subplots(down, across, squeeze=False)))
    for panel, one in zip(axes, found.sites, strict=False):
        _scatter(panel, one.scores[:, :2], found.sample)
        panel.set(title=one.name, xlabel=_axis(one, 0), ylabel=_axis(one, 1))
    for panel in axes[len(found.sites) :]:
        panel.set_visible(False)
    _legend(figure, axes[0], found.sample)
    return figure


def embedding_figure(found: Embedding2D) -> Figure:
    """The rows that are shown; the axes of t-SNE have no unit."""
    figure = new_figure(5.6, 4.2)
    axes = figure.subplots()
    _scatter(axes, found.xy, found.sample)
    axes.set(title=f"t-SNE of {found.site} (perplexity {found.perplexity:g})", xticks=[], yticks=[])
    _legend(figure, axes, found.sample)
    return figure


def _scatter(axes: Axes, points: Array, sample: Sample) -> None:
    """Points by class: a colour each, and a marker where there are more classes than colours."""
    if points.shape[1] == 1:
        points = np.column_stack([points, np.zeros(len(points))])
    style: dict[str, Any] = {"s": 7, "alpha": 0.6, "linewidths": 0}
    if sample.of_row is None:
        axes.scatter(points[:, 0], points[:, 1], color=BLUE, **style)
    for number, name in enumerate(sample.classes):
        here = points[sample.of_row == number]
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        axes.scatter(here[:, 0], here[:, 1], color=COLOURS[number % len(COLOURS)], marker=marker, label=name, **style)


def _legend(figure: Figure, axes: Axes, sample: Sample) -> None:
    if sample.classes:
        handles, names = axes.get_legend_handles_labels()
        legend = figure.legend(handles, names, loc="outside right center", fontsize="small", title=sample.labels, markerscale=2)
        legend.get_title().set_fontsize("small")


def _axis(one: Projection, number: int) -> str:
    if number >= len(one.variances):
        return ""
    return f"component {number + 1} ({one.explained[number]:.1%})"
