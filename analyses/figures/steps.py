"""Sites across the steps of a training: drift as lines, accuracy of probes as heat maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tensortape.stores.dtypes import Array

from ..drift_report import Drift
from ..probe_report import LabelSet, tick
from ..step_probes import ProbeSteps
from .canvas import GREY, ORANGE, SEQUENTIAL, new_figure, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = {"cka": "linear CKA", "cosine": "mean cosine of rows", "norm_ratio": "ratio of mean norms"}
_MOST_NAMES, _MOST_TICKS, _WRITTEN = 12, 16, 12
_SPREAD = 8  # steps that end so many times later than their median are counted in powers


def drift_figure(found: Drift) -> Figure:
    """One panel per measure, held against the reference above and against the step before below; one line per site."""
    figure = new_figure(12.5, 6.4)
    rows: Any = figure.subplots(2, len(_PANELS), sharex=True)
    titles = (f"held against step {found.reference}", "held against the step before")
    for against, (axes, title) in enumerate(zip(rows, titles, strict=True)):
        for panel, (measure, label) in zip(axes, _PANELS.items(), strict=True):
            _lines(panel, found, getattr(found, measure)[:, :, against])
            panel.set(title=title, ylabel=label)
            panel.title.set_fontsize("medium")
    for panel in rows[-1]:
        panel.set_xlabel("training step")
        if found.steps[-1] > _SPREAD * max(np.median(found.steps), 1):
            panel.set_xscale("symlog", linthresh=1)
    _name_sites(figure, rows, found)
    figure.suptitle(f"{found.examples} examples of phase {found.phase!r}, {found.level} rows", fontsize="medium")
    return figure


def probe_steps_figure(found: ProbeSteps) -> Figure:
    """One panel per set of labels: accuracy on held-out examples, layer by step, on a scale from the majority class."""
    sites = max(len(scores) for one in found.sets for scores in found.scores(one.name))
    width, height = (1.2 + 0.34 * min(max(count, 8), 40) for count in (len(found.steps), sites))
    figure, axes = panels(len(found.sets), width + 1.4, min(height + 0.6, 9))
    for panel, one in zip(axes, found.sets, strict=True):
        _heat(figure, panel, found, one)
    return figure


def _lines(axes: Axes, found: Drift, values: Array) -> None:
    """[site, step]; 1 is no change."""
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    for line, colour in zip(values, _colours(len(found.sites)), strict=True):
        axes.plot(found.steps, line, "o-", color=colour, markersize=3, linewidth=1.2)
    axes.grid(alpha=0.3)


def _colours(count: int) -> Any:
    """From the first site to the last."""
    from matplotlib import colormaps

    return colormaps[SEQUENTIAL](np.linspace(0, 0.95, count))


def _name_sites(figure: Figure, rows: Any, found: Drift) -> None:
    """Names beside the panels; of many sites every second, or third, and so on."""
    lines = rows[0][0].get_lines()[1:]  # the first marks 1
    shown = range(0, len(lines), -(-len(lines) // _MOST_NAMES))
    names = [found.names[at] for at in shown]
    figure.legend([lines[at] for at in shown], names, loc="outside right center", fontsize="small", frameon=False)


def _heat(figure: Figure, axes: Axes, found: ProbeSteps, one: LabelSet) -> None:
    values = found.accuracy(one.name).T
    low = min(one.majority, float(values.min()))
    image = axes.imshow(values, cmap=SEQUENTIAL, vmin=low, vmax=1, aspect="auto", origin="lower", interpolation="nearest")
    sites = [tick(score.site, score.layer) for score in found.scores(one.name)[0]]
    for axis, labels in ((axes.xaxis, list(map(str, found.steps))), (axes.yaxis, sites)):
        shown = range(0, len(labels), -(-len(labels) // _MOST_TICKS))
        axis.set_ticks(shown, [labels[at] for at in shown], fontsize="small")
    axes.tick_params(axis="x", rotation=45 if max(map(len, map(str, found.steps))) > 3 else 0)
    axes.set(title=one.name, xlabel="training step", ylabel="layer (or site)")
    bar = figure.colorbar(image, ax=axes, label="accuracy on held-out rows (mark: majority class)")
    bar.ax.axhline(one.majority, color=ORANGE, linewidth=3)
    for (row, column), value in np.ndenumerate(values) if max(values.shape) <= _WRITTEN else ():
        colour = "white" if value < (low + 1) / 2 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=colour)
