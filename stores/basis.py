"""Bases of principal components, which columns of coordinates are read with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .dtypes import Array
from .errors import DamagedError


@dataclass(frozen=True, eq=False)
class Basis:
    """k orthonormal directions, and the mean that coordinates are counted from.

    Args:
        mean: [*feature], float32.
        components: [k, *feature], float32, by falling variance.
        variance: [k] of the sample along each component, float64.
        total: variance of the sample in all directions.
        tokens: how many tokens the sample had.
    """

    mean: Array
    components: Array
    variance: Array
    total: float
    tokens: int

    @property
    def explained(self) -> float:
        """The share of the sample's variance that the components explain."""
        return float(self.variance.sum() / self.total)

    def reconstructed(self, coordinates: Array) -> Array:
        """[n, *feature] float32 from coordinates [n, k]: what they came from, but for what lies outside of the components."""
        found: Array = np.tensordot(coordinates.astype(np.float32), self.components, 1) + self.mean
        return found

    @cached_property
    def content(self) -> bytes:
        """The basis as a safetensors file."""
        from safetensors.numpy import save

        numbers = {"variance": self.variance, "total": np.array([self.total]), "tokens": np.array([self.tokens])}
        return save({"mean": self.mean, "components": self.components, **numbers})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `content`."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def asset(self) -> str:
        """The name of its file in a run; another basis has another one."""
        return f"basis.{self.digest[:32]}.safetensors"

    @classmethod
    def from_content(cls, content: bytes, digest: str, where: str) -> Basis:
        """The reverse of `content`; DamagedError if it is not what has the digest."""
        from safetensors.numpy import load

        if hashlib.sha256(content).hexdigest() != digest:
            raise DamagedError(f"{where}: the basis is not the one that was committed (its digest does not match)")
        try:
            found = load(content)
            return cls(found["mean"], found["components"], found["variance"], float(found["total"][0]), int(found["tokens"][0]))
        except Exception as error:
            raise DamagedError(f"{where}: not a basis ({error})") from None

    def __repr__(self) -> str:
        shape = list(self.components.shape)
        return f"<Basis {shape}: {self.explained:.1%} of the variance of {self.tokens} tokens>"
