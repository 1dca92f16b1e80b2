"""An accumulator whose worker is killed once, for tests of interrupted sweeps. Worker processes import it from here."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np

from tensortape.analyses.sweep import Accumulator, Block
from tensortape.stores.dtypes import Array


class Deadly(Accumulator):
    """Sums rows, and notes the first row of every block; from row `at` on it kills its process while the file `trap` is there."""

    state = ("total",)
    total: Array
    key = "deadly"

    def __init__(self, trap: Path, at: int, notes: Path) -> None:
        self.trap, self.at, self.notes = trap, at, notes

    def update(self, block: Block) -> None:
        """Add up a block."""
        if block.rows[0] >= self.at and self.trap.exists():
            self.trap.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        with self.notes.open("a") as notes:
            notes.write(f"{block.rows[0]}\n")
        self.add("total", block.values[0].sum(0, dtype=np.float64))

    def finalize(self) -> Array:
        """The sum."""
        return self.total
