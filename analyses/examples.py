"""Which examples an analysis is about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensortape.stores import Run
from tensortape.stores.dtypes import Array

Examples = int | Sequence[int] | Array | None


def example_mask(run: Run, examples: Examples, seed: int = 0) -> Array:
    """A mask over the examples of a run; bool.

    Args:
        run: an open run.
        examples: so many, drawn at random; or numbers of examples (as of `run.where`), or a mask over them; all if not given.
        seed: of the draw.

    Raises:
        IndexError: a number that the run does not have.
    """
    if examples is None:
        return np.ones(len(run), bool)
    if isinstance(examples, (int, np.integer)):
        order = np.random.default_rng(seed).permutation(len(run))
        return np.isin(np.arange(len(run)), order[: int(examples)])
    found = np.zeros(len(run), bool)
    found[np.asarray(examples, None if len(examples) else int)] = True
    return found
