"""Whether a concept's score could be that of a random set of rows.

The customary t-test over repeated CAVs of one concept set takes the repetitions for independent draws. They share the set, which is
what varies: a random set is then called significant in 40 % of the cases or more. Here the set is the unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensortape.stores.dtypes import Array


def permutation_p(observed: float, null: Array, center: float) -> float:
    """Two-sided p-value: the share of values, the observed one among them, that are at least as far from a center (Phipson & Smyth
    2010, arXiv 1603.05766); nan without a null."""
    if not len(null):
        return float("nan")
    return float(1 + (np.abs(null - center) >= abs(observed - center)).sum()) / (1 + len(null))


def discovery_rates(p: Sequence[float]) -> list[float]:
    """The false discovery rate at which each is called significant (Benjamini & Hochberg 1995); nan for nan, which are no tests."""
    from scipy.stats import false_discovery_control  # slow to import

    found = np.array(p, np.float64)
    known = ~np.isnan(found)
    if known.any():
        found[known] = false_discovery_control(found[known])
    return [float(one) for one in found]
