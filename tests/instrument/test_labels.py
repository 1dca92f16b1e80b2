"""Labels as users give them: per example or per token, padded or not, numbers or text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import BATCH, DECODER_LENGTHS, LENGTHS, WIDTH, batch, llama, pair_batch, t5

from tensortape.instrument import Recorder
from tensortape.instrument.errors import BatchError
from tensortape.stores import Run

SITE = "resid_post[1]"
GRID = torch.arange(BATCH * WIDTH).reshape(BATCH, WIDTH)
KEPT = [GRID[row, :length].tolist() for row, length in enumerate(LENGTHS)]


def tags(run: Run, name: str = "token/tag") -> list[Any]:
    """A token column as one list per example."""
    return [list(run[name][number]) for number in range(len(run))]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (list("pqrst"), list("pqrst")),
        (["a longer topic", "", "ü", "d", "e"], ["a longer topic", "", "ü", "d", "e"]),
        ([1, 2, 3, 4, -100], [1, 2, 3, 4, -100]),
        (torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5]), [0.5, 1.5, 2.5, 3.5, 4.5]),
        (np.array([True, False, True, True, False]), [True, False, True, True, False]),
        (torch.arange(10).reshape(5, 2), [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]),
    ],
)
def test_one_value_per_example(recorded: Callable[..., Run], values: Any, expected: list[Any]) -> None:
    """Text, numbers, arrays, tensors, rows."""
    run = recorded(llama(), SITE, batch(), labels={"example/topic": values})
    found = [run["example/topic"][number] for number in range(BATCH)]
    assert [value.tolist() if hasattr(value, "tolist") else value for value in found] == expected


@pytest.mark.parametrize(
    "values",
    [
        GRID,
        GRID.numpy(),
        GRID.tolist(),
        KEPT,
        [torch.tensor(row) for row in KEPT],
        [np.array(row) for row in KEPT],
        tuple(map(tuple, KEPT)),
    ],
    ids=["tensor", "array", "lists", "ragged lists", "ragged tensors", "ragged arrays", "ragged tuples"],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_one_value_per_token(recorded: Callable[..., Run], values: Any, side: str) -> None:
    """[B, T] as padded as the tokens, or one sequence per example."""
    run = recorded(llama(), SITE, batch(side), labels={"token/tag": values})
    whole = isinstance(values, (torch.Tensor, np.ndarray)) or len(values[1]) == WIDTH
    expected = [GRID[row, WIDTH - length :].tolist() for row, length in enumerate(LENGTHS)] if side == "left" and whole else KEPT
    assert tags(run) == expected


def test_missing_labels_stay_missing(recorded: Callable[..., Run]) -> None:
    """-100 is kept as it is, and dropped only at pads."""
    values = GRID.masked_fill(GRID % 3 == 0, -100)
    run = recorded(llama(), SITE, batch(), labels={"token/tag": values})
    assert tags(run) == [values[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    assert -100 in tags(run)[0]


@pytest.mark.parametrize("shape", ["padded", "ragged"])
def test_text_per_token(recorded: Callable[..., Run], shape: str) -> None:
    """Text labels per token, with or without pads."""
    words = [[f"w{row}.{at}" for at in range(WIDTH if shape == "padded" else LENGTHS[row])] for row in range(BATCH)]
    run = recorded(llama(), SITE, batch(), labels={"token/word": words})
    assert tags(run, "token/word") == [[f"w{row}.{at}" for at in range(length)] for row, length in enumerate(LENGTHS)]


def test_text_per_token_with_an_empty_example(recorded: Callable[..., Run]) -> None:
    """An example without tokens has no words either."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    inputs = {"input_ids": torch.tensor([[3, 4, 1, 1], [1, 1, 1, 1], [5, 6, 7, 1]])}
    run = recorded(llama(), SITE, inputs, mask=mask, labels={"token/word": [["a", "b"], [], ["c", "d", "e"]]})
    assert tags(run, "token/word") == [["a", "b"], [], ["c", "d", "e"]]


def test_several_values_per_token(recorded: Callable[..., Run]) -> None:
    """Ragged [T_i, k] and padded [B, T, k] labels give [rows, k]."""
    grid = torch.arange(BATCH * WIDTH * 2).reshape(BATCH, WIDTH, 2)
    ragged = [grid[row, :length] for row, length in enumerate(LENGTHS)]
    for values in (ragged, grid):
        run = recorded(llama(), SITE, batch(), labels={"token/span": values})
        assert run["token/span"].shape == (sum(LENGTHS), 2)
        assert torch.equal(run["token/span"].to_torch(), torch.cat(ragged))


