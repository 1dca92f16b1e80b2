"""Seeded samples of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensortape.stores import keys
from tensortape.stores.dtypes import Array


@dataclass(frozen=True)
class Sample:
    """A share of every example's tokens, each token drawn by itself.

    Whether a token is drawn depends on the seed, the example's id and the token's place in its example alone: not on the batch, nor
    on what else is recorded. Of two samples with one seed, the smaller is part of the larger. No example is forced in: of a short
    one there may be no token, since the tokens of short examples would else be drawn more often than others.

    Args:
        fraction: the share, between 0 and 1.
        seed: another one gives another sample.
    """

    fraction: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"sample_tokens is a share of all tokens, between 0 and 1, such as 0.1; got {self.fraction!r}")

    @property
    def name(self) -> str:
        """What tables and columns of this sample are named by."""
        return f"sample{float(self.fraction)!r}.seed{self.seed}"

    def table(self, stream: str) -> str:
        """The table of the tokens drawn of a stream, by the table of all of them."""
        return f"{stream}.{self.name}"

    def drawn(self, id_: str | int, length: int) -> Array:
        """Which tokens of an example are drawn; bool [length]."""
        key = hashlib.blake2b(f"{self.seed} ".encode() + keys.digest(id_), digest_size=16).digest()
        # Philox counts: token n gets the n-th number whatever the length, and numpy never changes the raw numbers.
        numbers = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(length)
        return np.asarray((numbers >> np.uint64(11)) * 2.0**-53 < self.fraction)

    def to_json(self) -> dict[str, Any]:
        """What the run says of it."""
        return {"fraction": self.fraction, "seed": self.seed}
