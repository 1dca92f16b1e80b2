"""The strongest edges of attention, as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tensortape.stores import Run
from tensortape.stores.attention import Attention

from .show import printable

Json = dict[str, Any]
Edge = tuple[float, int, int, int]  # weight, head, query, key


def strongest(run: Run, site: str, *, examples: int, most: int, tokenizer: Any) -> list[Json]:
    """For the first examples the edges (query, key, head) with the largest weights.

    Of self-attention a query's own token and the first token are left out: there attention rests when it has nothing to look at.
    """
    attention = run.attention(int(site) if site.lstrip("-").isdigit() else site)
    return [
        {"id": run.ids[number], "site": attention.site, "edges": _described(run, attention, number, most, tokenizer)}
        for number in range(min(examples, len(run)))
    ]


def lines(found: list[Json]) -> Iterable[str]:
    """The same for people."""
    for example in found:
        yield f"example {printable(str(example['id']))}: strongest edges of {example['site']} (query <- key)"
        for edge in example["edges"]:
            query, key = (f"{printable(edge[end]['token'])!s:<16} at {edge[end]['place']:>4}" for end in ("query", "key"))
            yield f"  {edge['weight']:.3f}  head {edge['head']:>2}  {query}  <-  {key}"


def largest(attention: Attention, number: int, most: int, **tiles: int) -> list[Edge]:
    """The edges themselves, tile by tile, so that long examples need no full matrix."""
    found: list[Edge] = []
    for queries, tile in attention.tiles(number, **tiles):
        weights = np.nan_to_num(tile)
        if not attention.facts["cross"]:
            weights[:, np.arange(len(queries)), queries] = 0
            weights[:, :, 0] = 0
        best = np.unravel_index(np.argsort(weights, axis=None)[::-1][:most], weights.shape)
        heads, rows, keys = (one.tolist() for one in best)
        edges = zip(weights[best].tolist(), heads, queries[rows].tolist(), keys, strict=True)
        found = sorted([*found, *edges], key=lambda edge: -edge[0])[:most]
    return [edge for edge in found if edge[0] > 0]


def _described(run: Run, attention: Attention, number: int, most: int, tokenizer: Any) -> list[Json]:
    queries, keys = (_tokens(run, table, number, tokenizer) for table in attention.tables)
    return [
        {"weight": weight, "head": head, "query": _end(queries, query), "key": _end(keys, key)}
        for weight, head, query, key in largest(attention, number, most)
    ]


def _end(tokens: list[str], at: int) -> Json:
    return {"place": at, "token": tokens[at] if tokens else ""}


def _tokens(run: Run, table: str, number: int, tokenizer: Any) -> list[str]:
    """An example's tokens; none where a stream has no ids (images, say)."""
    if "input_ids" not in run.tables.get(table, {}):
        return []
    ids = run[f"{table}/input_ids"][number].tolist()
    return [tokenizer.decode([token]) if tokenizer is not None else str(token) for token in ids]
