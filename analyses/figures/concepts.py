"""Concept activation vectors by site: how well they tell rows apart, how scores spread, and TCAV with the band of random sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tensortape.stores.dtypes import Array

from ..cavs import CAV, CAVs, ConceptScores
from ..probe_report import tick
from ..tcav_report import TCAV, TCAVScore
from .canvas import BLACK, BLUE, COLOURS, GREY, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = "os^Dv<>P"
_ACROSS = 4  # panels in a row


def cavs_figure(cavs: CAVs) -> Figure:
    """Held-out area under the ROC curve by site, a line per concept."""
    figure = new_figure()
    axes = figure.subplots()
    places = {site: number for number, site in enumerate(cavs.sites)}
    for number, concept in enumerate(cavs.concepts):
        mine = [cav for cav in cavs if cav.concept == concept]
        style, colour = f"-{MARKS[number % len(MARKS)]}", COLOURS[number % len(COLOURS)]
        axes.plot([places[cav.site] for cav in mine], [cav.auc for cav in mine], style, color=colour, label=concept)
    axes.axhline(0.5, color=GREY, linestyle=":", label="chance")
    low = np.nanmin([0.5, *(cav.auc for cav in cavs)])
    axes.set(title="concept activation vectors", ylabel="AUC on held-out groups", ylim=(low - 0.02, 1.02))
    _sites(axes, list(cavs))
    axes.legend(loc="lower right", fontsize="small")
    return figure


def scores_figure(scores: ConceptScores) -> Figure:
    """The distribution of the scores of every vector, in units of its standard deviation from its mean."""
    figure = new_figure(6.4, max(2.4, 0.3 * len(scores.cavs) + 1.2))
    axes = figure.subplots()
    deviation = scores.values.std(0)
    shown = (scores.values - scores.values.mean(0)) / np.where(deviation > 0, deviation, 1)
    axes.boxplot(shown, orientation="horizontal", whis=(5, 95), showfliers=False, medianprops={"color": BLUE, "linewidth": 2})
    axes.set_yticks(range(1, len(scores.cavs) + 1), [f"{concept} at {site}" for concept, site in scores.cavs], fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="h · v, in standard deviations from its mean\n(boxes: quartiles; whiskers: 5 to 95 %)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def tcav_figure(found: TCAV, rate: float = 0.05) -> Figure:
    """Two panels per concept, sign counts and means by site, with the band that holds 95 % of random sets."""
    names = list(dict.fromkeys(score.concept for score in found))
    across = min(len(names), _ACROSS)
    down = math.ceil(len(names) / across)
    figure = new_figure(3.4 * across + 0.8, 4.6 * down + 0.8)
    grid: Any = figure.subplots(2 * down, across, squeeze=False, sharex="col", sharey="row", height_ratios=[1.2, 1] * down)
    for number in range(across * down):
        counts, means = grid[2 * (number // across) : 2 * (number // across) + 2, number % across]
        if number >= len(names):
            counts.remove()
            means.remove()
            continue
        scores = [score for score in found if score.concept == names[number]]
        _band(counts, [(score.sign_count, score.null_sign_count, score.p_fdr <= rate) for score in scores], 0.5, rate)
        _band(means, [(score.mean, score.null_mean, score.p_mean_fdr <= rate) for score in scores], 0.0, rate)
        counts.set(title=names[number], ylim=(-0.03, 1.03))
        means.tick_params(labelbottom=True)
        _sites(means, scores)
        if number % across == 0:
            counts.set_ylabel("sign count")
            means.set_ylabel("mean of gradient · v")
    of = f"{found.scores[0].n} rows ({found.examples})"
    figure.suptitle(f"does {found.target!r} grow along concepts? gradients of {of}", fontsize=10)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _band(axes: Axes, values: Sequence[tuple[float, Array, bool]], center: float, rate: float) -> None:
    """Values by site before the band of their random sets; (value, random sets, whether it is significant) each."""
    places, shown = np.arange(len(values)), np.array([value for value, _, _ in values])
    if all(len(null) for _, null, _ in values):
        low, high = np.transpose([np.quantile(null, (0.025, 0.975)) for _, null, _ in values])
        steps = np.arange(len(values) + 1) - 0.5
        axes.stairs(np.array(high), steps, baseline=np.array(low), fill=True, color=GREY, alpha=0.3, label="95 % of random sets")
    axes.axhline(center, color=BLACK, linewidth=0.8, linestyle=":")
    axes.plot(places, shown, "-", color=BLUE, linewidth=1)
    called = np.array([significant for _, _, significant in values])
    axes.plot(places[~called], shown[~called], "o", color=BLUE, markerfacecolor="white", label="not significant")
    axes.plot(places[called], shown[called], "D", color=ORANGE, label=f"significant (FDR {rate:.0%})")
    axes.grid(axis="y", alpha=0.3)


def _sites(axes: Axes, scores: Sequence[TCAVScore] | Sequence[CAV]) -> None:
    """The axis of sites."""
    layers = {score.site: tick(score.site, score.layer) for score in scores}
    axes.set_xticks(range(len(layers)), list(layers.values()))
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_xlabel("layer" if all(score.layer is not None for score in scores) else "site")
    axes.grid(axis="y", alpha=0.3)
