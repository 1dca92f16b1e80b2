"""What attention heads look at: a few numbers per head."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.attention import Attention
from tensortape.stores.dtypes import Array
from tensortape.stores.errors import MissingExampleError

from .attention_sites import Sites, alias_of, attention_sites, heads_of
from .attention_tiles import Tiles
from .examples import Examples, example_mask
from .gram import chosen
from .head_report import STATISTICS, HeadStats, SiteHeads
from .sweep import Accumulator, Block, Job, sweep

_TINY = np.finfo(np.float32).tiny


def head_stats(
    run: Run, *, sites: Sites = None, examples: Examples = None, seed: int = 0, executor: Executor | None = None
) -> HeadStats:
    """Statistics of every attention head, each a mean over queries, of all examples alike. No full matrix is ever held.

    A query q is a token of an example, A[q, k] what a head gives to key k, and n the number of keys that the query may see. Queries
    that see fewer than two keys (the first token of causal attention) are left out everywhere: they have no choice.

    `entropy`: -sum_k A ln A, in nats. `normalised_entropy`: the same divided by ln n, so that 1 is attention to all alike.
    `distance`: sum_k A |q - k|, in tokens. `sink`: A[q, 0], the attention to the first token, over later queries that see it.
    `previous`: A[q, q - 1], over queries that see the token before them. `itself`: A[q, q], over queries that see themselves.
    `induction`: the sum of A[q, k] over earlier keys k < q that come right after an earlier occurrence of the query's token
    (token[k - 1] = token[q]), over queries that see such a key; the prefix-matching score of Olsson et al. (2022, arXiv
    2209.11895), who measure it on a random sequence of tokens that is repeated, where there is nothing else to go by.

    The same definitions hold for attention to both sides. Queries and keys of cross-attention are places in different sequences:
    there `distance`, `previous`, `itself` and `induction` are NaN, and `sink` is the attention of all queries to the first key.
    `induction` is NaN where token ids were not recorded. Of rows that do not sum to 1 (learned sinks) the rest counts nowhere.

    Args:
        run: an open run with attention.
        sites: layers, names or patterns of attention sites; all if not given.
        examples: so many, drawn by `seed`; numbers of examples; or a mask. All if not given.
        seed: of the draw.
        executor: who reads and computes; see `sweep`. The numbers are the same whoever does.

    Raises:
        AttentionNotRecordedError: no such attention. MissingExampleError: none of these examples.
    """
    here = example_mask(run, examples, seed)
    found = attention_sites(run, sites)
    sources = [Tiles(attention, here, _ids(run, attention)) for attention in found]
    jobs = [Job(source, (_sums(source),)) for source in sources]
    made = sweep(jobs, executor, title="reading attention")
    return HeadStats(tuple(_site(source, *sums) for source, [sums] in zip(sources, made, strict=True)))


class HeadSums(Accumulator):
    """Sums over queries of each statistic [statistic, head + 1], and how many queries they are over [statistic].

    The last head is none of the model's: it attends to all that it sees alike.

    Args:
        heads: how many there are.
        cross: whether queries and keys are places in different sequences.
    """

    state = ("totals", "queries")
    totals: Array
    queries: Array

    def __init__(self, heads: int, *, cross: bool) -> None:
        self.heads, self.cross = heads, cross

    def update(self, block: Block) -> None:
        """Take the queries of a tile into account."""
        here = block.tags["visible"].sum(1) > 1
        weights, visible, follows = (chosen(one, here) for one in (block.values[0], block.tags["visible"], block.tags["follows"]))
        count, apart = visible.sum(1), block.rows[here, None] - np.arange(visible.shape[1])
        looks = [np.nonzero(mask & visible) for mask in (*self._places(apart), follows)]
        distance = np.abs(apart) * (not self.cross)
        uniform = (visible / np.maximum(count, 1)[:, None])[:, None]
        self.add("totals", np.concatenate([_totals(one, count, distance, looks) for one in (weights, uniform)], 1))
        told = [len(np.unique(queries)) for queries, _ in looks]
        self.add("queries", np.array([len(count), len(count), len(count) * (not self.cross), *told]))

    def finalize(self) -> tuple[Array, Array]:
        """Means [statistic, head + 1], NaN of no queries, and queries [statistic]."""
        totals = np.broadcast_to(self.totals, (len(STATISTICS), self.heads + 1))  # a plain 0 if there was no tile
        queries = np.broadcast_to(self.queries, len(STATISTICS)).astype(np.int64)
        with np.errstate(invalid="ignore"):
            return totals / queries[:, None], queries

    def _places(self, apart: Array) -> tuple[Array, Array, Array]:
        """[query, key], where the first token is looked at from behind it, the token before the query, and the query itself.

        Args:
            apart: how far a query is behind a key [query, key].
        """
        first = np.zeros(apart.shape, bool)
        first[:, :1] = True
        nowhere = np.zeros(apart.shape, bool)
        return (first, nowhere, nowhere) if self.cross else (first & (apart > 0), apart == 1, apart == 0)


def _totals(weights: Array, count: Array, distance: Array, looks: Sequence[tuple[Array, ...]]) -> Array:
    """[statistic, head] of weights [query, head, key], summed over queries; float64.

    Args:
        count: keys that each query sees [query].
        distance: between them [query, key].
        looks: the entries (queries, keys) that the statistics of shares are the sums of.
    """
    entropy = -(weights * np.log(np.maximum(weights, _TINY))).sum(2, dtype=np.float64)
    far = (weights * distance.astype(np.float32)[:, None]).sum((0, 2), np.float64)
    shares = [weights[queries, :, keys].sum(0, dtype=np.float64) for queries, keys in looks]
    return np.stack([entropy.sum(0), (entropy / np.log(count)[:, None]).sum(0), far, *shares])


def _sums(source: Tiles) -> HeadSums:
    if not len(source.numbers):
        raise MissingExampleError(f"no example, of those asked for, has attention at {source.attention.site}")
    return HeadSums(heads_of(source.attention), cross=_is_cross(source.attention))


def _is_cross(attention: Attention) -> bool:
    return bool(attention.facts["cross"]) or attention.tables[0] != attention.tables[1]


def _ids(run: Run, attention: Attention) -> Column | None:
    """The ids of the tokens that are queries and keys; None where they are not, or were not recorded."""
    table = run.tables[attention.tables[0]]
    return table["input_ids"] if not _is_cross(attention) and "input_ids" in table else None


def _site(source: Tiles, means: Array, queries: Array) -> SiteHeads:
    alias = alias_of(source.attention)
    return SiteHeads(
        site=source.attention.site,
        stack=alias.stack,
        kind="cross_attention" if _is_cross(source.attention) else "attention",
        layer=alias.layer,
        examples=len(source.numbers),
        queries=queries,
        heads=means[:, :-1].T.copy(),
        uniform=means[:, -1].copy(),
    )
