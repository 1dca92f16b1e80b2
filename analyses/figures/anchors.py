"""Label words as anchors: flow and foretelling by layer, distances of classes, and where label words stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tensortape.stores.dtypes import Array

from ..anchor_auc import AnchorAUC
from ..anchor_distances import AnchorDistance
from ..anchor_flow import AnchorFlow
from ..anchor_positions import AnchorPositions
from ..anchor_source import ticks
from .canvas import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, SEQUENTIAL, new_figure, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOWS = (
    ("o-", BLUE, "$S_{wp}$ text to label words"),
    ("s-", ORANGE, "$S_{pq}$ label words to target"),
    ("^-", GREEN, "$S_{ww}$ rest"),
)
_SHOWN = 40  # examples
_TICKS = 16


def anchors_figure(flow: AnchorFlow | None, auc: AnchorAUC | None) -> Figure:
    """A panel for each of the two that there is."""
    figure, axes = panels((flow is not None) + (auc is not None))
    if flow is not None:
        flow_panel(axes[0], flow)
    if auc is not None:
        auc_panel(axes[-1], auc)
    return figure


def distance_figure(found: AnchorDistance) -> Figure:
    """Matrices of classes: distance, and the area under the ROC curve where it is known; with few classes, numbers."""
    matrices = [("distance of label words' keys, of the largest", found.distance)]
    matrices += [] if found.auc is None else [("AUC of P(a) / P(b)", found.auc)]
    figure, axes = panels(len(matrices), width=4.6)
    for panel, (title, values) in zip(axes, matrices, strict=True):
        _matrix(figure, panel, title, values, found.classes)
    return figure


def positions_figure(positions: AnchorPositions) -> Figure:
    """Label words and targets of the first examples, one line each."""
    shown = positions.part(0, min(_SHOWN, len(positions)))
    figure = new_figure()
    axes: Axes = figure.subplots()
    for number, name in enumerate(positions.class_names):
        here = shown.classes == number
        axes.plot(shown.positions[here], shown.owner[here], "o", color=COLOURS[number % len(COLOURS)], markersize=4, label=name)
    axes.plot(shown.targets, np.arange(len(shown)), "x", color=GREY, markersize=5, label="target")
    axes.set(xlabel="token position", ylabel="prompt")
    axes.invert_yaxis()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return figure


def flow_panel(axes: Axes, flow: AnchorFlow) -> None:
    shares = flow.shares if flow.heads == "sum_abs" else flow.shares.mean(1)
    places = np.arange(len(flow.sites))
    for number, (style, colour, label) in enumerate(_FLOWS):
        axes.plot(places, shares[:, number], style, color=colour, label=label)
    _layers(axes, ticks(flow.sites, flow.layers))
    axes.set(title="Mean saliency of pairs", xlabel="layer (or site)", ylabel="share of the three flows", ylim=(-0.02, 1.02))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")


def auc_panel(axes: Axes, auc: AnchorAUC) -> None:
    places = np.arange(len(auc.sites))
    axes.plot(places, auc.auc, "o-", color=BLUE, label="AUCROC$_l$ of attention to label words")
    axes.plot(places, auc.share, "s--", color=PURPLE, label="$R_l$, share of layers up to here")
    axes.axhline(0.5, color=GREY, linestyle=":", label="chance")
    _layers(axes, ticks(auc.sites, auc.layers))
    axes.set(title="Attention and prediction", xlabel="layer (or site)", ylabel="AUCROC$_l$, $R_l$ (no unit)")
    low, high = min(0.0, float(np.nanmin(auc.share))), max(1.0, float(np.nanmax(auc.share)))
    axes.set_ylim(low - 0.03, high + 0.03)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")


def _layers(axes: Axes, names: list[str]) -> None:
    """Names of layers below an axis, as many as there is room for."""
    step = -(-len(names) // _TICKS)
    axes.set_xticks(range(0, len(names), step), names[::step])


def _matrix(figure: Figure, axes: Axes, title: str, values: Array, classes: tuple[str, ...]) -> None:
    image = axes.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_title(title, fontsize="medium")
    for (row, column), value in np.ndenumerate(values) if len(classes) <= 8 else ():
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize="small", color="white" if value < 0.5 else "black"
        )
    figure.colorbar(image, ax=axes, shrink=0.8)
