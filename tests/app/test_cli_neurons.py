"""tensortape neurons and pca, over a run of the embedded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

from tensortape.app import cli, models
from tensortape.app.differentiated import next_token_loss
from tensortape.instrument import record
from tensortape.stores import Run

TEXTS = ["import os\n" * 7, "x = 1\ny = 'text'\n", "def f(x):\n    return x\n" * 3]


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["tensortape", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def recorded(to: Path, *, keep_text: bool) -> Run:
    model, tokenizer = models.load("demo")
    return record(
        model,
        TEXTS,
        tokenizer=tokenizer,
        to=to,
        sites=["resid_post[0:2]", "mlp_out[1]", "mlp_out[1]:out.grad"],
        targets=next_token_loss(model),
        labels={"token/kind": lambda text, offsets: ["letter" if text[a:b].strip().isalpha() else "other" for a, b in offsets]},
        keep_text=keep_text,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recorded(tmp_path_factory.mktemp("neurons") / "run.zarr", keep_text=True)


def test_neurons_are_shown_with_their_tokens(run: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    words = ("--labels", "token/kind", "--target", "loss", "--first", 3, "--top", 2)
    csv, plot = tmp_path / "n.csv", tmp_path / "n.png"
    assert call(monkeypatch, "neurons", run.path, "mlp_out[1]", *words, "--csv", csv, "--plot", plot) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "importance for loss" in lines[0]
    assert len(lines) == 2 + 3 * (1 + 2)
    x, g = (run[f"model.layers.1.mlp:out{end}"].rows().astype(np.float64) for end in ("", ".grad@loss"))
    first = np.abs(x * g).mean(0).argmax()
    assert lines[2].split()[0] == str(first)
    row = x[:, first].argmax()
    example = int(np.searchsorted(np.cumsum(run.tables["token"].lengths), row, "right"))
    token = int(row - run.tables["token"].lengths[:example].sum())
    start, end = (int(run[f"token/char.{side}"][example][token]) for side in ("start", "end"))
    assert f"[{TEXTS[example][start:end]}]".replace("\n", "\\n") in lines[3]
    assert f"({example}, token {token})" in lines[3]
    frame = pd.read_csv(csv)
    np.testing.assert_allclose(frame["importance"], np.abs(x * g).mean(0), rtol=1e-5)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_neurons_as_json(run: Run, monkeypatch, capsys) -> None:
    words = ("--labels", "token/kind", "--by", "selectivity", "--first", 2, "--top", 1, "--json")
    assert call(monkeypatch, "neurons", run.path, "mlp_out[1]", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(one["top"]) for one in found["neurons"]] == [1, 1]
    strength = [abs(one["best.auc"] - 0.5) for one in found["neurons"]]
    assert strength == sorted(strength, reverse=True)
    assert found["neurons"][0]["best.class"] in ("letter", "other")


def test_tokens_are_decoded_where_the_run_keeps_no_text(tmp_path: Path, monkeypatch, capsys) -> None:
    bare = recorded(tmp_path / "bare.zarr", keep_text=False)
    assert call(monkeypatch, "neurons", bare.path, "mlp_out[1]", "--first", 1, "--top", 1, "--json") == 0
    [top] = json.loads(capsys.readouterr().out)["neurons"][0]["top"]
    tokenizer = models.recorded_tokenizer(bare)
    assert top["text"] == tokenizer.decode([bare["token/input_ids"][top["example"]][top["token"]]])


def test_components_are_shown_by_site(run: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    csv, plot = tmp_path / "p.csv", tmp_path / "p.png"
    words = ("--components", 3, "--labels", "token/kind", "--csv", csv, "--plot", plot)
    assert call(monkeypatch, "pca", run.path, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["model.layers.0:out", "model.layers.1:out"]
    expected = PCA(3, svd_solver="full").fit(run["resid_post[0]"].rows().astype(np.float64)).explained_variance_ratio_
    assert [f"{share:.1%}" for share in (*expected, expected.sum())] == lines[1].split()[1:]
    assert (len(pd.read_csv(csv)), plot.exists()) == (6, True)
    assert call(monkeypatch, "pca", run.path, "--sites", "mlp_out", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["components"]) == 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("neurons", "mlp_out[1]", "--by", "height"), "ranked by deviation, not by 'height'"),
        (("neurons", "mlp_out[7]"), "selects nothing"),
        (("neurons", "mlp_out[1]", "--target", "guess"), "guess"),
        (("pca", "--components", "4000"), "give 1 to 128"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_two(run: Run, monkeypatch, capsys, words, said) -> None:
    assert call(monkeypatch, words[0], run.path, *words[1:]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
