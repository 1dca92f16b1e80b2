"""Texts into batches: tokenizing, windows, labels on characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tensortape.stores.names import is_ragged, split

from .errors import BatchError

Overflow = Literal["error", "truncate", "window"]
Offsets = list[tuple[int, int]]
LabelText = Callable[[str, Offsets], Sequence[Any]]


@dataclass(frozen=True)
class Example:
    """One text, or one window of it, tokenized: ids, character offsets [T, 2] (None from a slow tokenizer), labels."""

    id: str | int
    text: str
    tokens: list[int]
    offsets: Offsets | None
    labels: dict[str, Any] = field(default_factory=dict)


def tokenized(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    ids: Sequence[str | int],
    labels: Mapping[str, Any],
    max_length: int | None,
    overflow: Overflow,
) -> Iterator[Example]:
    """Tokenized examples, in order. See `record` for the arguments."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    for number, (id_, text) in enumerate(zip(ids, texts, strict=True)):
        encoded = tokenizer(text, return_offsets_mapping=fast, verbose=False)
        example = Example(id_, text, list(encoded["input_ids"]), _offsets(encoded) if fast else None)
        given = {name: _label(name, values, number, example) for name, values in labels.items()}
        yield from _fitted(Example(id_, text, example.tokens, example.offsets, given), max_length, overflow)


def batches(examples: Iterator[Example], tokens: int, most: int | None) -> Iterator[list[Example]]:
    """Examples in groups of at most `most`, whose padded grid, longest length times count, holds at most so many tokens."""
    group: list[Example] = []
    width = 0
    for example in examples:
        width = max(width, len(example.tokens))
        if group and (width * (len(group) + 1) > tokens or len(group) == most):
            yield group
            group, width = [], len(example.tokens)
        group.append(example)
    if group:
        yield group


def padded(group: list[Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [B, T], padded on the right so that every model's positions are right.

    A batch is never as wide as it is long, so that its shape tells which axis is which.
    """
    width = max(len(example.tokens) for example in group)
    width += width == len(group)
    rows = [example.tokens + [pad] * (width - len(example.tokens)) for example in group]
    mask = [[1] * len(example.tokens) + [0] * (width - len(example.tokens)) for example in group]
    return {
        "input_ids": torch.tensor(rows, dtype=torch.long, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.long, device=device),
    }


def labels_of(group: list[Example], *, keep_text: bool) -> dict[str, Any]:
    """Labels of a batch of texts; with `keep_text` also the texts and each token's character span."""
    found: dict[str, Any] = {name: [example.labels[name] for example in group] for name in group[0].labels}
    if keep_text:
        found["example/text"] = [example.text for example in group]
        if all(example.offsets is not None for example in group):
            offsets = [torch.tensor(example.offsets, dtype=torch.int32).reshape(-1, 2) for example in group]
            found["token/char.start"], found["token/char.end"] = [o[:, 0] for o in offsets], [o[:, 1] for o in offsets]
    return found


def pad_id(tokenizer: Any) -> int:
    """A token to pad with; masked positions are never attended to nor recorded, so any will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


def _fitted(example: Example, max_length: int | None, overflow: Overflow) -> Iterator[Example]:
    length = len(example.tokens)
    if max_length is None or length <= max_length:
        if overflow == "window":
            yield _window(example, 0, length, named=max_length is not None)
        else:
            yield example
    elif overflow == "truncate":
        yield _cut(example, 0, max_length, example.id)
    elif overflow == "window":
        yield from (_window(example, start, start + max_length, named=True) for start in range(0, length, max_length))
    else:
        raise BatchError(
            f"example {example.id!r} has {length} tokens, more than max_length={max_length}; pass overflow='truncate' to cut it or "
            "overflow='window' to make an example of every max_length tokens"
        )


def _window(example: Example, start: int, stop: int, *, named: bool) -> Example:
    """A window is an example of its own; `example/document` keeps which text it is of."""
    cut = _cut(example, start, stop, f"{example.id}:{start}" if named else example.id)
    return Example(cut.id, cut.text, cut.tokens, cut.offsets, {**cut.labels, "example/document": str(example.id)})


def _cut(example: Example, start: int, stop: int, id_: str | int) -> Example:
    offsets = None if example.offsets is None else example.offsets[start:stop]
    labels = {name: value[start:stop] if is_ragged(split(name)[0]) else value for name, value in example.labels.items()}
    if not offsets:
        return Example(id_, example.text, example.tokens[start:stop], offsets, labels)
    first, last = offsets[0][0], max(end for _, end in offsets)
    moved = [(max(begin - first, 0), max(end - first, 0)) for begin, end in offsets]
    return Example(id_, example.text[first:last], example.tokens[start:stop], moved, labels)


def _label(name: str, values: Any, number: int, example: Example) -> Any:
    """One example's label: from a sequence over texts, or a function of its text and character offsets."""
    table, _ = split(name)
    value = values(example.text, example.offsets or []) if callable(values) else values[number]
    if is_ragged(table) and len(value) != len(example.tokens):
        raise BatchError(
            f"labels {name!r} of example {example.id!r} are {len(value)}, but the text has {len(example.tokens)} tokens"
        )
    return value


def _offsets(encoded: Any) -> Offsets:
    return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
