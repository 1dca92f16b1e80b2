"""Scores of tokens: text on coloured ground, or bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tensortape.stores.dtypes import Array

from ..token_scores import TokenScores
from .canvas import BLUE, DIVERGING, ORANGE, SEQUENTIAL, new_figure
from .texts import shown, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS, _MOST_LINES = 88, 60
_POINTS, _ASPECT = 9.0, 0.602  # the font's size, and how wide a character of it is beside its height


def score_figure(scores: TokenScores, number: int) -> Figure:
    """The n-th example: its tokens on ground coloured by score; bars where the tokens are not known."""
    tokens, values = scores.text(number), scores[number]
    if not len(values):
        raise ValueError(f"example {scores.ids[number]!r} has no tokens to show")
    title = f"{scores.method} ({scores.reduce}) of {scores.target} at {scores.site}, example {scores.ids[number]}"
    return _text(tokens, values, title, signed=scores.signed) if tokens else _bars(values, title)


def _text(tokens: Sequence[str], values: Array, title: str, *, signed: bool) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    largest = float(np.nanmax(np.abs(values))) or 1.0
    scale = ScalarMappable(Normalize(-largest if signed else 0, largest), DIVERGING if signed else SEQUENTIAL)
    placed = [one for one in _placed(tokens) if one[2] < _MOST_LINES]
    lines, left_out = 1 + placed[-1][2], len(tokens) - 1 - placed[-1][0]
    figure = new_figure(_COLUMNS * _ASPECT * _POINTS / 72 + 0.4, lines * 1.7 * _POINTS / 72 + 1.2)
    axes = figure.subplots()
    for number, column, line, text in placed:
        colour = scale.to_rgba(values[number])
        axes.add_patch(Rectangle((column, line), width(text), 0.9, color=colour, linewidth=0))
        axes.text(column, line + 0.45, text, color=_ink(colour), family="monospace", size=_POINTS, va="center", parse_math=False)
    axes.set(xlim=(0, _COLUMNS), ylim=(lines, 0))
    axes.axis("off")
    more = f"; {left_out} tokens are left out" if left_out else ""
    axes.set_title(title + more, fontsize="medium", loc="left", parse_math=False)
    figure.colorbar(scale, ax=axes, orientation="horizontal", label="score", shrink=0.5, aspect=40)
    return figure


def _placed(tokens: Sequence[str]) -> Iterator[tuple[int, int, int, str]]:
    """Number, column, line and text of each token, or of what of it stands on one line; lines break where they are full, too."""
    column = line = 0
    for number, token in enumerate(tokens):
        for part in token.splitlines(keepends=True):
            text = shown(part)
            if column and column + width(text) > _COLUMNS:
                column, line = 0, line + 1
            yield number, column, line, text
            column += width(text)
            if part.endswith("\n"):
                column, line = 0, line + 1


def _ink(ground: Any) -> str:
    """Black on light ground, white on dark."""
    return "black" if np.dot(ground[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"


def _bars(values: Array, title: str) -> Figure:
    figure = new_figure(min(max(0.12 * len(values), 5.2), 14), 3.2)
    axes = figure.subplots()
    axes.bar(np.arange(len(values)), values, color=[BLUE if value >= 0 else ORANGE for value in values.tolist()], width=0.9)
    axes.set(xlabel="token", ylabel="score")
    axes.set_title(title, fontsize="medium", parse_math=False)
    return figure
