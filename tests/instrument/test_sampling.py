"""Samples of tokens: rows of the full recording, the same whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from tiny_models import (
    BATCH,
    DECODER_LENGTHS,
    HIDDEN,
    LENGTHS,
    batch,
    llama,
    llama_lm,
    minilm,
    pair_batch,
    random_tokens,
    sdpa_decoder,
    seeded,
    t5,
)
from torch import nn

from tensortape.instrument import Recorder, Site, record
from tensortape.instrument.errors import LayoutError
from tensortape.instrument.sampling import Sample
from tensortape.stores import Run, open_run

SHARE = 0.4
TABLE = "token.sample0.4.seed0"
SITE = Site("resid_post[1]", sample_tokens=SHARE)
COLUMN = f"{TABLE}/layers.1:out|sample0.4.seed0"
IDS = [f"e{number}" for number in range(BATCH)]
Recorded = Callable[..., Run]


def drawn(run: Run, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    """Which tokens of each example of a run are in the sample."""
    return [Sample(SHARE, seed).drawn(id_, length) for id_, length in zip(run.ids, lengths, strict=True)]


def test_a_sample_takes_its_share_of_tokens() -> None:
    """Of 200,000 tokens, within five standard deviations; neighbours and examples are independent."""
    found = np.stack([Sample(0.1).drawn(number, 400) for number in range(500)])
    assert abs(found.mean() - 0.1) < 5 * np.sqrt(0.1 * 0.9 / found.size)
    assert abs(found.sum(0) - 50).max() < 5 * np.sqrt(45)
    assert abs(found.sum(1) - 40).max() < 5 * np.sqrt(36)
    assert abs((found[:, 1:] & found[:, :-1]).mean() - 0.01) < 0.001


def test_a_sample_depends_on_seed_id_and_place_alone() -> None:
    whole = Sample(SHARE, 1).drawn("a", 97)
    assert all(np.array_equal(Sample(SHARE, 1).drawn("a", length), whole[:length]) for length in range(0, 97, 5))
    others = [Sample(SHARE, 2).drawn("a", 97), Sample(SHARE, 1).drawn("b", 97), Sample(SHARE, 1).drawn(1, 97)]
    assert not any(np.array_equal(other, whole) for other in others)
    assert not (Sample(0.2, 1).drawn("a", 97) & ~whole).any()  # a smaller sample is part of a larger one


def test_a_sample_stays_the_same_for_good() -> None:
    """Bits that an earlier version drew: a run that is resumed years later goes on with the same sample."""
    assert "".join(map(str, Sample(0.5, 3).drawn("abc", 24).astype(int))) == "011001010000110110000000"
    assert "".join(map(str, Sample(0.5, 3).drawn(7, 24).astype(int))) == "000111000011011000111001"


def test_rows_are_those_of_the_full_recording(recorded: Recorded) -> None:
    """With what the run says of the tokens, and with labels of numbers and of text."""
    tags = [["xyz"[(row + at) % 3] for at in range(length)] for row, length in enumerate(LENGTHS)]
    numbers = [torch.arange(length) * 7 for length in LENGTHS]
    labels = {"token/tag": tags, "token/number": numbers, "example/topic": list(range(BATCH))}
    run = recorded(llama(), ["resid_post[1]", SITE], batch("left"), IDS, labels=labels)
    for example, chosen in enumerate(drawn(run)):
        assert np.array_equal(run[COLUMN][example], run["token/layers.1:out"][example][chosen])
        for name in ("input_ids", "position", "tag", "number"):
            assert run[f"{TABLE}/{name}"][example].tolist() == run[f"token/{name}"][example][chosen].tolist()
    assert run[COLUMN].shape == (sum(map(np.sum, drawn(run))), HIDDEN)
    assert run[COLUMN].site is not None
    assert run[COLUMN].site["sample"] == {"fraction": SHARE, "seed": 0}
    assert run.verify().ok


def test_sites_share_the_table_of_their_sample(recorded: Recorded) -> None:
    other = Site("resid_post[2]", sample_tokens=SHARE, sample_seed=5)
    run = recorded(llama(), [Site("resid_post[0:2]", sample_tokens=SHARE), other], batch(), IDS)
    assert set(run.tables) == {"example", "token", TABLE, "token.sample0.4.seed5"}
    assert list(run.tables[TABLE]) == [*(f"layers.{n}:out|sample0.4.seed0" for n in (0, 1)), "input_ids", "position"]
    lengths = [int(chosen.sum()) for chosen in drawn(run, seed=5)]
    assert run.tables["token.sample0.4.seed5"].lengths.tolist() == lengths
    assert run["resid_post[2]"].shape == (sum(lengths), HIDDEN)


def test_any_zarr_reader_finds_the_rows(recorded: Recorded) -> None:
    run = recorded(llama(), SITE, batch(), IDS)
    (path,) = run[COLUMN].paths
    assert np.array_equal(zarr.open_array(run.path / path, mode="r")[:], run[COLUMN].rows())


def test_batches_do_not_matter(tmp_path: Path) -> None:
    """Texts in batches of 5, and in batches of 2 of which some come later: the same tokens of each example."""
    model, tokenizer = minilm()
    texts = ["a tape is recorded once", "and read", "for as long as anybody cares", "unbelievably", "the second of three", "end"]

    def written(name: str, count: int, size: int, **options: Any) -> Run:
        sites = [Site("resid_post[-1]", sample_tokens=SHARE)]
        options = {"tokenizer": tokenizer, "to": tmp_path / name, "ids": [*"abcdef"][:count], "durability": "rename", **options}
        return record(model, texts[:count], sites=sites, batch_size=size, **options)

    once = written("once.zarr", 6, 5)
    written("twice.zarr", 3, 2)
    twice = written("twice.zarr", 6, 2, mode="resume")
    assert len(twice.parts) == 2
    for name in ("input_ids", "position", "char.start"):
        assert [one.tolist() for one in once[f"{TABLE}/{name}"][:]] == [one.tolist() for one in twice[f"{TABLE}/{name}"][:]]
    for one, other in zip(once["resid_post[-1]"][:], twice["resid_post[-1]"][:], strict=True):
        assert np.allclose(one, other, atol=1e-5)


def test_ids_made_of_the_tokens(recorded: Recorded) -> None:
    run = recorded(llama(), SITE, batch(), "content")
    assert run.tables[TABLE].lengths.tolist() == [int(chosen.sum()) for chosen in drawn(run)]


def test_examples_of_which_nothing_is_drawn(recorded: Recorded) -> None:
    """They are there, with no rows; labels keep their kind."""
    tiny = Site("resid_post", sample_tokens=1e-9)
    tags = [["x"] * length for length in LENGTHS]
    run = recorded(llama(), tiny, batch(), IDS, labels={"token/tag": tags, "token/n": [torch.ones(n) for n in LENGTHS]})
    table = run.tables["token.sample1e-09.seed0"]
    assert table.lengths.tolist() == [0] * BATCH
    assert table["layers.1:out|sample1e-09.seed0"].present.all()
    assert (table["tag"].dtype, table["n"].dtype) == (object, np.float32)
    assert table["layers.1:out|sample1e-09.seed0"][3].shape == (0, HIDDEN)


def test_another_stream(recorded: Recorded) -> None:
    """A decoder's tokens are drawn by themselves, into a table of their own."""
    run = recorded(t5(), ["decoder.resid_post[0]", Site("decoder.resid_post[0]", sample_tokens=SHARE)], pair_batch(), IDS)
    sampled = run.select("decoder.resid_post[0]")[1]
    assert sampled.name.startswith("token.decoder.sample0.4.seed0/")
    for example, chosen in enumerate(drawn(run, lengths=DECODER_LENGTHS)):
        assert np.array_equal(sampled[example], run.select("decoder.resid_post[0]")[0][example][chosen])


