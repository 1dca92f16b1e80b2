"""What all pictures share: a figure without a window, and colours that colour-blind readers tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours.
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, BLACK, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#666666",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, BLACK)
SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"


def new_figure(width: float = 5.2, height: float = 3.8) -> Figure:
    """An empty figure, in inches; drawn without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'tensortape[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int, width: float = 5.2, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """A figure of several panels side by side."""
    figure = new_figure(width * count, height)
    axes: Any = figure.subplots(1, count, squeeze=False)
    return figure, list(axes[0])
