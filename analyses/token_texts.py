"""What tokens say: their characters, where the run keeps its texts, else what the recorded tokenizer makes of their ids."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from tensortape.stores import Run

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.tokenizer.json"
SPANS = ("char.start", "char.end")
PIECE = "\ufffd"


class TokenTexts:
    """The tokens of a table as text. `texts[i]` is example i, one text per token; empty where nothing is known of them.

    Blanks before a token are its own, so that tokens joined give the text; a further piece of one character is shown as `\ufffd`. A
    token of no character, such as `[CLS]`, is shown as the tokenizer names it; ids without a tokenizer are shown as numbers.
    """

    def __init__(self, run: Run, table: str = "token") -> None:
        self._run, self._columns = run, dict(run.tables.get(table, {}))

    def __getitem__(self, example: int) -> list[str]:
        named = self._named(example)
        if not self._has(example, *SPANS) or not self._has_text(example):
            return named
        text = str(self._run["example/text"][example])
        starts, ends = (self._columns[name][example] for name in SPANS)
        behind = np.maximum.accumulate(np.append(0, ends)).tolist()  # special tokens end at 0
        spans = zip(behind, starts.tolist(), ends.tolist(), strict=False)
        cut = [text[first:last] or PIECE if last > start else "" for first, start, last in spans]
        return [one or name for one, name in zip(cut, named or cut, strict=True)]

    def _named(self, example: int) -> list[str]:
        if not self._has(example, "input_ids"):
            return []
        return [self._name(token) for token in self._columns["input_ids"][example].tolist()]

    def _has(self, example: int, *names: str) -> bool:
        return all(name in self._columns and self._columns[name].present[example] for name in names)

    def _has_text(self, example: int) -> bool:
        return "text" in self._run.tables["example"] and bool(self._run["example/text"].present[example])

    @cached_property
    def _name(self) -> Callable[[int], str]:
        tokenizer = self._tokenizer
        return cache(str if tokenizer is None else lambda token: tokenizer.decode([token], skip_special_tokens=False))

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        """None where the run keeps none that is one file."""
        if TOKENIZER not in self._run.assets:
            return None
        from tokenizers import Tokenizer

        return Tokenizer.from_buffer(self._run.asset(TOKENIZER))
