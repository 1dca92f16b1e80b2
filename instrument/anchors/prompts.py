"""A prompt of demonstrations and a query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..errors import BatchError


@dataclass(frozen=True)
class Prompt:
    """Token ids of demonstrations and a query, whose last token the query's label would follow.

    Args:
        tokens: ids [T].
        demonstrations: the span [first, last) of each, in order; what follows the last one is the query.
        labels: the position of each demonstration's label word.
        format: positions, before the query, of tokens that only give the prompt its form.

    Raises:
        BatchError: a label word outside its demonstration, spans that overlap, or no query.
    """

    tokens: tuple[int, ...]
    demonstrations: tuple[tuple[int, int], ...]
    labels: tuple[int, ...]
    format: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        spans = self.demonstrations
        if not spans or any(first[1] > second[0] for first, second in pairwise(spans)) or spans[-1][1] >= len(self.tokens):
            raise BatchError(
                f"demonstrations are spans one after another, and a query follows; got {spans} of {len(self.tokens)} tokens"
            )
        if len(self.labels) != len(spans) or any(not a <= p < b for (a, b), p in zip(spans, self.labels, strict=True)):
            raise BatchError(f"each demonstration has one label word inside it; got labels {self.labels} in the spans {spans}")
        if any(not 0 <= position < self.context for position in self.format) or set(self.format) & set(self.labels):
            raise BatchError(f"format tokens stand before the query, at {self.context}, and are no label words; got {self.format}")

    @property
    def context(self) -> int:
        """Tokens before the query."""
        return self.demonstrations[-1][1]

    @property
    def anchors(self) -> tuple[int, ...]:
        """Positions of label words and format tokens, ascending."""
        return tuple(sorted({*self.labels, *self.format}))

    def others(self, demonstration: int) -> list[int]:
        """Positions of a demonstration's tokens that are no anchors."""
        return [position for position in range(*self.demonstrations[demonstration]) if position not in self.anchors]


def alike(prompts: Sequence[Prompt], most: int) -> Iterator[list[int]]:
    """Numbers of prompts of one length, with as many tokens before the query and as many anchors; at most so many at a time."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault((len(prompt.tokens), prompt.context, len(prompt.anchors)), []).append(number)
    for numbers in groups.values():
        yield from (numbers[start : start + most] for start in range(0, len(numbers), most))


def tokens_of(prompts: Sequence[Prompt], device: torch.device) -> torch.Tensor:
    """Token ids of prompts of one length, [B, T]."""
    return torch.tensor([prompt.tokens for prompt in prompts], device=device)
