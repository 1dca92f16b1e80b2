"""Checks of what was seen, on a sample of every batch: weights that do not explain the output are never recorded as if they did."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tensortape.stores.patterns import SiteName
from tensortape.stores.weights_torch import of_each_head

from ..errors import AttentionError
from .spans import Call

SAMPLED = 4  # queries
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # of the largest output; kernels of 16-bit floats round much more
COARSE = 0.1


@dataclass(frozen=True)
class Sample:
    """A few queries of one example: weights [H, R, K], values [H, K, dv], outputs [H, R, dv]."""

    example: int
    row: int
    queries: torch.Tensor
    weights: torch.Tensor
    values: torch.Tensor
    outputs: torch.Tensor

    def identity_error(self, gradient: torch.Tensor) -> float:
        """How far rowsum(A dL/dA) and rowsum(dL/dz z) are apart, relative to the largest rowsum |A dL/dA|.

        Both are D of FlashAttention (Dao et al., 2022, section 3); that they agree needs the right mask, scale and groups.

        Args:
            gradient: dL/dz, [B, H, Tq, dv].
        """
        dz = gradient.detach()[self.row][:, self.queries.to(gradient.device)].float()
        saliency = self.weights * torch.matmul(dz, self.values.transpose(1, 2))
        size = saliency.abs().sum(-1).max()
        return float((saliency.sum(-1) - (dz * self.outputs).sum(-1)).abs().max() / size) if size > 0 else 0.0


def sample(call: Call) -> Sample | None:
    """Some queries of the longest example; None where there is nothing to compare, or the call is a continued one's."""
    attended = call.attended
    if attended.v is None or attended.z is None or attended.extra_keys or attended.dropout or not call.queries.kept:
        return None
    spans, keys = call.queries.spans, call.keys.spans
    example = max(range(len(spans)), key=lambda number: len(spans[number][1]))
    (row, at), (key_row, columns) = spans[example], keys[example]
    columns = columns - call.shift
    columns = columns[columns >= 0]
    at = at[torch.linspace(0, len(at) - 1, min(SAMPLED, len(at))).long()]
    weights = torch.nan_to_num(call.tile(row, at, key_row, columns)).float()
    values = of_each_head(attended.v.detach()[key_row][:, columns.to(attended.v.device)], len(weights)).float()
    outputs = attended.z.detach()[row][:, at.to(attended.z.device)].float()
    return Sample(example, row, at, weights, values, outputs)


def explain(site: SiteName, taken: Sample, dtype: torch.dtype) -> None:
    """AttentionError unless the weights, applied to the values, give the output."""
    seen = taken.weights.sum(-1, keepdim=True) > 0  # a query that sees nothing has an output of its implementation's choice
    error = torch.where(seen, torch.matmul(taken.weights, taken.values) - taken.outputs, 0).abs().max()
    size = taken.outputs.abs().max()
    if torch.isfinite(error) and error > TOLERANCE.get(dtype, COARSE) * size:
        raise AttentionError(
            f"the attention of {site.path!r} cannot be rebuilt from what its function was given: weights times values differ from "
            f"its output by {float(error / size):.2g} of the largest value. Set the model to attn_implementation='eager', or "
            "record other sites"
        )
