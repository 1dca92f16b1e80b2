"""Rows as people read them: a token in its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tensortape.stores import Column
from tensortape.stores.chosen_rows import ChosenRows
from tensortape.stores.dtypes import Array

from .spaces import Space

Decode = Callable[[Sequence[int]], str]
TEXT, STARTS, ENDS, TOKENS = "text", "char.start", "char.end", "input_ids"
_AT_ONCE = 256  # examples whose texts are in memory at a time


@dataclass(frozen=True)
class Passage:
    """A row in its text.

    Args:
        id: of the example. example: its number in the run.
        token, last: the first token of the row and the one behind its last, counted in the example; -1 for a row of no tokens.
        before, text, after: what the row says and a little of what is around it; None where the run has no text.
        start, end: the characters of the example's text; -1 where the run has none.
    """

    id: str | int
    example: int
    token: int
    last: int
    before: str | None = None
    text: str | None = None
    after: str | None = None
    start: int = -1
    end: int = -1


def read_passages(space: Space, rows: Array, context: int, decode: Decode | None) -> tuple[Passage, ...]:
    """Passages of some rows of a space.

    What they say is cut out of `example/text` by `char.start` and `char.end`, where all examples of the space have these columns;
    else it is what `decode` makes of the token ids.

    Args:
        rows: numbers, rising.
        context: characters before and after.
        decode: the text of some token ids.
    """
    ids, example = space.run.ids, space.owner[rows]
    first, last = _tokens(space, rows)
    begin = (np.cumsum(space.lengths) - space.lengths)[np.searchsorted(np.flatnonzero(space.examples), example)]
    counts = np.full((2, len(rows)), -1) if space.table == "example" else np.array([first - begin, last - begin])
    plain = [Passage(ids[number], number, *tokens) for number, *tokens in zip(example.tolist(), *counts.tolist(), strict=True)]
    if "text" in space.run.tables["example"] and (spans := _spans(space, first, last)) is not None:
        return _cut(space.run["example/text"], plain, *spans, context)
    tokens = _whole(space, TOKENS)
    if decode is None or tokens is None:
        return tuple(plain)
    return tuple(_decoded(tokens, one, context, decode) for one in plain)


def _tokens(space: Space, rows: Array) -> tuple[Array, Array]:
    """First and last (exclusive) row of the table that each row is made of."""
    return (rows, rows + 1) if space.merged is None else (space.merged.first[rows], space.merged.last[rows])


def _spans(space: Space, first: Array, last: Array) -> tuple[Array, Array] | None:
    """Characters of each row; None where they were not recorded. Rows that are examples are of all of their text."""
    text = space.run["example/text"]
    if not text.present[space.examples].all():
        return None
    if space.table == "example":
        return np.zeros(len(first), np.int64), np.full(len(first), np.iinfo(np.int32).max)
    starts, ends = _whole(space, STARTS), _whole(space, ENDS)
    if starts is None or ends is None:
        return None
    return ChosenRows(starts, space.examples).take(first), ChosenRows(ends, space.examples).take(last - 1)


def _whole(space: Space, name: str) -> Column | None:
    """A column of the space's table, if it has values for all examples of the space."""
    found = space.run.tables[space.table].get(name)
    return found if found is not None and found.present[space.examples].all() else None


def _cut(texts: Column, plain: Sequence[Passage], starts: Array, ends: Array, context: int) -> tuple[Passage, ...]:
    """Passages cut out of the examples' texts, which are read a few at a time."""
    row_of = np.cumsum(texts.present) - 1
    found: list[Passage] = []
    examples = np.array([one.example for one in plain])
    for group in np.array_split(np.arange(len(plain)), 1 + len(plain) // _AT_ONCE):
        numbers, inverse = np.unique(examples[group], return_inverse=True)
        read = texts.rows(row_of[numbers])
        found += [
            _passage(plain[at], str(read[number]), int(starts[at]), int(ends[at]), context)
            for at, number in zip(group.tolist(), inverse.tolist(), strict=True)
        ]
    return tuple(found)


def _passage(plain: Passage, text: str, start: int, end: int, context: int) -> Passage:
    end = min(end, len(text))
    before, after = text[max(start - context, 0) : start], text[end : end + context]
    return Passage(plain.id, plain.example, plain.token, plain.last, before, text[start:end], after, start, end)


def _decoded(tokens: Column, plain: Passage, context: int, decode: Decode) -> Passage:
    """A token has at least one character, so that as many tokens as characters are enough."""
    length = int(tokens.lengths[plain.example])
    first, stop = max(plain.token - context, 0), min(plain.last + context, length)
    ids = tokens.within(plain.example, first, stop).tolist()
    inside = slice(plain.token - first, plain.last - first)
    before, text, after = decode(ids[: inside.start]), decode(ids[inside]), decode(ids[inside.stop :])
    return Passage(plain.id, plain.example, plain.token, plain.last, before[max(len(before) - context, 0) :], text, after[:context])
