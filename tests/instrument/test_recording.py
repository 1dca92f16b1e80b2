"""record(): a whole data set in one call, texts or a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    BATCH,
    VOCABULARY,
    batch,
    gpt2,
    hook_count,
    llama,
    minilm,
    observed,
    packed,
    sdpa_decoder,
    seeded,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tensortape.instrument import record as record_
from tensortape.instrument.errors import BatchError, SiteNotFoundError
from tensortape.stores import Run, open_run
from tensortape.stores.errors import KeyRepeatedError, RunExistsError

TEXTS = [
    "A tape is recorded once.",
    "and read!",
    "for as long as anybody cares to look at it, again and again",
    "unbelievably",
    "the 2nd of three (or 4)",
]
SITE = "resid_post[-1]"
MASK = batch()["attention_mask"]


@pytest.fixture
def to(tmp_path: Path) -> Path:
    """Where a run goes."""
    return tmp_path / "run.zarr"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Where a second run goes."""
    return tmp_path / "other.zarr"


@pytest.fixture
def record(to: Path) -> Callable[..., Run]:
    """record(), to a folder of the test's own."""

    def call(model: Any, data: Any, **options: Any) -> Run:
        return record_(model, data, **{"to": to, "sites": SITE, "durability": "rename", **options})

    return call


@pytest.fixture
def texts(record: Callable[..., Run]) -> Callable[..., Run]:
    """record() of texts by MiniLM."""

    def call(data: Any = TEXTS, **options: Any) -> Run:
        model, tokenizer = minilm()
        return record(model, data, **{"tokenizer": tokenizer, **options})

    return call


