"""How alike sites are, as a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..similarities import Similarity
from .canvas import SEQUENTIAL, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WRITTEN = 16  # a matrix of no more sites than that has its numbers written into it


def similarity_figure(found: Similarity) -> Figure:
    """The matrix, in the order of the sites."""
    down, across = found.matrix.shape
    cell = 0.42 if max(down, across) <= WRITTEN else 0.24
    figure = new_figure(2.4 + cell * max(across, 5), 1.6 + cell * max(down, 5))
    axes = figure.subplots()
    shown = axes.imshow(found.matrix, cmap=SEQUENTIAL, vmin=0, vmax=1)
    axes.set_xticks(np.arange(across), found.other_names, rotation=45, ha="right", fontsize="small")
    axes.set_yticks(np.arange(down), found.names, fontsize="small")
    axes.set(xlabel="site of the second run" if found.joined else "site", ylabel="site")
    axes.set_title(f"{found.kind} CKA\n{found.estimate}", fontsize="small")
    figure.colorbar(shown, ax=axes, label="CKA", shrink=0.8)
    for row, column in np.ndindex(down, across) if max(down, across) <= WRITTEN else ():
        value = found.matrix[row, column]
        colour = "white" if value < 0.5 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=colour)
    return figure