def test_forwards_that_continue_a_cache(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """Places count from the beginning of the example, not of the forward."""
    recorder = make(llama_lm(), ["resid_post[1]", SITE])
    with torch.no_grad(), recorder.batch(ids=["a", "b", "c"], forwards="generate"):
        recorder._model.generate(random_tokens(3, 5), max_new_tokens=9, do_sample=False, eos_token_id=None)
    run = opened(recorder)
    whole, sampled = run.select("resid_post[1]")
    for example in range(3):
        chosen = Sample(SHARE).drawn(run.ids[example], len(whole[example]))
        assert len(chosen) == 13
        assert np.array_equal(sampled[example], whole[example][chosen])


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_gradients(make: Callable[..., Recorder], opened: Callable[[Recorder], Run], dtype: str | None) -> None:
    """Also where they are stored beside a scale."""
    sites = [Site("resid_post[1]:out.grad", dtype=dtype), Site("resid_post[1]:out.grad", dtype=dtype, sample_tokens=SHARE)]
    model = llama()
    recorder = make(model, sites)
    with recorder.batch(ids=IDS), recorder.target("loss", reduction="sum"):
        model(**batch()).last_hidden_state.square().sum().backward()
    run = opened(recorder)
    whole, sampled = run.select("resid_post[1]:out.grad")
    for example, chosen in enumerate(drawn(run)):
        assert np.array_equal(sampled[example], whole[example][chosen])
        assert not chosen.any() or np.abs(sampled[example]).max() > 0


class Pooled(nn.Module):
    """A model with a site that has one row per example."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sdpa_decoder()
        self.pool = nn.Linear(HIDDEN, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, 3] from [B, T]."""
        found: torch.Tensor = self.pool(self.inner(input_ids)[:, 0])
        return found


def test_what_cannot_be_sampled(recorded: Recorded) -> None:
    with pytest.raises(LayoutError, match="no tokens to draw from"):
        recorded(seeded(Pooled), Site("pool", sample_tokens=0.5), {"input_ids": random_tokens(5, 7)}, IDS)
    for options in ({"reduce": "mean"}, {"positions": [0]}, {"missing": "absent"}):
        with pytest.raises(ValueError, match="sample_tokens="):
            Site("resid_post", sample_tokens=0.5, **options)
    with pytest.raises(ValueError, match="sample_tokens="):
        Site("attention", sample_tokens=0.5)
    for share in (0, 1, -0.1, 10):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Site("resid_post", sample_tokens=share)


def test_a_run_is_opened_again(recorded: Recorded) -> None:
    """Selection by pattern, and no reduction on reading of what is only a sample."""
    run = open_run(recorded(llama(), SITE, batch(), IDS).path)
    assert run["layers.1:out"].name == run["resid_post[1]"].name == COLUMN
    with pytest.raises(KeyError):
        run["resid_post[1]|mean"]