def tokens_of(text: str) -> list[int]:
    """What MiniLM's tokenizer makes of a text."""
    return minilm()[1](text)["input_ids"]


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, which adds nothing to a text."""
    known = {word: number for number, word in enumerate(("?", *vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# --- texts ----------------------------------------------------------------------------------------------------------------------


def test_texts(texts: Callable[..., Run], to: Path) -> None:
    """Every text is an example; its rows are what the model computes of it, its ids count from 0."""
    run = texts()
    model, _ = minilm()
    assert run.path == to
    assert run.ids == list(range(5))
    for number, text in enumerate(TEXTS):
        tokens = tokens_of(text)
        assert run["token/input_ids"][number].tolist() == tokens
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(torch.tensor(run[SITE][number]), alone, rtol=1e-4, atol=1e-5)
    assert run.verify().ok


def test_rows_are_those_of_the_batch(texts: Callable[..., Run]) -> None:
    """Bit for bit what the model computes of the same padded batch."""
    model, tokenizer = minilm()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    grid = observed(model, {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}, {"encoder.layer.5"})
    assert torch.equal(texts()[SITE].to_torch(), packed(grid["encoder.layer.5"][0][1], inputs["attention_mask"]))


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_tokens": 20}, {"batch_tokens": 1}, {"batch_size": 1}])
def test_batches_only_change_rounding(texts: Callable[..., Run], other: Path, options: dict[str, int]) -> None:
    """However texts are batched, examples, tokens and spans are the same and values agree."""
    run, whole = texts(**options), texts(to=other)
    for name in ("token/input_ids", "token/char.start", "token/char.end", "token/position"):
        assert np.array_equal(run[name].rows(), whole[name].rows())
    assert [run["example/text"][number] for number in range(5)] == TEXTS
    np.testing.assert_allclose(run[SITE].rows(), whole[SITE].rows(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("data", [tuple(TEXTS), np.array(TEXTS), iter(TEXTS)], ids=["tuple", "array", "iterator"])
def test_texts_in_any_container(texts: Callable[..., Run], data: Any) -> None:
    """A tuple, an array, an iterator of texts."""
    run = texts(data)
    assert [run["example/text"][number] for number in range(5)] == TEXTS


def test_one_text(texts: Callable[..., Run]) -> None:
    """A string is one text."""
    run = texts("only this")
    assert run.ids == [0]
    assert run["example/text"][0] == "only this"


def test_a_square_batch_of_texts(texts: Callable[..., Run]) -> None:
    """That there are as many texts as tokens in the longest one is nothing a caller could see coming."""
    data = ["one two three", "one", "one two", "a", "b"]
    assert max(len(tokens_of(text)) for text in data) == len(data)
    run = texts(data)
    assert [len(run[SITE][number]) for number in range(5)] == [len(tokens_of(text)) for text in data]


@pytest.mark.parametrize("lengths", [(1,), (1, 2), (2, 2, 3), (1, 1, 1, 4), (4, 3, 2, 1)])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_first_batches_of_any_shape(record: Callable[..., Run], lengths: tuple[int, ...], batch_size: int | None) -> None:
    """However many texts there are and however short they are, the first batch shows which axis is which."""
    data = [" ".join("abcd"[:length]) for length in lengths]
    run = record(llama(), data, tokenizer=words(*"abcd"), batch_size=batch_size)
    assert run.tables["token"].lengths.tolist() == list(lengths)
    assert run[SITE].shape == (sum(lengths), run[SITE].shape[1])


def test_resuming_at_a_square_batch(record: Callable[..., Run]) -> None:
    """The first batch that a resumed recording computes need not be the first of all."""
    lengths = (4, 2, 1, 3, 1, 2)
    data = [" ".join("abcd"[:length]) for length in lengths]
    options = {"tokenizer": words(*"abcd"), "batch_size": 3}
    record(llama(), data[:3], **options)
    run = record(llama(), data, mode="resume", **options)
    assert run.tables["token"].lengths.tolist() == list(lengths)


@pytest.mark.parametrize("ids", [list("vwxyz"), (9, 8, 7, 6, 5), range(3, 8), np.arange(5) * 2, torch.arange(5) + 40])
def test_ids_of_texts(texts: Callable[..., Run], ids: Any) -> None:
    """One per text, as a sequence, an array or a tensor."""
    assert texts(ids=ids).ids == (ids.tolist() if hasattr(ids, "tolist") else list(ids))


def test_ids_by_content(texts: Callable[..., Run], other: Path) -> None:
    """The same text has the same id wherever it is recorded."""
    first = texts(ids="content").ids
    again = texts(TEXTS[::-1], ids="content", to=other).ids
    assert first == again[::-1]
    assert len(set(first)) == 5


@pytest.mark.parametrize(("ids", "error"), [(list("abcd"), BatchError), (list("abcda"), KeyRepeatedError), ("id", BatchError)])
def test_ids_that_do_not_fit(texts: Callable[..., Run], ids: Any, error: type[Exception]) -> None:
    """Too few, repeated, or the name of a key that texts do not have."""
    with pytest.raises(error):
        texts(ids=ids)


# --- text and spans -------------------------------------------------------------------------------------------------------------


def spelled(run: Run, number: int) -> list[str]:
    """The characters of each token of an example."""
    text = run["example/text"][number]
    spans = zip(run["token/char.start"][number].tolist(), run["token/char.end"][number].tolist(), strict=True)
    return [text[start:end] for start, end in spans]


def plain(tokens: Any) -> list[str]:
    """Tokens as their characters; special ones have none."""
    _, tokenizer = minilm()
    special = set(tokenizer.all_special_ids)
    return [
        "" if token in special else word.removeprefix("##")
        for token, word in zip(tokens, tokenizer.convert_ids_to_tokens(tokens), strict=True)
    ]


def test_texts_and_spans(texts: Callable[..., Run]) -> None:
    """`text[start:end]` is the token, for every token of every example."""
    run = texts()
    assert [run["example/text"][number] for number in range(5)] == TEXTS
    for number in range(5):
        tokens = run["token/input_ids"][number].tolist()
        assert [word.lower() for word in spelled(run, number)] == plain(tokens)
        assert any(word for word in plain(tokens))


def test_without_texts(texts: Callable[..., Run]) -> None:
    """keep_text=False stores neither text nor spans."""
    run = texts(keep_text=False)
    assert "text" not in run.tables["example"]
    assert set(run.tables["token"]) == {"input_ids", "position", "encoder.layer.5:out"}


def test_a_tokenizer_without_offsets(record: Callable[..., Run]) -> None:
    """A slow tokenizer knows no spans; the text itself is kept."""
    run = record(llama(vocab_size=400), ["ab", "ünï", "c"], tokenizer=ByT5Tokenizer())
    assert [run["example/text"][number] for number in range(3)] == ["ab", "ünï", "c"]
    assert "char.start" not in run.tables["token"]
    assert run.tables["token"].lengths.tolist() == [3, 6, 2]


def test_a_text_without_tokens(record: Callable[..., Run]) -> None:
    """An empty text is an example without rows."""
    run = record(llama(), ["a b c", "", "b", "c a"], tokenizer=words("a", "b", "c"))
    assert run.tables["token"].lengths.tolist() == [3, 0, 1, 2]
    assert [run["example/text"][number] for number in range(4)] == ["a b c", "", "b", "c a"]
    assert run["token/input_ids"].rows().tolist() == [1, 2, 3, 2, 3, 1]


def test_tokenizer_files(texts: Callable[..., Run], tmp_path: Path) -> None:
    """The run keeps what the tokenizer is made of."""
    run = texts()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in run.assets:
        (folder / name.removeprefix("tokenizer.")).write_bytes(run.asset(name))
    again = AutoTokenizer.from_pretrained(folder)
    assert [again(text)["input_ids"] for text in TEXTS] == [tokens_of(text) for text in TEXTS]


# --- labels of texts ------------------------------------------------------------------------------------------------------------


def test_labels_in_lists(texts: Callable[..., Run]) -> None:
    """One entry per text: a value, or a sequence over its tokens."""
    counted = [list(range(len(tokens_of(text)))) for text in TEXTS]
    run = texts(labels={"example/topic": list("pqrst"), "example/y": [0.5, 1.0, 2.0, 3.0, 4.0], "token/at": counted}, batch_size=2)
    assert [run["example/topic"][number] for number in range(5)] == list("pqrst")
    assert run["example/y"].rows().tolist() == [0.5, 1, 2, 3, 4]
    assert [run["token/at"][number].tolist() for number in range(5)] == counted


def test_labels_of_mixed_numbers(texts: Callable[..., Run]) -> None:
    """What kind of number a label is is told from all texts, not from those of each batch."""
    run = texts(labels={"example/y": [0.5, 1, 2, 3, 4]}, batch_size=2)
    assert run["example/y"].rows().tolist() == [0.5, 1, 2, 3, 4]


def test_labels_in_arrays(texts: Callable[..., Run]) -> None:
    """An array or a tensor over texts."""
    run = texts(labels={"example/a": np.arange(5) * 2, "example/b": torch.arange(5.0), "example/c": torch.eye(5)})
    assert run["example/a"].rows().tolist() == [0, 2, 4, 6, 8]
    assert run["example/b"].rows().tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(run["example/c"].rows(), np.eye(5))


def test_labels_from_functions(texts: Callable[..., Run]) -> None:
    """A function of (text, offsets) makes an example's labels, per example or per token."""
    labels = {
        "example/length": lambda text, offsets: len(text),
        "token/capital": lambda text, offsets: [text[start:end].istitle() for start, end in offsets],
        "token/word": lambda text, offsets: [text[start:end] for start, end in offsets],
    }
    run = texts(labels=labels)
    assert run["example/length"].rows().tolist() == [len(text) for text in TEXTS]
    assert [list(run["token/word"][number]) for number in range(5)] == [spelled(run, number) for number in range(5)]
    assert run["token/capital"][0].tolist()[:3] == [False, True, False]


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ({"token/at": lambda text, offsets: [1, 2]}, "token/at.*example 0.*are 2, but the text has 8 tokens"),
        ({"token/at": [[1]] * 5}, "token/at"),
        ({"example/y": [1, 2, 3]}, "example/y"),
        ({"example/y": [1, 2, 3, 4, 5, 6]}, "example/y"),
    ],
)
def test_labels_that_do_not_fit(texts: Callable[..., Run], to: Path, labels: dict[str, Any], shown: str) -> None:
    """Wrong lengths are an error that names the label, and no run is left behind."""
    with pytest.raises(BatchError, match=shown):
        texts(labels=labels)
    assert not to.exists()


