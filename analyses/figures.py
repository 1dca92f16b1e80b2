"""Pictures of results. matplotlib is the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .results import ProbeReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers.
_PROBE, _LOOKUP, _MAJORITY = "#0072B2", "#D55E00", "#666666"


def probe_figure(reports: Sequence[ProbeReport]) -> Figure:
    """One panel per report: accuracy on held-out documents by site."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'tensortape[plots]'") from None
    figure = Figure(figsize=(5.2 * len(reports), 3.8), layout="constrained")
    for axes, report in zip(figure.subplots(1, len(reports), squeeze=False)[0], reports, strict=True):
        _panel(axes, report)
    return figure


def _panel(axes: Axes, report: ProbeReport) -> None:
    places = range(len(report.scores))
    axes.plot(places, [score.accuracy for score in report.scores], "o-", color=_PROBE, label="linear probe")
    if report.type_lookup is not None:
        axes.axhline(report.type_lookup, color=_LOOKUP, linestyle="--", label="type look-up")
    axes.axhline(report.majority, color=_MAJORITY, linestyle=":", label="majority class")
    axes.set_xticks(places, [_tick(score.site, score.layer) for score in report.scores])
    axes.set(title=report.labels, xlabel="site", ylabel="accuracy on held-out documents", ylim=(0, 1.02))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right")


def _tick(site: str, layer: int | None) -> str:
    return str(layer) if layer is not None else site.rpartition(":")[0].rpartition(".")[2]
