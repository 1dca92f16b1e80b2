"""What one call of an attention function was given and gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .masks import Mask

Turn = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Attended:
    """One call: tensors as the function saw them, uncopied.

    Args:
        tier: which tier showed the call: `interface`, `mha`, `sdpa` or `softmax`.
        implementation: `sdpa`, `eager`, `flash_attention_2` and so on.
        q: [B, H, Tq, d], after rotary embedding and norms. None where only the weights are known.
        k: [B, Hkv, Tk, d], before heads are repeated for their groups.
        v: [B, Hkv, Tk, dv].
        z: [B, H, Tq, dv], the output before its projection.
        weights: [B, H, Tq, Tk], where they were materialised.
        mask: which keys each query sees.
        scale: what q k is multiplied with.
        softcap: c where scores are c tanh(scores / c).
        sinks: [H] scores of one more key that has no value.
        dropout: probability that a weight was dropped.
        extra_keys: keys at the end that are no tokens (bias_k and add_zero_attn of nn.MultiheadAttention).
        cross: whether keys come from another sequence; None where only shapes can tell.
        source: the tensor in the graph whose gradient tells dL/dz, or in the softmax tier dL/dweights.
        turn: makes that gradient [B, H, Tq, dv], or [B, H, Tq, Tk].
    """

    tier: str
    implementation: str
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    z: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    mask: Mask = field(default_factory=Mask)
    scale: float = 1.0
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    dropout: float = 0.0
    extra_keys: int = 0
    cross: bool | None = None
    source: torch.Tensor | None = None
    turn: Turn = torch.detach

    @property
    def reference(self) -> torch.Tensor:
        """q, or the weights where only those are known: what tells device and dtype."""
        found = self.q if self.q is not None else self.weights
        if found is None:
            raise ValueError("an attention call needs q and k, or weights")
        return found

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Tq, Tk)."""
        batch, heads, queries, last = self.reference.shape
        return batch, heads, queries, last if self.k is None else self.k.shape[2]
