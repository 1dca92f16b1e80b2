"""Texts into batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import minilm
from transformers import ByT5Tokenizer

from tensortape.instrument.errors import BatchError
from tensortape.instrument.texts import Example, batches, pad_id, padded, tokenized

CPU = torch.device("cpu")


def examples_of(lengths: list[int]) -> list[Example]:
    """Examples of these lengths, with distinct tokens."""
    return [Example(number, "", list(range(number, number + length)), None) for number, length in enumerate(lengths)]


def tokenize(texts: list[str], tokenizer: Any = None, **options: Any) -> list[Example]:
    """Texts as MiniLM tokenizes them."""
    chosen = {"ids": list(range(len(texts))), "labels": {}, "max_length": None, "overflow": "error", **options}
    return list(tokenized(texts, tokenizer or minilm()[1], **chosen))


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 40), st.none() | st.integers(1, 6))
def test_batches(lengths: list[int], tokens: int, most: int | None) -> None:
    """All examples in order, in grids within bounds, except for single examples that are larger."""
    groups = list(batches(iter(examples_of(lengths)), tokens, most))
    assert [example.id for group in groups for example in group] == list(range(len(lengths)))
    grids = [max(len(example.tokens) for example in group) * len(group) for group in groups]
    assert all(grid <= tokens or len(group) == 1 for grid, group in zip(grids, groups, strict=True))
    assert all(1 <= len(group) <= (most or len(lengths)) for group in groups)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_padding(lengths: list[int]) -> None:
    """Tokens first, then pads; the mask tells which is which."""
    group = examples_of(lengths)
    grid = padded(group, 99, CPU)
    assert grid["input_ids"].shape == grid["attention_mask"].shape
    assert grid["input_ids"].dtype == grid["attention_mask"].dtype == torch.int64
    for row, example in enumerate(group):
        length = len(example.tokens)
        assert grid["input_ids"][row, :length].tolist() == example.tokens
        assert set(grid["input_ids"][row, length:].tolist()) <= {99}
        assert grid["attention_mask"][row].tolist() == [1] * length + [0] * (grid["attention_mask"].shape[1] - length)


def test_pad_tokens() -> None:
    """The pad token, else the end token, else anything."""
    assert pad_id(minilm()[1]) == minilm()[1].pad_token_id
    tokenizer = ByT5Tokenizer()
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id == 1
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0


def test_offsets_are_characters() -> None:
    """Spans count characters, not bytes, also past what is not ASCII."""
    [example] = tokenize(["a café is 東京!"])
    assert [example.text[start:end] for start, end in example.offsets or []] == ["", "a", "café", "is", "東", "京", "!", ""]


def test_slow_tokenizers_have_no_offsets() -> None:
    """Only fast tokenizers know where a token came from."""
    [example] = tokenize(["ab"], ByT5Tokenizer())
    assert example.offsets is None
    assert len(example.tokens) == 3


def test_labels_see_the_whole_text() -> None:
    """A function is asked once per text, before it is cut."""
    asked = []

    def label(text: str, offsets: list[tuple[int, int]]) -> list[int]:
        asked.append(text)
        return list(range(len(offsets)))

    found = tokenize(["one two three", "four"], labels={"token/at": label}, max_length=2, overflow="window")
    assert asked == ["one two three", "four"]
    assert [example.labels["token/at"] for example in found] == [[0, 1], [2, 3], [4], [0, 1], [2]]
    assert [example.id for example in found] == ["0:0", "0:2", "0:4", "1:0", "1:2"]


def test_windows_have_texts_of_their_own() -> None:
    """A window's text is what its tokens span, and its offsets count from there."""
    found = tokenize(["Some words, and more of them"], max_length=3, overflow="window")
    assert [example.text for example in found] == ["Some words", ", and more", "of them"]
    for example in found:
        spelled = [example.text[start:end] for start, end in example.offsets or []]
        assert "".join(spelled) == example.text.replace(" ", "")


def test_too_long() -> None:
    """The error names the example, its length and the limit."""
    with pytest.raises(BatchError, match="example 'second' has 5 tokens, more than max_length=4"):
        tokenize(["one", "one two three"], ids=["first", "second"], max_length=4)


def test_exactly_as_long_as_allowed() -> None:
    """A text of max_length tokens is not cut."""
    for overflow in ("error", "truncate", "window"):
        [example] = tokenize(["one two three"], max_length=5, overflow=overflow)
        assert len(example.tokens) == 5
        assert example.text == "one two three"


@pytest.mark.parametrize("overflow", ["error", "truncate"])
def test_nothing_is_a_text(overflow: str) -> None:
    """An empty text has the special tokens only."""
    [example] = tokenize([""], overflow=overflow)
    assert example.text == ""
    assert len(example.tokens) == 2
