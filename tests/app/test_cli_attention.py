"""Attention and gradients on the command line, over the embedded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch

from tensortape.app import cli, edges, models
from tensortape.instrument import Recorder, Site
from tensortape.stores import open_run

SOURCE = "import os\n\ndef path(name):\n    return os.path.join('a', name)\n"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["tensortape", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "a.py").write_text(SOURCE)
    return tmp_path / "a.py"


def record(monkeypatch: pytest.MonkeyPatch, text: Path, *more: str) -> Path:
    to = text.parent / "run.zarr"
    assert call(monkeypatch, "record", "--model", "demo", "--text", text, "--to", to, "--sites", "resid_post[0]", *more) == 0
    return to


@pytest.mark.parametrize(("store", "port"), [("qk", "q"), ("weights", "weights"), ("auto", "weights")])
def test_attention_is_stored_as_asked(monkeypatch: pytest.MonkeyPatch, text: Path, store: str, port: str) -> None:
    """The text is shorter than the crossover, so `auto` stores weights."""
    run = open_run(record(monkeypatch, text, "--attention", store))
    assert next(column.site["port"] for column in run.sites if column.site["path"].endswith("0.self_attn")) == port
    assert run.attention(0)[0].sum(-1) == pytest.approx(1, abs=1e-5)


def test_no_attention_by_default(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    assert open_run(record(monkeypatch, text)).attention_sites == []


def test_gradients_of_the_next_token_loss(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    """The recorded gradient is that of the model's own loss, which is a mean over the predicted tokens."""
    run = open_run(record(monkeypatch, text, "--gradients", "--attention", "qk"))
    model, _ = models.load("demo")
    kept = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: kept.append(output) or output.retain_grad())
    tokens = np.asarray(run["token/input_ids"][0])[None]
    loss = model(input_ids=(ids := torch.as_tensor(tokens.copy())), labels=ids).loss
    loss.backward()
    count = tokens.shape[1] - 1
    assert run["resid_post[0]:out.grad@loss"][0] == pytest.approx(kept[0].grad[0].numpy() * count, rel=1e-3, abs=1e-5)
    assert run.examples["target.loss"][0] == pytest.approx(loss.item() * count, rel=1e-5)
    assert run.saliency(0)[0].shape == run.attention(0)[0].shape


def test_unknown_kind_of_attention(monkeypatch: pytest.MonkeyPatch, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "record", "--model", "demo", "--text", text, "--to", text.parent / "x.zarr", "--attention", "all") == 2
    assert "none, qk, weights, auto" in capsys.readouterr().err


def test_strongest_edges(monkeypatch: pytest.MonkeyPatch, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Edges are those of the matrix with its diagonal and first column left out, largest first."""
    to = record(monkeypatch, text, "--attention", "qk")
    capsys.readouterr()
    assert call(monkeypatch, "head", to, "--attention", "2", "--tokens", "5", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    weights = open_run(to).attention(2)[0].copy()
    weights[:, np.arange(weights.shape[1]), np.arange(weights.shape[1])] = 0
    weights[:, :, 0] = 0
    expected = np.sort(weights, axis=None)[::-1][:5]
    assert [edge["weight"] for edge in found["edges"]] == pytest.approx(expected.tolist())
    first = found["edges"][0]
    assert weights[first["head"], first["query"]["place"], first["key"]["place"]] == pytest.approx(expected[0])
    assert call(monkeypatch, "head", to, "--attention", "2") == 0
    assert "<-" in capsys.readouterr().out


def test_edges_of_a_layer_that_was_not_recorded(
    monkeypatch: pytest.MonkeyPatch, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = record(monkeypatch, text, "--attention", "qk")
    assert call(monkeypatch, "head", to, "--attention", "17") == 2
    assert "model.layers.0.self_attn" in capsys.readouterr().err


def test_edges_are_the_same_in_small_tiles(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    """The largest of all tiles, whatever their size."""
    attention = open_run(record(monkeypatch, text, "--attention", "qk")).attention(1)
    assert [edge[0] for edge in edges.largest(attention, 0, 6, tile_bytes=1)] == [
        edge[0] for edge in edges.largest(attention, 0, 6)
    ]


@pytest.mark.parametrize(
    ("sites", "column"),
    [
        ("re:.*layers\\.1\\.mlp", "model.layers.1.mlp:out"),
        ("resid_pre[2]", "model.layers.2:in"),
        ("blocks.3.hook_resid_mid", "model.layers.3.post_attention_layernorm:in"),
        ("**.layers.4.mlp:in", "model.layers.4.mlp:in"),
    ],
)
def test_gradients_at_sites_however_they_are_named(monkeypatch: pytest.MonkeyPatch, text: Path, sites: str, column: str) -> None:
    """The gradient goes beside each recorded site, at the port where that is."""
    to = text.parent / "run.zarr"
    assert call(monkeypatch, "record", "--model", "demo", "--text", text, "--to", to, "--sites", sites, "--gradients") == 0
    run = open_run(to)
    assert run[f"{column}.grad@loss"].shape == run[column].shape
    assert np.abs(run[f"{column}.grad@loss"].rows()).max() > 0


def test_attention_alone(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    """`--sites none` leaves the attention."""
    to = text.parent / "run.zarr"
    assert call(monkeypatch, "record", "--model", "demo", "--text", text, "--to", to, "--sites", "none", "--attention", "qk") == 0
    assert {column.site["port"] for column in open_run(to).sites} == {"q", "k", "keys"}


@pytest.mark.parametrize("store", ["qk", "weights"])
def test_edges_of_cross_attention_name_tokens_of_both_sides(tmp_path: Path, store: str) -> None:
    """Queries are the decoder's tokens, keys the encoder's; nothing is left out."""
    with torch.no_grad(), Recorder(tiny.bart(), sites=Site("attention", store=store), to=tmp_path / "r.zarr") as recorder:  # noqa: SIM117
        with recorder.batch(ids=list("abcde")):
            recorder._model(**tiny.pair_batch())
    run = open_run(tmp_path / "r.zarr")
    site = next(name for name in run.attention_sites if name.endswith("0.encoder_attn"))
    (found, *_) = edges.strongest(run, site, examples=1, most=3, tokenizer=None)
    weights = run.attention(site)[0]
    for edge in found["edges"]:
        assert edge["weight"] == weights[edge["head"], edge["query"]["place"], edge["key"]["place"]]
        assert edge["query"]["token"] == str(run["token.decoder/input_ids"][0][edge["query"]["place"]])
        assert edge["key"]["token"] == str(run["token/input_ids"][0][edge["key"]["place"]])
    assert found["edges"][0]["weight"] == weights.max()
