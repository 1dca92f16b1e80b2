"""The strongest edges of attention, as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tensortape.stores import Run

from .show import printable

Json = dict[str, Any]


def strongest(run: Run, site: str, *, examples: int, most: int, tokenizer: Any) -> list[Json]:
    """For the first examples the edges (query, key, head) with the largest weights, a query's own token and the first left out.

    Those two are where attention rests when it has nothing to look at.
    """
    attention = run.attention(int(site) if site.lstrip("-").isdigit() else site)
    return [
        {
            "id": run.ids[number],
            "site": attention.site,
            "edges": [_edge(*edge) for edge in _largest(attention, number, most, _tokens(run, number, tokenizer))],
        }
        for number in range(min(examples, len(run)))
    ]


def lines(found: list[Json]) -> Iterable[str]:
    """The same for people."""
    for example in found:
        yield f"example {printable(str(example['id']))}: strongest edges of {example['site']} (query <- key)"
        for edge in example["edges"]:
            query, key = (f"{printable(edge[end]['token'])!s:<16} at {edge[end]['place']:>4}" for end in ("query", "key"))
            yield f"  {edge['weight']:.3f}  head {edge['head']:>2}  {query}  <-  {key}"


def _largest(attention: Any, number: int, most: int, tokens: list[str]) -> list[tuple[float, int, int, int, list[str]]]:
    """Tile by tile, so that long examples need no full matrix."""
    found: list[tuple[float, int, int, int, list[str]]] = []
    for queries, tile in attention.tiles(number):
        weights = np.nan_to_num(tile)
        weights[:, np.arange(len(queries)), np.minimum(queries, weights.shape[2] - 1)] = 0
        weights[:, :, 0] = 0
        best = np.argsort(weights, axis=None)[::-1][:most]
        heads, rows, keys = np.unravel_index(best, weights.shape)
        found += [
            (float(weights[h, r, k]), int(h), int(queries[r]), int(k), tokens) for h, r, k in zip(heads, rows, keys, strict=True)
        ]
        found = sorted(found, key=lambda edge: -edge[0])[:most]
    return [edge for edge in found if edge[0] > 0]


def _edge(weight: float, head: int, query: int, key: int, tokens: list[str]) -> Json:
    ends = {"query": query, "key": key}
    return {"weight": weight, "head": head, **{name: {"place": at, "token": _token(tokens, at)} for name, at in ends.items()}}


def _token(tokens: list[str], at: int) -> str:
    return tokens[at] if at < len(tokens) else ""


def _tokens(run: Run, number: int, tokenizer: Any) -> list[str]:
    if "input_ids" not in run.tables.get("token", {}):
        return []
    ids = run["token/input_ids"][number].tolist()
    return [tokenizer.decode([token]) if tokenizer is not None else str(token) for token in ids]
