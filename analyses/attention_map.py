"""One example's attention, with the tokens it is between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tensortape.stores import Run
from tensortape.stores.attention import Chosen
from tensortape.stores.dtypes import Array

from .attention_sites import heads_of, size_of
from .results import Result
from .token_texts import TokenTexts

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def attention_map(
    run: Run, site: str | int, example: int, *, heads: Chosen = None, queries: Chosen = None, keys: Chosen = None
) -> AttentionMap:
    """Attention probabilities of one example at one site, with the texts of its tokens.

    Args:
        run: an open run with attention.
        site: a module path, an alias with a layer, or a layer's number; as for `Run.attention`.
        example: its number.
        heads, queries, keys: numbers, a slice or one number; all if not given. Of a long example the whole is large.

    Raises:
        AttentionNotRecordedError: no such attention. MissingExampleError: none of this example.
    """
    attention = run.attention(site, heads=heads, queries=queries, keys=keys)
    sizes = (heads_of(attention), *size_of(attention, example))
    heads, queries, keys = (_numbers(count, one) for count, one in zip(sizes, (heads, queries, keys), strict=True))
    of_queries, of_keys = (TokenTexts(run, table)[example] for table in attention.tables)
    return AttentionMap(
        site=attention.site,
        id=run.ids[example],
        heads=heads,
        queries=queries,
        keys=keys,
        weights=attention[example],
        query_tokens=tuple(of_queries[n] for n in queries) if of_queries else (),
        key_tokens=tuple(of_keys[n] for n in keys) if of_keys else (),
    )


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMap(Result):
    """Attention of one example.

    Args:
        site, id: of the site, and of the example.
        heads, queries, keys: their numbers.
        weights: [head, query, key], float32; NaN for queries that see nothing.
        query_tokens, key_tokens: their texts; empty where they are not known.
    """

    site: str
    id: str | int
    heads: Array
    queries: Array
    keys: Array
    weights: Array
    query_tokens: tuple[str, ...]
    key_tokens: tuple[str, ...]

    def to_pandas(self) -> pd.DataFrame:
        """One row per head, query and key, with the texts of both where they are known."""
        tokens = (self.query_tokens, self.key_tokens)
        frame = matrix_frame("head", self.heads, self.weights, tokens).rename(columns={"value": "weight"})
        frame["query"], frame["key"] = self.queries[frame["query"]], self.keys[frame["key"]]
        return frame

    def plot(self) -> Figure:
        """A heat map for each head. Needs the extra `plots`."""
        from .figures.heads import matrices_figure

        titles = [f"head {head}" for head in self.heads.tolist()]
        tokens = (self.query_tokens, self.key_tokens)
        return matrices_figure(self.weights, titles, tokens, f"{self.site}, example {self.id}", "attention")

    def __repr__(self) -> str:
        heads, queries, keys = self.weights.shape
        return f"<AttentionMap of {self.site}, example {self.id!r}: {heads} heads, {queries} queries, {keys} keys>"


def matrix_frame(name: str, of: Sequence[Any] | Array, values: Array, tokens: tuple[Sequence[str], Sequence[str]]) -> pd.DataFrame:
    """Matrices [n, query, key] as a table, `of` what each of them is of."""
    import pandas as pd

    at = np.indices(values.shape).reshape(3, -1)
    frame = pd.DataFrame({name: np.asarray(of)[at[0]], "query": at[1], "key": at[2], "value": values.reshape(-1)})
    for side, texts, places in zip(("query", "key"), tokens, at[1:], strict=True):
        if texts:
            frame[f"{side}_token"] = np.asarray(texts, object)[places]
    return frame


def _numbers(count: int, chosen: Chosen) -> Array:
    """What was chosen out of so many, as numbers."""
    if chosen is None:
        return np.arange(count)
    return np.atleast_1d(np.arange(count)[chosen if isinstance(chosen, slice) else np.asarray(chosen, int)])
