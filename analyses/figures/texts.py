"""Tokens in pictures: text that shows what cannot be seen, and how wide it is."""

from __future__ import annotations

import unicodedata

_SIGNS = {"\n": "↵", "\t": "→"}


def shown(token: str) -> str:
    """A token with signs for line breaks and tabs, and escapes for other control characters."""
    return "".join(_SIGNS.get(char) or (char if unicodedata.category(char)[0] != "C" else ascii(char)[1:-1]) for char in token)


def tick(token: str) -> str:
    """A token beside an axis: without the blanks around it, unless it is nothing else."""
    return shown(token.strip(" ") or "␣" * len(token))


def width(text: str) -> int:
    """Columns of a monospaced font; 2 for the wide characters of East Asia, 0 for marks above others."""
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
