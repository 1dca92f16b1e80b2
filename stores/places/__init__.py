"""Where a run lives: one small contract and its implementations."""

from .contract import Place
from .local import LocalPlace

__all__ = ["LocalPlace", "Place"]