def test_several_values_per_token_without_pads(recorded: Callable[..., Run]) -> None:
    """The same where every position is kept."""
    grid = torch.arange(BATCH * WIDTH * 2).reshape(BATCH, WIDTH, 2)
    run = recorded(llama(), SITE, {"input_ids": batch()["input_ids"]}, labels={"token/span": grid})
    assert torch.equal(run["token/span"].to_torch(), grid.flatten(0, 1))


def test_labels_of_a_decoder(recorded: Callable[..., Run]) -> None:
    """`token.decoder/...` belongs to the decoder's tokens."""
    grid = torch.arange(BATCH * 11).reshape(BATCH, 11)
    run = recorded(t5(), "resid_post[0]", pair_batch(), labels={"token.decoder/tag": grid, "token/tag": GRID})
    assert tags(run, "token.decoder/tag") == [grid[row, :length].tolist() for row, length in enumerate(DECODER_LENGTHS)]
    assert tags(run) == KEPT


@pytest.mark.parametrize(
    ("name", "values", "shown"),
    [
        ("example/y", [1, 2, 3, 4], "one value per example, 5 in all; got 4"),
        ("example/y", [], "got 0"),
        ("example/y", 7, "got 7"),
        ("example/y", "abcde", "got 'abcde'"),
        ("token/tag", GRID[:, :6], r"5 x 7.*got lengths \[6, 6, 6, 6, 6\]"),
        ("token/tag", GRID[:4], r"got lengths \[7, 7, 7, 7\]"),
        ("token/tag", [[1]] * BATCH, r"lengths \[7, 3, 5, 1, 6\].*got lengths \[1, 1, 1, 1, 1\]"),
        ("token/tag", KEPT[:4], r"got lengths \[7, 3, 5, 1\]"),
        ("token.decoder/tag", GRID, "no tokens of table 'token.decoder', only token"),
        ("token/tag", torch.arange(BATCH), "token/tag"),
        ("token/tag", list(range(BATCH)), "token/tag"),
        ("token/tag", 3, "token/tag"),
    ],
)
def test_labels_that_do_not_fit(
    make: Callable[..., Recorder], opened: Callable[[Recorder], Run], name: str, values: Any, shown: str
) -> None:
    """The error names the label and both sizes; nothing is recorded and the next batch works."""
    model = llama()
    recorder = make(model, SITE)
    with pytest.raises(BatchError, match=shown), torch.no_grad(), recorder.batch(ids=range(BATCH), labels={name: values}):
        model(**batch())
    with torch.no_grad(), recorder.batch(ids=range(BATCH)):
        model(**batch())
    assert opened(recorder).ids == list(range(BATCH))


@pytest.mark.parametrize("name", ["topic", "words/topic", "example/", "/topic"])
def test_labels_need_a_table(make: Callable[..., Recorder], name: str) -> None:
    """The error shows the names there can be."""
    model = llama()
    recorder = make(model, SITE)
    labels = {name: list(range(BATCH))}
    refused = pytest.raises(ValueError, match="names no table; write 'example/<name>'")
    with refused, torch.no_grad(), recorder.batch(ids=range(BATCH), labels=labels):
        model(**batch())


@pytest.mark.parametrize("name", ["example/id", "example/phase", "example/start.token", "token/input_ids", "token/position"])
def test_labels_do_not_replace_what_is_recorded(make: Callable[..., Recorder], name: str) -> None:
    """A label with the name of a column that the recording itself writes is refused."""
    model = llama()
    recorder = make(model, SITE)
    values = GRID if name.startswith("token") else list(range(BATCH))
    with pytest.raises(ValueError, match=name), torch.no_grad(), recorder.batch(ids=range(BATCH), labels={name: values}):
        model(**batch())


def test_labels_that_come_and_go(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """Every batch needs the same labels; one that lacks some is refused."""
    model = llama()
    recorder = make(model, SITE)
    with torch.no_grad(), recorder.batch(ids=range(5), labels={"example/y": range(5)}):
        model(**batch())
    with pytest.raises(ValueError, match="example/y"), torch.no_grad(), recorder.batch(ids=range(5, 10)):
        model(**batch())
    assert opened(recorder).ids == list(range(5))