# --- long texts -----------------------------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long(texts: Callable[..., Run], to: Path) -> None:
    """By default an error that says how to go on."""
    with pytest.raises(BatchError, match=r"example 2 has \d+ tokens, more than max_length=9.*truncate.*window"):
        texts(max_length=9)


def test_the_tokenizers_own_limit(texts: Callable[..., Run]) -> None:
    """Without max_length the tokenizer says how much the model can take: MiniLM 512 tokens."""
    with pytest.raises(BatchError, match="max_length=512"):
        texts([TEXTS[0], "again " * 600])


def test_truncated_texts(texts: Callable[..., Run]) -> None:
    """Tokens, spans, text and token labels are cut alike; the id stays."""
    labels = {"token/at": lambda text, offsets: list(range(len(offsets))), "example/n": lambda text, offsets: len(offsets)}
    run = texts(max_length=6, overflow="truncate", labels=labels)
    assert run.ids == list(range(5))
    for number, text in enumerate(TEXTS):
        tokens = tokens_of(text)
        assert run["token/input_ids"][number].tolist() == tokens[:6]
        assert run["token/at"][number].tolist() == list(range(min(6, len(tokens))))
        assert run["example/n"][number] == len(tokens)
        assert [word.lower() for word in spelled(run, number)] == plain(tokens[:6])
        assert text.startswith(run["example/text"][number])


