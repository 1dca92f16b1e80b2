"""Linear classifiers from sums alone: no reading beside the one that the sums come from."""

from __future__ import annotations

import numpy as np

from tensortape.stores.dtypes import Array

from .gram import ClassTotals, Sums
from .tasks import Probe


def lda(sums: Sums, classes: ClassTotals) -> Probe:
    """Linear discriminant analysis: Gaussian classes with one covariance and the priors of the rows (Fisher 1936; Rao 1948).

    The same classifier as scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr")`. Classes without rows are never predicted.
    """
    priors = classes.counts / classes.counts.sum()
    means = classes.offsets - sums.offset
    within = sums.covariance - (means * priors[:, None]).T @ means
    weights = np.linalg.lstsq(within, means.T, rcond=None)[0]
    with np.errstate(divide="ignore"):
        bias = -0.5 * (means * weights.T).sum(1) + np.log(priors)
    return Probe(sums.mean, weights, np.maximum(bias, np.finfo(np.float32).min))


def ridge(sums: Sums, classes: ClassTotals, strength: float) -> Probe:
    """Least squares on targets of 1 for a row's class and -1 for the others, with a penalty (Hoerl & Kennard 1970).

    The classifier of scikit-learn's `Ridge(alpha=strength)` on such targets and standardised features.
    """
    scale = sums.deviation
    targets = 2 * classes.counts / sums.count - 1
    # Of centred features only their class sums matter: X^T Y = 2 * (sums of each class), as the rows less their mean add up to 0.
    moments = 2 * (classes.totals - classes.counts[:, None] * sums.offset) / scale
    square = sums.count * sums.covariance / np.outer(scale, scale)
    weights = np.linalg.solve(square + strength * np.eye(len(scale)), moments.T) / scale[:, None]
    return Probe(sums.mean, weights, targets)


def mean_difference(classes: ClassTotals) -> Array:
    """Mean of class 1 less mean of class 0; [d]."""
    found: Array = classes.offsets[1] - classes.offsets[0]
    return found


def lda_directions(sums: Sums, differences: Array, strength: float) -> Array:
    """Normals of the planes that tell each of several pairs of classes apart, all pairs being divisions of the same rows.

    Linear discriminant analysis with a penalty: the covariance of standardised features is taken to be larger by strength / rows in
    every direction, which makes it the direction of ridge regression. Without a penalty it is that of scikit-learn's
    `LinearDiscriminantAnalysis`, as the covariance within two classes and that of all rows give the same (Sherman & Morrison 1950).

    Args:
        sums: of all rows.
        differences: mean of one class less that of the other; [pairs, d].
        strength: of the penalty; `alpha` of scikit-learn's `Ridge`.

    Returns:
        [pairs, d].
    """
    scale = sums.deviation
    square = sums.covariance / np.outer(scale, scale) + strength / sums.count * np.eye(len(scale))
    moments = (differences / scale).T
    solved = np.linalg.solve(square, moments) if strength else np.linalg.lstsq(square, moments, rcond=None)[0]
    found: Array = (solved / scale[:, None]).T
    return found
