"""Accuracy of probes by site, beside what it is to be held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..probe_report import LabelSet, ProbeReport, ProbeScore, tick
from .canvas import BLUE, GREEN, GREY, ORANGE, PURPLE, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def probe_figure(report: ProbeReport) -> Figure:
    """One panel per set of labels: accuracy on held-out groups by site, with its interval."""
    figure, axes = panels(len(report.sets))
    for panel, one in zip(axes, report.sets, strict=True):
        _panel(panel, one, [score for score in report.scores if score.labels == one.name], report.groups)
    return figure


def _panel(axes: Axes, one: LabelSet, scores: Sequence[ProbeScore], groups: str) -> None:
    places = list(range(len(scores)))
    lines: list[tuple[list[float | None], str, str, str]] = [
        ([score.accuracy for score in scores], "o-", BLUE, "linear probe"),
        ([score.random_init for score in scores], "s-", PURPLE, "same, untrained model"),
        ([score.control for score in scores], "^-", GREEN, "control task"),
    ]
    for values, style, colour, label in lines:
        known = [value for value in values if value is not None]
        if len(known) == len(places):
            axes.plot(places, known, style, color=colour, label=label)
    axes.fill_between(places, [score.low for score in scores], [score.high for score in scores], color=BLUE, alpha=0.2, linewidth=0)
    if one.type_lookup is not None:
        axes.axhline(one.type_lookup, color=ORANGE, linestyle="--", label="type look-up")
    axes.axhline(one.majority, color=GREY, linestyle=":", label="majority class")
    axes.set_xticks(places, [tick(score.site, score.layer) for score in scores])
    where = groups.rpartition("/")[2] + "s" if groups != "example/id" else "examples"
    axes.set(title=one.name, xlabel="layer (or site)", ylabel=f"accuracy on held-out {where}", ylim=(0, 1.02))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
