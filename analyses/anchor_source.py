"""Prompts read for anchors: one measurement of each at an attention site, a range of examples at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tensortape.stores import Run
from tensortape.stores.attention import Attention
from tensortape.stores.dtypes import Array

from .anchor_positions import AnchorPositions
from .errors import AnchorError
from .sweep import Accumulator, Block, Job, sweep

Prompt = tuple[int, Array, Array, int]  # example, positions of label words, their classes, target
Measure = Callable[[Attention, Prompt], Array]

_PAIRS = 1 << 22  # of queries and keys, for each piece


@dataclass(frozen=True)
class Prompts:
    """A source: prompts at an attention site, each of which is one row, what `measure` makes of it."""

    site: Attention
    positions: AnchorPositions
    measure: Measure

    def pieces(self) -> list[PromptsPiece]:
        """Ranges of examples with about as many pairs of tokens each."""
        pairs = np.cumsum((self.positions.targets + 1) ** 2)
        begins = np.unique(pairs // _PAIRS, return_index=True)[1]
        edges = np.append(begins, len(self.positions)).tolist()
        return [PromptsPiece(self.site, self.positions.part(start, stop), self.measure, start) for start, stop in pairwise(edges)]


@dataclass(frozen=True)
class PromptsPiece:
    """Some prompts, as one task reads them."""

    site: Attention
    positions: AnchorPositions
    measure: Measure
    first: int

    def blocks(self) -> Iterator[Block]:
        """All of them in one block."""
        rows = np.stack([self.measure(self.site, prompt) for prompt in self.positions])
        yield Block((rows,), np.arange(self.first, self.first + len(rows)), {})


class Gathered(Accumulator):
    """All rows of a source's first column, in order; for rows that are few and short."""

    state = ("rows",)
    rows: Array

    def update(self, block: Block) -> None:
        """Keep the rows."""
        self.add("rows", block.values[0])

    def add(self, name: str, value: Array) -> None:
        """Put rows behind those there are."""
        held = getattr(self, name)
        setattr(self, name, np.concatenate([held, value]) if held.ndim else value)

    def finalize(self) -> Array:
        """[n, *measured]."""
        return self.rows


def measured(sites: Sequence[Attention], positions: AnchorPositions, measure: Measure, executor: Executor | None) -> list[Array]:
    """What a measure makes of every prompt at every site, [n, *measured] each.

    Raises:
        AnchorError: there are no prompts, or a site attends between other tables than the positions are of.
    """
    if not len(positions):
        raise AnchorError("there are no prompts with label words to measure")
    for site in sites:
        check_table(site, positions)
    jobs = [Job(Prompts(site, positions, measure), (Gathered(),)) for site in sites]
    return [rows for (rows,) in sweep(jobs, executor, title="anchors")]


def check_table(site: Attention, positions: AnchorPositions) -> None:
    """AnchorError if a site does not attend within the table that the positions count rows of."""
    if site.tables != (positions.table, positions.table):
        raise AnchorError(
            f"the positions count rows of {positions.table!r}, but {site.site} attends from {site.tables[0]!r} to "
            f"{site.tables[1]!r}; choose other sites, or find positions with table={site.tables[0]!r}"
        )


def layer_of(run: Run, site: Attention) -> int | None:
    """The layer of an attention site, where one is known."""
    columns = site.recorded.columns
    aliases = run.aliases(columns.get("q") or columns["weights"])
    return next((alias.layer for alias in aliases if alias.layer is not None), None)


def ticks(sites: Sequence[str], layers: Sequence[int | None]) -> list[str]:
    """Short names of sites, for axes."""
    return [site if layer is None else str(layer) for site, layer in zip(sites, layers, strict=True)]
