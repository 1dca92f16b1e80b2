"""record() refuses, after its first batch, to go on where the disk has no room for the rest."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import VOCABULARY, llama, minilm, random_tokens

from tensortape.instrument import record
from tensortape.instrument.corpus import corpus
from tensortape.stores import Run, open_run
from tensortape.stores.errors import DiskShortError
from tensortape.stores.writer import RESERVE

Usage = namedtuple("Usage", "total used free")
TEXTS = [
    "a tape is recorded once",
    "and read",
    "for as long as anybody cares",
    "unbelievably",
    "the second of three",
    "end",
    "it is",
]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what the disk says it has free."""

    def set_to(count: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 50, 0, int(count)))

    return set_to


def texts(to: Path, **options: Any) -> Run:
    model, tokenizer = minilm()
    return record(
        model,
        TEXTS,
        **{"tokenizer": tokenizer, "to": to, "sites": "resid_post", "batch_size": 3, "durability": "rename", **options},
    )


@pytest.fixture(scope="module")
def nbytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What the recording of all texts takes."""
    return texts(tmp_path_factory.mktemp("room") / "r.zarr").nbytes


def test_texts_that_will_not_fit(tmp_path: Path, nbytes: int, free: Callable[[float], None]) -> None:
    """The first batch is recorded; with room, a resumed recording goes on behind it."""
    free(RESERVE + 0.8 * nbytes)
    with pytest.raises(DiskShortError, match=r"the rest of this recording needs about .* mode='resume'"):
        texts(tmp_path / "r.zarr")
    free(RESERVE + 2 * nbytes)
    run = texts(tmp_path / "r.zarr", mode="resume")
    assert run.ids == list(range(len(TEXTS)))
    assert [part.examples for part in run.parts] == [3, 4]


def test_a_resumed_recording_needs_less(tmp_path: Path, nbytes: int, free: Callable[[float], None]) -> None:
    """Of six texts in seven that are recorded, no room is needed for any."""
    model, tokenizer = minilm()
    free(1 << 40)
    options = {"tokenizer": tokenizer, "to": tmp_path / "r.zarr", "sites": "resid_post", "ids": [*"abcdefg"], "batch_size": 2}
    record(model, TEXTS[:6], **{**options, "ids": [*"abcdef"]})
    free(RESERVE + 0.5 * nbytes)
    assert record(model, TEXTS, mode="resume", **options).ids == [*"abcdefg"]


def test_texts_that_fit_and_texts_that_are_not_checked(tmp_path: Path, nbytes: int, free: Callable[[float], None]) -> None:
    free(RESERVE + 2 * nbytes)
    assert len(texts(tmp_path / "fits.zarr")) == len(TEXTS)
    free(RESERVE + 0.97 * nbytes)
    with pytest.raises(DiskShortError, match="what is to be appended"):  # by the writer, as late as it can be
        texts(tmp_path / "unchecked.zarr", check_disk=False)
    assert len(open_run(tmp_path / "unchecked.zarr")) == 6


def test_a_loader_with_a_length(tmp_path: Path, free: Callable[[float], None]) -> None:
    """Seven batches of 2 examples, 5 tokens, 11 features: after the first, six more of its size are to come."""
    model = llama()
    batches = [{"id": [2 * n, 2 * n + 1], "input_ids": random_tokens(2, 5, seed=n) % VOCABULARY} for n in range(7)]
    options = {"sites": "resid_post", "ids": "id", "durability": "rename"}
    free(1 << 40)
    whole = record(model, batches, to=tmp_path / "whole.zarr", **options).nbytes
    free(RESERVE + 0.9 * whole)
    with pytest.raises(DiskShortError):
        record(model, batches, to=tmp_path / "short.zarr", **options)
    assert len(open_run(tmp_path / "short.zarr")) == 2
    with pytest.raises(DiskShortError, match="what is to be appended"):
        record(model, iter(batches), to=tmp_path / "endless.zarr", **options)
    assert len(open_run(tmp_path / "endless.zarr")) == 12


def test_how_many_tokens_texts_have() -> None:
    """By the rate of the examples seen; of texts that are cut, no more than they are cut to."""
    _, tokenizer = minilm()
    whole = corpus(TEXTS, tokenizer, None, {}, None, "error")
    assert whole.expected_tokens(TEXTS, list(whole.examples())) == pytest.approx(
        sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    )
    cut = corpus(TEXTS, tokenizer, None, {}, 3, "truncate")
    assert cut.expected_tokens(TEXTS, list(whole.examples())) < 3 * len(TEXTS)
    assert cut.expected_tokens(["x" * 10**6], list(whole.examples())) == 3
