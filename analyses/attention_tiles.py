"""A source of attention: tiles of a few queries each, of which no more than one per task is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tensortape.stores import Column
from tensortape.stores.attention import Attention
from tensortape.stores.dtypes import Array

from .attention_sites import heads_of
from .sweep import Block

TILE_BYTES = 4 << 20
PIECE_BYTES = 64 << 20
REBUILT_FROM, STORED_IN = ("q", "k", "keys", "bias", "sinks"), ("weights", "weights|size")


@dataclass(frozen=True)
class Tiles:
    """A source of one site's probabilities: each block is some queries of one example.

    `block.values[0]` is [query, head, key], float32; `block.rows` are the queries' places in their example. Tags [query, key]:
    `visible`, the keys that a query may see (where weights themselves were stored: those that any head gives any weight), and
    `follows`, the keys before it that come after an occurrence of its own token (none if token ids were not recorded).

    Args:
        attention: of the site.
        examples: bool, one per example of the run; those without attention are left out.
        ids: the token ids of queries that are keys as well.
    """

    attention: Attention
    examples: Array
    ids: Column | None = None

    @property
    def numbers(self) -> Array:
        """The examples that are read."""
        columns = self.attention.recorded.columns
        needed = REBUILT_FROM if "q" in columns else STORED_IN
        there = [columns[port].present for port in needed if port in columns]
        return np.flatnonzero(np.logical_and.reduce([self.examples, *there]))

    def pieces(self) -> list[TilesPiece]:
        """Examples, as many as make up about 64 MiB of probabilities."""
        numbers = self.numbers
        ends = np.cumsum(4 * heads_of(self.attention) * self._pairs()[numbers])
        cuts = np.unique(ends // PIECE_BYTES, return_index=True)[1]
        return [TilesPiece(self.attention, some, self.ids) for some in np.split(numbers, cuts[1:]) if len(some)]

    def _pairs(self) -> Array:
        """Entries of each example's matrix."""
        columns = self.attention.recorded.columns
        if "q" not in columns:
            return columns["weights"].lengths
        found: Array = columns["q"].lengths * self.attention.recorded.need("k").lengths
        return found


@dataclass(frozen=True)
class TilesPiece:
    """Some examples of a site, as one task reads them."""

    attention: Attention
    examples: Array
    ids: Column | None

    def blocks(self) -> Iterator[Block]:
        """Tiles of about 4 MiB."""
        for example in self.examples.tolist():
            ids = self.ids[example] if self.ids is not None and self.ids.present[example] else None
            seen = self._interval(example)
            for queries, tile in self.attention.tiles(example, TILE_BYTES):
                keys = np.arange(tile.shape[2])
                visible = _weighted(tile) if seen is None else _between(keys, seen[queries])
                follows = np.zeros_like(visible) if ids is None else _follows(ids, queries) & visible
                yield Block((tile.swapaxes(0, 1),), queries, {"visible": visible, "follows": follows})

    def _interval(self, example: int) -> Array | None:
        """The first and the last (exclusive) key that each query sees; None where weights were stored."""
        columns = self.attention.recorded.columns
        return columns["keys"][example] if "keys" in columns else None


def _weighted(tile: Array) -> Array:
    found: Array = np.any(tile > 0, 0)
    return found


def _between(keys: Array, interval: Array) -> Array:
    found: Array = (keys >= interval[:, :1]) & (keys < interval[:, 1:])
    return found


def _follows(ids: Array, queries: Array) -> Array:
    """[query, key]: whether a key comes before the query, and right after a token that is the query's."""
    found = np.zeros((len(queries), len(ids)), bool)
    found[:, 1:] = ids[queries, None] == ids[None, :-1]
    return found & (np.arange(len(ids)) < queries[:, None])
