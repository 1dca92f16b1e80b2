"""A run's columns as files that other tools read."""

from .exporting import FORMATS, export

__all__ = ["FORMATS", "export"]