@pytest.mark.parametrize("length", [1, 4, 5, 9])
def test_windows(texts: Callable[..., Run], length: int) -> None:
    """Every `max_length` tokens are an example with id `<id>:<first token>`; `example/document` keeps whose they are."""
    labels = {"token/at": lambda text, offsets: list(range(len(offsets))), "example/topic": list("pqrst")}
    run = texts(max_length=length, overflow="window", ids=list("vwxyz"), labels=labels, batch_tokens=50)
    number = 0
    for id_, topic, text in zip("vwxyz", "pqrst", TEXTS, strict=True):
        tokens = tokens_of(text)
        for start in range(0, len(tokens), length):
            piece = tokens[start : start + length]
            assert run.ids[number] == f"{id_}:{start}"
            assert run["example/document"][number] == id_
            assert run["example/topic"][number] == topic
            assert run["token/input_ids"][number].tolist() == piece
            assert run["token/at"][number].tolist() == list(range(start, start + len(piece)))
            assert [word.lower() for word in spelled(run, number)] == plain(piece)
            number += 1
    assert number == len(run)


def test_windows_of_numbered_texts(texts: Callable[..., Run]) -> None:
    """Ids of windows are text, also where texts are only numbered."""
    run = texts(max_length=100, overflow="window")
    assert run.ids == [f"{number}:0" for number in range(5)]
    assert run["example/document"].rows().tolist() == list("01234")


def test_windows_by_content(texts: Callable[..., Run]) -> None:
    """Windows may be known by their tokens."""
    run = texts(max_length=5, overflow="window", ids="content")
    assert len(set(run.ids)) == len(run) > 5
    assert set(run["example/document"].rows().tolist()) == set("01234")


