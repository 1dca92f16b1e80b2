"""Whether the rows of a KV cache stay where they are between the forwards of a batch: beam search moves them."""

from __future__ import annotations

from typing import Any

import torch

from .errors import ForwardError


class CacheRows:
    """Compares the cache that a forward begins with to what the one before it left."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._left: torch.Tensor | None = None

    @property
    def is_there(self) -> bool:
        """Whether the present forward was given a cache."""
        return self._cache is not None

    def begin(self, cache: Any) -> None:
        """A forward begins; ForwardError if rows have changed places since the last one ended."""
        self._cache = cache
        found = _sums(cache)
        if found is not None and self._left is not None and found.shape == self._left.shape and not torch.equal(found, self._left):
            raise ForwardError(
                "rows of the KV cache changed places between two forwards, as beam search moves them, so which example a token "
                "belongs to is not known; generate with num_beams=1"
            )

    def end(self) -> None:
        """A forward ends."""
        self._left = _sums(self._cache)


def _sums(cache: Any) -> torch.Tensor | None:
    """A number per row that tells its keys in the first layer from those of other rows, [B]; None for a cache without any."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    return None if not isinstance(keys, torch.Tensor) or not keys.numel() else keys.detach().double().sum((1, 2, 3))
