"""Neurons of a site: how they are spread, and the first ones by importance and by class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..neuron_table import NeuronTable
from .canvas import BLACK, BLUE, DIVERGING, GREY, ORANGE, SKY, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 15
_OUTLYING = 10


def neuron_figure(table: NeuronTable) -> Figure:
    """Quantiles of all neurons, beside it importance and AUC of the first ones, as far as the table has them."""
    figure, axes = panels(1 + (table.attribution is not None) + (table.selectivity is not None), height=4.4)
    left = iter(axes)
    _spread(next(left), table)
    if table.attribution is not None:
        _importance(next(left), table)
    if table.selectivity is not None:
        _selectivity(next(left), table)
    figure.suptitle(f"{table.site}, {table.spread.count:,} rows")
    return figure


def _spread(axes: Axes, table: NeuronTable) -> None:
    """Bands between the outer quantiles, of neurons by their middle one."""
    middle = len(table.shares) // 2
    order = np.argsort(table.quantiles[middle], kind="stable")
    bands, places = table.quantiles[:, order], np.arange(len(order))
    for inner, (colour, alpha) in enumerate([(SKY, 0.35), (SKY, 0.6), (BLUE, 0.6)][:middle]):
        label = f"{table.shares[inner]:.0%} to {table.shares[-1 - inner]:.0%} of rows"
        outer: dict[str, Any] = {"color": colour, "alpha": alpha, "linewidth": 0, "label": label}
        axes.fill_between(places, bands[inner], bands[-1 - inner], step="mid", **outer)
    axes.plot(places, bands[middle], color=BLACK, linewidth=1, label=f"{table.shares[middle]:.0%}")
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set(xlabel="neuron, by its median", ylabel="activation", xlim=(-0.5, len(order) - 0.5))
    reach = np.abs(table.quantiles[[0, -1]]).max(0)
    usual = float(np.nanquantile(reach, 0.9))
    if np.nanmax(reach) > _OUTLYING * usual > 0:  # a few outlying neurons must not flatten all others
        axes.set_yscale("symlog", linthresh=usual)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Above the panel, where it hides nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize="small", frameon=False)


def _importance(axes: Axes, table: NeuronTable) -> None:
    assert table.attribution is not None
    first = table.ranked("importance")[:SHOWN][::-1]
    axes.barh(np.arange(len(first)), table.attribution.importance[first], color=BLUE, label="mean |a · ∂y/∂a|")
    axes.plot(table.attribution.signed[first], np.arange(len(first)), "D", color=ORANGE, markersize=4, label="mean a · ∂y/∂a")
    axes.axvline(0, color=GREY, linewidth=0.6)
    axes.set_yticks(np.arange(len(first)), [_named(table, number) for number in first.tolist()], fontsize="small")
    axes.set(xlabel=f"importance for {table.target}", ylabel="neuron and its highest token" if table.top else "neuron")
    _legend(axes)


def _selectivity(axes: Axes, table: NeuronTable) -> None:
    assert table.selectivity is not None
    told, first = table.selectivity, table.ranked("selectivity")[:SHOWN]
    shown = axes.imshow(told.auc[:, first].T, cmap=DIVERGING, vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(np.arange(len(first)), [_named(table, number) for number in first.tolist()], fontsize="small")
    axes.set_xticks(np.arange(len(told.classes)), told.classes, rotation=30, ha="right", fontsize="small")
    axes.set(xlabel=told.labels, ylabel="neuron and its highest token" if table.top else "neuron")
    axes.figure.colorbar(shown, ax=axes, label="AUC against the other classes")


def _named(table: NeuronTable, neuron: int) -> str:
    """A neuron's number and the text in which it is highest."""
    text = table.top.of(neuron)[0].text if table.top is not None else None
    return str(neuron) if text is None else f"{text.strip()[:12]!r} {neuron}".replace("$", r"\$")
