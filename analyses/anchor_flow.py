"""How much information flows into label words, and from them into the target (Wang et al., EMNLP 2023, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from tensortape.stores import Run
from tensortape.stores.attention import Attention, Part
from tensortape.stores.dtypes import Array

from .anchor_positions import AnchorPositions
from .anchor_source import Prompt, layer_of, measured
from .errors import AnchorError
from .results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Heads = Literal["sum_abs", "each"]
FLOWS = ("S_wp", "S_pq", "S_ww")


@dataclass(frozen=True, eq=False, repr=False)
class AnchorFlow(Result):
    """Mean significance of three kinds of flow, from the saliency I = A * dL/dA of each layer; the diagonal counts as 0.

    With p_k the label words, k = 1 ... C, and q the target: S_wp is the mean of I over pairs (p_k, j < p_k), text to label words;
    S_pq that over (q, p_k), label words to target; S_ww that over all other pairs (i, j < i <= q). A mean over no pairs is NaN.

    Args:
        sites: attention modules. layers: their layers, None where not known.
        values: S_wp, S_pq, S_ww of each prompt, float64 [n, site, 3]; of each head, [n, site, head, 3].
        examples: the prompts' numbers in the run; int64 [n].
        target: what was differentiated.
        heads: `sum_abs`, I is the magnitude of the sum over heads (as the paper's code has it); `each`, that of each head.
    """

    sites: tuple[str, ...]
    layers: tuple[int | None, ...]
    values: Array
    examples: Array
    target: str
    heads: Heads

    @cached_property
    def mean(self) -> Array:
        """Over prompts; [site, 3] or [site, head, 3]."""
        found: Array = self.values.mean(0)
        return found

    @property
    def error(self) -> Array:
        """Standard error of the mean; NaN for one prompt."""
        count = len(self.values)
        if count < 2:
            return np.full_like(self.mean, np.nan)
        found: Array = self.values.std(0, ddof=1) / np.sqrt(count)
        return found

    @property
    def shares(self) -> Array:
        """The mean of each flow over the sum of the three means of its layer, as the paper draws it."""
        found: Array = self.mean / self.mean.sum(-1, keepdims=True)
        return found

    def to_pandas(self) -> pd.DataFrame:
        """One row per site (and head): the three flows, their standard errors and shares."""
        import pandas as pd

        places = list(np.ndindex(self.mean.shape[:-1]))
        return pd.DataFrame([self._row(place) for place in places])

    def plot(self) -> Figure:
        """Shares of the three flows by layer. Needs the extra `plots`."""
        from .figures.anchors import anchors_figure

        return anchors_figure(self, None)

    def __repr__(self) -> str:
        first, last = (dict(zip(FLOWS, row.round(3).tolist(), strict=True)) for row in self._by_site[[0, -1]])
        return (
            f"<AnchorFlow of {self.target!r}, {len(self.examples)} prompts: shares {first} at {self.sites[0]}, {last} at the last>"
        )

    @property
    def _by_site(self) -> Array:
        """Shares of each site, [site, 3]; of the mean over heads where heads are apart."""
        whole = self.mean if self.heads == "sum_abs" else self.mean.mean(1)
        found: Array = whole / whole.sum(-1, keepdims=True)
        return found

    def _row(self, place: tuple[int, ...]) -> dict[str, object]:
        site, *head = place
        return {
            "site": self.sites[site],
            "layer": self.layers[site],
            **({"head": head[0]} if head else {}),
            **dict(zip(FLOWS, self.mean[place].tolist(), strict=True)),
            **{f"{name}_error": value for name, value in zip(FLOWS, self.error[place].tolist(), strict=True)},
            **{f"{name}_share": value for name, value in zip(FLOWS, self.shares[place].tolist(), strict=True)},
            "prompts": len(self.examples),
        }


def anchor_flow(
    run: Run,
    positions: AnchorPositions,
    *,
    target: str = "loss",
    sites: Sequence[str | int] | None = None,
    heads: Heads = "sum_abs",
    assume: Literal["sum"] | None = None,
    executor: Executor | None = None,
) -> AnchorFlow:
    """Flow into label words and out of them, by layer, from recorded `attention.grad`.

    Args:
        run: with `attention.grad` of a target that depends on the prediction at q alone, such as the cross-entropy of the label
            over the label words.
        positions: see `anchor_positions`.
        target: what was differentiated.
        sites: attention sites as `run.attention` takes them; all by default.
        heads: see `AnchorFlow`.
        assume: as for `run.saliency`.
        executor: as for `sweep`.

    Raises:
        AttentionNotRecordedError, GradientError (see `run.saliency`); AnchorError.
    """
    if heads not in ("sum_abs", "each"):
        raise ValueError(f"heads is 'sum_abs' or 'each', not {heads!r}")
    chosen = [run.saliency(site, target, assume=assume) for site in (run.attention_sites if sites is None else sites)]
    found = measured(chosen, positions, partial(flow, each=heads == "each"), executor)
    if len({rows.shape for rows in found}) > 1:
        raise AnchorError(f"the sites have different numbers of heads ({[rows.shape[1] for rows in found]}); take them one by one")
    layers = tuple(layer_of(run, site) for site in chosen)
    return AnchorFlow(tuple(site.site for site in chosen), layers, np.stack(found, 1), positions.examples, target, heads)


def flow(saliency: Attention, prompt: Prompt, *, each: bool) -> Array:
    """S_wp, S_pq, S_ww of one prompt; float64 [3], of each head [head, 3]."""
    example, labels, _, target = prompt
    until = Part(queries=slice(0, target + 1))
    sums = np.zeros((1, len(FLOWS)))
    for queries, tile in replace(saliency, part=until).tiles(example):
        sums = sums + _sums(np.abs(tile if each else tile.sum(0, keepdims=True)), queries, labels, target)
    into, out_of = labels.sum(), len(labels)
    pairs = np.array([into, out_of, target * (target + 1) // 2 - into - out_of], float)
    with np.errstate(invalid="ignore"):
        found: Array = sums / pairs
    return found if each else found[0]


def _sums(magnitude: Array, queries: Array, labels: Array, target: int) -> Array:
    """Sums of [head, R, key] over the pairs of each kind; float64 [head, 3]."""
    below = np.where(np.arange(magnitude.shape[2]) < queries[:, None], magnitude, 0).astype(np.float64)
    of_label, of_target = np.isin(queries, labels), queries == target
    into = below[:, of_label].sum((1, 2))
    out_of = below[:, of_target][:, :, labels].sum((1, 2))
    below[:, of_label] = 0
    below[:, np.flatnonzero(of_target)[:, None], labels] = 0
    return np.stack([into, out_of, below.sum((1, 2))], 1)
