"""Runs on disk: `open_run` reads one, `RunWriter` writes one."""

from .columns import Column, Table
from .errors import StoreError
from .reader import Run, open_run
from .verify import Damage, Verification
from .writer import RunWriter

__all__ = ["Column", "Damage", "Run", "RunWriter", "StoreError", "Table", "Verification", "open_run"]
