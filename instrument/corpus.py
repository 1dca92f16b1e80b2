"""The texts of a recording: checked once, tokenized as they are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensortape.stores import keys
from tensortape.stores.held import Held

from .errors import BatchError
from .texts import Example, Overflow, tokenized


@dataclass(frozen=True)
class Corpus:
    """Texts with ids and labels. `most` is the number of tokens an example may have; None for any."""

    texts: list[str]
    tokenizer: Any
    ids: list[str | int]
    labels: Mapping[str, Any]
    most: int | None
    overflow: Overflow

    def examples(self) -> Iterator[Example]:
        """All texts, tokenized."""
        return tokenized(self.texts, self.tokenizer, ids=self.ids, labels=self.labels, max_length=self.most, overflow=self.overflow)

    def left(self, recorded: Held) -> list[str]:
        """The texts of which nothing is recorded yet."""
        if not len(recorded):
            return self.texts
        every = zip(self.ids, self.texts, strict=True)
        return [text for id_, text in every if id_ not in recorded and f"{id_}:0" not in recorded]

    def expected_tokens(self, texts: Sequence[str], seen: Sequence[Example]) -> float:
        """About how many tokens texts have, going by how many tokens a character makes in some examples."""
        rate = sum(len(example.tokens) for example in seen) / max(1, sum(len(example.text) for example in seen))
        most = self.most if self.overflow == "truncate" and self.most is not None else math.inf
        return sum(min(len(text) * rate, most) for text in texts)


def corpus(data: Any, tokenizer: Any, ids: Any, labels: Mapping[str, Any], max_length: int | None, overflow: Overflow) -> Corpus:
    """What `record` is given, checked. See there for the arguments."""
    texts = [data] if isinstance(data, str) else list(data)
    if not texts:
        raise BatchError("there is nothing to record: no texts were given")
    if tokenizer is None:
        raise BatchError("texts need a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)")
    if not all(isinstance(text, str) for text in texts):
        raise BatchError("with a tokenizer, data must be texts; leave the tokenizer out to record a loader of dicts")
    if overflow not in ("error", "truncate", "window"):
        raise ValueError(f"overflow is 'error', 'truncate' or 'window', not {overflow!r}")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is a number of tokens, at least 1; got {max_length}")
    limit = max_length if max_length is not None else _limit(tokenizer)
    given = {name: _label_values(name, values, len(texts)) for name, values in labels.items()}
    return Corpus(texts, tokenizer, _ids_of_texts(ids, len(texts)), given, limit, overflow)


def _ids_of_texts(ids: Any, count: int) -> list[str | int]:
    if ids is None or (isinstance(ids, str) and ids == "content"):
        return list(range(count))
    if isinstance(ids, str):
        raise BatchError(f"ids of texts are one per text, or 'content'; got {ids!r}")
    found: list[str | int] = list(keys.normalise(ids))
    if len(found) != count:
        raise BatchError(f"{len(found)} ids were given for {count} texts")
    return found


def _label_values(name: str, values: Any, count: int) -> Any:
    """Labels of texts: a function, or one entry per text; numbers in one dtype, whatever batch they come to."""
    if callable(values):
        return values
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != count:
        raise BatchError(f"labels {name!r} must be a function, or one entry per text, {count} in all; got {values!r}"[:400])
    plain = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
    return np.asarray(values) if plain else values


def _limit(tokenizer: Any) -> int | None:
    """The tokenizer's own limit; transformers writes an astronomical number where there is none."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 1 << 30 else None