def test_unknown_overflow(texts: Callable[..., Run]) -> None:
    """The error lists what there is."""
    with pytest.raises(ValueError, match="'error', 'truncate' or 'window', not 'cut'"):
        texts(overflow="cut")


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_of_nothing(texts: Callable[..., Run], length: int) -> None:
    """max_length below one is refused, not taken for no limit."""
    with pytest.raises((ValueError, BatchError), match="max_length"):
        texts(max_length=length, overflow="window")


# --- what is refused, and what that leaves --------------------------------------------------------------------------------------


def test_nothing_to_record(texts: Callable[..., Run], record: Callable[..., Run], to: Path) -> None:
    """No texts, or a loader without batches: an error, and no run."""
    with pytest.raises(BatchError, match="nothing to record"):
        texts([])
    for empty in ([], iter(())):
        with pytest.raises(BatchError, match="nothing to record"):
            record(llama(), empty, ids="id")
    assert not to.exists()


def test_a_tokenizer_is_missing(record: Callable[..., Run], texts: Callable[..., Run], to: Path) -> None:
    """The error says what to pass; after that the same call works, for no run was begun."""
    with pytest.raises(BatchError, match=r"tokenizer=AutoTokenizer\.from_pretrained"):
        record(minilm()[0], TEXTS)
    with pytest.raises(BatchError, match="tokenizer"):
        record(minilm()[0], "one text")
    assert len(texts()) == 5


def test_a_tokenizer_and_no_texts(texts: Callable[..., Run]) -> None:
    """A loader needs no tokenizer."""
    with pytest.raises(BatchError, match="data must be texts"):
        texts([batch()])


def test_a_wrong_site_leaves_nothing(texts: Callable[..., Run], to: Path) -> None:
    """Correct the pattern and call again."""
    with pytest.raises(SiteNotFoundError):
        texts(sites="resid_pots")
    assert len(texts()) == 5


def test_run_modes(texts: Callable[..., Run], to: Path) -> None:
    """create refuses, resume adds what is missing, overwrite starts anew."""
    texts(TEXTS[:2], ids=list("ab"))
    with pytest.raises(RunExistsError):
        texts()
    assert texts(ids=list("abcde"), mode="resume").ids == list("abcde")
    assert texts(ids=list("abcde"), mode="resume").ids == list("abcde")
    assert texts(ids=list("vwxyz"), mode="overwrite").ids == list("vwxyz")


def test_resuming_gives_the_same_run(texts: Callable[..., Run], other: Path) -> None:
    """A run recorded in two goes, batch by batch, equals one recorded in one."""
    texts(TEXTS[:2], batch_size=2, ids=list("abcde")[:2])
    resumed = texts(batch_size=2, ids=list("abcde"), mode="resume")
    whole = texts(batch_size=2, ids=list("abcde"), to=other)
    assert resumed.ids == whole.ids
    for name in (SITE, "token/input_ids", "token/char.end"):
        assert np.array_equal(resumed[name].rows(), whole[name].rows())


