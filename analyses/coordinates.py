"""Coordinates in which a logistic regression is easy to minimise: its curvature in them is about 1 in every direction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from tensortape.stores.dtypes import Array

from .gram import Sums


class Frame:
    """Between parameters of standardised features, [width, d + 1] with the bias last, and weights of rows less a shift."""

    def __init__(self, sums: Sums) -> None:
        self.shift, self.offset, self.scale = sums.shift, sums.offset, sums.deviation

    def weights(self, parameters: Array) -> tuple[Array, Array]:
        """Weights [d, width] and bias [width] of rows less the shift."""
        weights = (parameters[:, :-1] / self.scale).T
        return weights, parameters[:, -1] - self.offset @ weights

    def slope(self, by_weights: Array, by_bias: Array) -> Array:
        """Slope by parameters, from slopes by weights [width, d] and bias [width] of rows less the shift."""
        standard = (by_weights - np.outer(by_bias, self.offset)) / self.scale
        return np.concatenate([standard, by_bias[:, None]], 1)

    def standardised(self, rows: Array) -> Array:
        """[n, d + 1] of rows less the shift [n, d]: standardised, and 1."""
        found = np.ones((len(rows), rows.shape[1] + 1), rows.dtype)
        found[:, :-1] = (rows - self.offset.astype(rows.dtype)) / self.scale.astype(rows.dtype)
        return found


class Coordinates:
    """Of parameters [width, d + 1], for a curvature that is known block by block: one block for all of them, or one per class.

    Args:
        blocks: symmetric and positive definite, [width (d + 1)] squared if there is one, else [d + 1] squared each.
    """

    def __init__(self, blocks: Sequence[Array]) -> None:
        self._factors = [cholesky(block, lower=True) for block in blocks]

    def parameters(self, point: Array) -> Array:
        """Of a point, of the same shape."""
        return self._each(point, lambda factor, part: solve_triangular(factor, part, lower=True, trans="T"))

    def point(self, parameters: Array) -> Array:
        """Of parameters."""
        return self._each(parameters, lambda factor, part: factor.T @ part)

    def slope(self, by_parameters: Array) -> Array:
        """Slope by coordinates, from that by parameters."""
        return self._each(by_parameters, lambda factor, part: solve_triangular(factor, part, lower=True))

    def _each(self, values: Array, function: object) -> Array:
        parts = np.split(values.reshape(-1), len(self._factors))
        found = [function(factor, part) for factor, part in zip(self._factors, parts, strict=True)]  # type: ignore[operator]
        return np.concatenate(found).reshape(values.shape)


def bound(sums: Sums, penalty: float, width: int) -> Coordinates:
    """From Boehning's bound (1992): the curvature of softmax regression is at most 1/2, of two classes 1/4, of the covariance."""
    share = 0.25 if width == 1 else 0.5
    correlation = sums.covariance / np.outer(sums.deviation, sums.deviation)
    block = np.zeros((len(correlation) + 1,) * 2)
    block[:-1, :-1] = share * correlation + penalty * np.eye(len(correlation))
    block[-1, -1] = share
    return Coordinates([block] * width)
