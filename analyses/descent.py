"""L-BFGS that asks for a value and a slope at one point at a time, so that many of them can share each reading of the rows."""

from __future__ import annotations

from collections import deque

import numpy as np

from tensortape.stores.dtypes import Array

PAIRS = 20
_ENOUGH = 1e-4  # of the decrease that the slope promises (Armijo)
_NOISE = 1e-9  # relative error of a value: differences below it say nothing


class Descent:
    """Minimises a smooth convex function (Nocedal & Wright, Numerical Optimization, algorithms 7.4 and 7.5).

    The function is expected to be scaled so that its curvature is at most about 1: a first step of the whole slope then decreases
    it. `trial` is where the function is to be evaluated next; `tell` takes what came out.
    """

    def __init__(self, start: Array) -> None:
        self.trial = start
        self.at = start
        self.value = np.inf
        self.slope = np.zeros_like(start)
        self._direction = np.zeros_like(start)
        self._step = 1.0
        self._pairs: deque[tuple[Array, Array, float]] = deque(maxlen=PAIRS)

    def tell(self, value: float, slope: Array) -> None:
        """The value and the slope at `trial`."""
        promised = self._step * float((self._direction * self.slope).sum())
        if np.isfinite(self.value) and value > self.value + _ENOUGH * promised + _NOISE * abs(self.value):
            self._step *= 0.5
        else:
            self._accept(value, slope)
        self.trial = self.at + self._step * self._direction

    @property
    def remaining(self) -> float:
        """About how far the value is above the minimum: what a step of the whole slope would gain at a curvature of 1."""
        return 0.5 * float((self.slope**2).sum())

    def _accept(self, value: float, slope: Array) -> None:
        moved, turned = self.trial - self.at, slope - self.slope
        curved = float((moved * turned).sum())
        if np.isfinite(self.value) and curved > 1e-10 * float((turned**2).sum()):
            self._pairs.append((moved, turned, curved))
        self.at, self.value, self.slope = self.trial, value, slope
        self._direction, self._step = -self._inverse_curvature(slope), 1.0

    def _inverse_curvature(self, slope: Array) -> Array:
        """The two loops."""
        found, shares = slope.copy(), []
        for moved, turned, curved in reversed(self._pairs):
            share = float((moved * found).sum()) / curved
            shares.append(share)
            found -= share * turned
        if self._pairs:
            _, turned, curved = self._pairs[-1]
            found *= curved / float((turned**2).sum())
        for (moved, turned, curved), share in zip(self._pairs, reversed(shares), strict=True):
            found += (share - float((turned * found).sum()) / curved) * moved
        return found