# --- the model afterwards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_training_modes_come_back(record: Callable[..., Run], fails: bool) -> None:
    """Every module's own mode, gradients, hooks: as before, also after an error; recorded without dropout."""
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5)
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    before = [module.training for module in model.modules()]
    hooks, loader = hook_count(model), [{**batch(), "id": list(range(5))}]
    if fails:
        with pytest.raises(BatchError, match="no key 'id'"):
            record(model, [*loader, batch(seed=1)], ids="id")
    else:
        run = record(model, loader, ids="id")
        grid = observed(gpt2(), batch(), {"transformer.h.2"})["transformer.h.2"][0][1]
        assert torch.equal(run[SITE].to_torch(), packed(grid, MASK))
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
    assert hook_count(model) == hooks
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_bar_shows_on_terminals_only(texts: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed unless asked for."""
    minilm()
    capfd.readouterr()
    texts()
    assert capfd.readouterr() == ("", "")
    texts(mode="overwrite", progress=True)
    assert "token" in capfd.readouterr().err


# --- loaders --------------------------------------------------------------------------------------------------------------------


def batches() -> list[dict[str, Any]]:
    """Three batches of dicts: the model's arguments, ids and labels."""
    return [
        {**batch(seed=number), "id": [f"{number}{row}" for row in range(BATCH)], "topic": [f"t{row}" for row in range(BATCH)]}
        for number in range(3)
    ]


def expected_rows(model: nn.Module, path: str) -> Tensor:
    """What the model computes of them."""
    return torch.cat([packed(observed(model, batch(seed=number), {path})[path][0][1], MASK) for number in range(3)])


def test_a_loader_of_dicts(record: Callable[..., Run]) -> None:
    """ids and labels are taken out, the rest goes to the model."""
    model = llama()
    run = record(model, batches(), ids="id", labels={"example/topic": "topic"})
    assert run.ids == [f"{number}{row}" for number in range(3) for row in range(BATCH)]
    assert [run["example/topic"][number] for number in range(15)] == [f"t{row}" for row in range(BATCH)] * 3
    assert torch.equal(run[SITE].to_torch(), expected_rows(model, "layers.2"))
    assert run.assets == []


@pytest.mark.parametrize("kind", ["generator", "iterator", "tuple"])
def test_loaders_of_any_kind(record: Callable[..., Run], kind: str) -> None:
    """Anything that can be gone through."""

    def generated() -> Iterator[dict[str, Any]]:
        yield from ({name: value for name, value in each.items() if name != "topic"} for each in batches())

    data = {"generator": generated(), "iterator": iter(list(generated())), "tuple": tuple(generated())}[kind]
    assert len(record(llama(), data, ids="id")) == 15


class Items(torch.utils.data.Dataset[dict[str, Any]]):
    """Single examples of unequal lengths."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, number: int) -> dict[str, Any]:
        length = 1 + number * 3 % 8
        return {"tokens": torch.arange(3, 3 + length), "name": f"item {number}", "tag": torch.arange(length) * number}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A padded batch."""
    width = max(len(item["tokens"]) for item in items)
    pad = lambda value: torch.nn.functional.pad(value, (0, width - len(value)))  # noqa: E731
    return {
        "input_ids": torch.stack([pad(item["tokens"]) for item in items]),
        "attention_mask": torch.stack([pad(torch.ones_like(item["tokens"])) for item in items]),
        "name": [item["name"] for item in items],
        "tag": [item["tag"] for item in items],
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_with_collate(record: Callable[..., Run], workers: int) -> None:
    """A DataLoader, also with worker processes; the last batch is smaller."""
    loader = DataLoader(Items(), batch_size=3, collate_fn=collate, num_workers=workers)
    run = record(llama(), loader, ids="name", labels={"token/tag": "tag"})
    assert run.ids == [f"item {number}" for number in range(11)]
    assert run.tables["token"].lengths.tolist() == [1 + number * 3 % 8 for number in range(11)]
    assert all(np.array_equal(run["token/tag"][number], Items()[number]["tag"]) for number in range(11))


class Stream(IterableDataset[dict[str, Any]]):
    """Batches whose number nobody knows."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from ({name: value for name, value in each.items() if name != "topic"} for each in batches())


def test_a_data_loader_without_a_length(record: Callable[..., Run]) -> None:
    """A DataLoader over an iterable has no len()."""
    loader = DataLoader(Stream(), batch_size=None)
    assert len(record(llama(), loader, ids="id")) == 15


class Counting(nn.Module):
    """Notes which arguments it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sdpa_decoder()
        self.seen: list[set[str]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None, **more: Any) -> Tensor:
        """[B, T] to [B, T, d]."""
        named = {"attention_mask": attention_mask, "labels": labels, **more}
        self.seen.append({name for name, value in named.items() if value is not None})
        return self.inner(input_ids)


def test_keys_that_the_model_takes_are_passed_on(record: Callable[..., Run]) -> None:
    """A named key is withheld only if the forward has no argument of that name; unnamed keys are always given."""
    model = seeded(Counting)
    labels = torch.arange(BATCH * 7).reshape(BATCH, 7)
    data = [{**batch(), "labels": labels, "id": list(range(5)), "topic": list("pqrst"), "other": 3}]
    run = record(model, data, ids="id", labels={"token/label": "labels", "example/topic": "topic"})
    assert model.seen == [{"attention_mask", "labels", "other"}]
    assert torch.equal(run["token/label"].to_torch(), packed(labels, MASK))


def test_content_ids_of_a_loader(record: Callable[..., Run]) -> None:
    """ids='content' names no key."""
    data = [{**each, "topic": each["topic"]} for each in batches()]
    run = record(
        llama(),
        [{name: value for name, value in each.items() if name != "id"} for each in data],
        ids="content",
        labels={"example/topic": "topic"},
    )
    assert len(set(run.ids)) == 15


def test_a_key_that_is_not_there(record: Callable[..., Run]) -> None:
    """The error lists the keys there are."""
    for options in ({"ids": "name"}, {"ids": "id", "labels": {"example/y": "name"}}):
        with pytest.raises(BatchError, match="no key 'name'; they have input_ids, attention_mask, id, topic"):
            record(llama(), batches(), **options)


@pytest.mark.parametrize("ids", [None, list(range(15))])
def test_ids_of_a_loader_are_missing(record: Callable[..., Run], ids: Any, to: Path) -> None:
    """A loader's ids are in its dicts."""
    with pytest.raises(BatchError, match="name the key"):
        record(llama(), batches(), ids=ids)
    assert not to.exists()


@pytest.mark.parametrize("ids", ["id", "content"])
def test_a_loader_of_something_else(record: Callable[..., Run], ids: str) -> None:
    """Tuples have no names for their tensors."""
    with pytest.raises(BatchError, match="dicts of the model's arguments; got tuple"):
        record(llama(), [(batch()["input_ids"], torch.arange(5))], ids=ids)


def test_an_error_in_the_loader(record: Callable[..., Run], to: Path) -> None:
    """It passes through; what was recorded before stands and can be resumed."""
    model = llama()

    def failing() -> Iterator[dict[str, Any]]:
        yield {**batch(), "id": list(range(5))}
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        record(model, failing(), ids="id")
    assert open_run(to).ids == list(range(5))
    again = [{**batch(seed=number), "id": [number * 5 + row for row in range(5)]} for number in range(2)]
    assert record(model, again, ids="id", mode="resume").ids == list(range(10))


def test_a_model_without_parameters_on_a_device(record: Callable[..., Run]) -> None:
    """A module that knows no device takes batches where they are."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Identity()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.twice(torch.nn.functional.one_hot(input_ids, VOCABULARY).float())

    run = record(Plain(), [{"input_ids": batch()["input_ids"], "id": list("abcde")}], ids="id", sites="twice")
    assert run["twice:out"].shape == (35, VOCABULARY)


def test_inputs_on_the_way_are_not_changed(record: Callable[..., Run]) -> None:
    """The loader's own dicts stay as they were."""
    data = batches()
    record(llama(), data, ids="id", labels={"example/topic": "topic"})
    assert all(set(each) == {"input_ids", "attention_mask", "id", "topic"} for each in data)


def test_memory_budget(record: Callable[..., Run]) -> None:
    """A budget that holds the run is kept to; one that cannot is refused with the number it needs."""
    assert len(record(llama(), batches(), ids="id", labels={"example/topic": "topic"}, memory_budget=1 << 26)) == 15
    with pytest.raises(MemoryError, match=r"\d+"):
        record(llama(), batches(), ids="id", labels={"example/topic": "topic"}, memory_budget=1 << 10, mode="overwrite")
