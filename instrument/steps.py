"""Forwards of one batch: usually one; with a KV cache several that continue one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from tensortape.stores.patterns import SiteName

from .capture import Capture
from .errors import ForwardError
from .streams import Stream, in_order, joined

Key = tuple[SiteName, str | None]  # a site, and how it is reduced


@dataclass
class Step:
    """What one forward showed."""

    streams: dict[str, Stream] = field(default_factory=dict)
    captures: dict[Key, Capture] = field(default_factory=dict)


def merged(steps: Sequence[Step]) -> Step:
    """All forwards as one: rows of an example follow one another, whichever forward they come from."""
    if len(steps) == 1:
        return steps[0]
    names = dict.fromkeys(name for step in steps for name in step.streams)
    streams = {name: joined(_distinct([step.streams[name] for step in steps if name in step.streams])) for name in names}
    keys = dict.fromkeys(key for step in steps for key in step.captures)
    return Step(streams, {key: _merged([step.captures[key] for step in steps if key in step.captures]) for key in keys})


def _distinct(streams: Sequence[Stream]) -> list[Stream]:
    """An encoder's tokens are the same in every forward of its decoder."""
    return list({id(stream): stream for stream in streams}.values())


def _merged(captures: Sequence[Capture]) -> Capture:
    first = captures[0]
    if len(captures) == 1:
        return first
    if first.lengths is None:
        return _of_examples(captures)
    if first.site.is_attention and first.suffix not in (None, "entropy"):
        raise ForwardError(f"{first.column} cannot be computed over several forwards; record the whole sequence in one")
    found = _square(captures) if first.keys is not None else captures
    lengths = [taken.lengths or [] for taken in found]
    total = [sum(counts) for counts in zip(*lengths, strict=True)]
    return replace(captures[-1], rows=in_order([taken.rows for taken in found], lengths), lengths=total)


def _of_examples(captures: Sequence[Capture]) -> Capture:
    """One value per example: facts that do not change, else there is no one value."""
    first = captures[0]
    if not all(torch.equal(taken.rows, first.rows) for taken in captures):
        raise ForwardError(
            f"{first.column} has one value per example, but {len(captures)} forwards gave several; record one forward"
        )
    return first


def _square(captures: Sequence[Capture]) -> list[Capture]:
    """Pairs of queries with the keys there were, padded to pairs with all keys there will be: later keys have no weight."""
    found = []
    key_counts: list[list[int]] = [taken.about["keys"] for taken in captures]
    final = [max(counted) for counted in zip(*key_counts, strict=True)]
    for taken, counts in zip(captures, key_counts, strict=True):
        pieces = torch.split(taken.rows, taken.lengths or [])
        grown = [
            torch.nn.functional.pad(piece.reshape(-1, count, *piece.shape[1:]), (0, 0, 0, most - count)).flatten(0, 1)
            if count
            else piece
            for piece, count, most in zip(pieces, counts, final, strict=True)
        ]
        found.append(replace(taken, rows=torch.cat(grown), lengths=[len(piece) for piece in grown]))
    return found
