"""Attention rollout: attention through all layers together, residual connections included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensortape.stores import Run
from tensortape.stores.attention import Attention
from tensortape.stores.dtypes import Array

from .attention_sites import Sites, attention_sites, size_of
from .errors import AnalysisError
from .results import Result
from .token_texts import TokenTexts

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def rollout(run: Run, example: int, *, sites: Sites = None, every: bool = False) -> Rollout:
    """How much of each token reaches each position, were attention all that mixes them (Abnar & Zuidema 2020, arXiv 2005.00928).

    The product over layers of (A + I) / 2, later layers from the left, where A is the mean over heads and I the residual
    connection. Rows of A that do not sum to 1 (learned sinks) are normalised with I; a query that sees nothing keeps to itself.

    Args:
        run: an open run with attention.
        example: its number.
        sites: the self-attention of one stack, in order of its layers; all sites if not given.
        every: keep the product after each layer, not only after the last: [layer, query, key] of the example's tokens, in float32.

    Raises:
        AttentionNotRecordedError: no such attention. MissingExampleError: none of this example.
        AnalysisError: the sites are not the self-attention of one stack.
    """
    found = attention_sites(run, sites)
    _check_one_stack(found)
    queries, _ = size_of(found[0], example)
    product: Array = np.eye(queries, dtype=np.float32)
    kept: list[Array] = []
    for attention in found:
        product = _mixed(attention, example, product)
        kept = [*(kept if every else ()), product]
    return Rollout(
        id=run.ids[example],
        sites=tuple(one.site for one in (found if every else found[-1:])),
        layers=len(found),
        mass=np.stack(kept),
        tokens=tuple(TokenTexts(run, found[0].tables[0])[example]),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Rollout(Result):
    """What reaches each position of an example.

    Args:
        id: of the example.
        sites: after which sites; the last one, or all.
        layers: how many layers were multiplied up to the last.
        mass: [site, query, key], rows sum to 1; float32.
        tokens: the texts of the example's tokens; empty where they are not known.
    """

    id: str | int
    sites: tuple[str, ...]
    layers: int
    mass: Array
    tokens: tuple[str, ...]

    def to_pandas(self) -> pd.DataFrame:
        """One row per site, query and key, with the texts of both where they are known."""
        from .attention_map import matrix_frame

        return matrix_frame("site", self.sites, self.mass, (self.tokens, self.tokens)).rename(columns={"value": "mass"})

    def plot(self) -> Figure:
        """A heat map for each site. Needs the extra `plots`."""
        from .figures.heads import matrices_figure

        title = f"rollout over {self.layers} layers, example {self.id}"
        return matrices_figure(self.mass, self.sites, (self.tokens, self.tokens), title, "share of the token (key)")

    def __repr__(self) -> str:
        return f"<Rollout over {self.layers} layers of example {self.id!r}: {self.mass.shape[1]} tokens>"


def _mixed(attention: Attention, example: int, product: Array) -> Array:
    """(A + I) / 2 times what came before, a few queries at a time."""
    found = np.empty_like(product)
    for queries, tile in attention.tiles(example):
        rows = np.nan_to_num(tile.mean(0))
        rows[np.arange(len(queries)), queries] += 1
        found[queries] = (rows / rows.sum(1, keepdims=True)) @ product
    return found


def _check_one_stack(found: Sequence[Attention]) -> None:
    tables = {table for attention in found for table in attention.tables}
    if len(tables) > 1 or any(attention.facts["cross"] for attention in found):
        raise AnalysisError(
            "rollout multiplies the self-attention of one stack; select one, such as sites='encoder.attention', of "
            f"{', '.join(attention.site for attention in found)}"
        )
