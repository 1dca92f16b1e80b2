"""Bytes that are all here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .contract import Span


class Loaded:
    """A view of a whole object: its bytes, or a memory map, whose pages the system reads when they are touched."""

    def __init__(self, buffer: Any, *, held: int = 0) -> None:
        self.content = np.frombuffer(buffer, np.uint8)
        self.held = held

    def load(self, spans: Iterable[Span]) -> None:
        """Nothing is missing."""
