"""tensortape export, over a run of the embedded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tensortape.app import cli, models
from tensortape.instrument import record
from tensortape.stores import Run


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["tensortape", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    model, tokenizer = models.load("demo")
    texts = ["import os\n" * 5, "x = 1\n", "def f(x):\n    return x\n"]
    return record(model, texts, tokenizer=tokenizer, to=tmp_path_factory.mktemp("export") / "run.zarr", sites=["resid_post[0:2]"])


def test_chosen_sites_become_files(run: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    words = ("--sites", "resid_post[1]", "--sites", "token/input_ids", "--rows-per-file", 20, "--json")
    assert call(monkeypatch, "export", run.path, "--to", tmp_path / "out", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(tmp_path / "out")
    files = sorted(name for name in found["files"] if "layers.1" in name)
    rows = [load_file(tmp_path / "out" / name)["token/model.layers.1:out"].numpy() for name in files]
    assert np.array_equal(np.concatenate(rows), run["resid_post[1]"].rows())
    assert not any("layers.0" in name for name in found["files"])


def test_everything_that_holds_numbers_by_default(run: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    assert call(monkeypatch, "export", run.path, "--to", tmp_path / "out", "--format", "npy") == 0
    assert "files, " in capsys.readouterr().out
    assert np.array_equal(np.load(tmp_path / "out" / "token" / "input_ids.npy"), run["token/input_ids"].rows())
    assert len(list((tmp_path / "out" / "token").glob("model.layers.*.npy"))) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "hdf5"], "not as 'hdf5'"),
        (["--format", "sae-lens", "--sites", "resid_post[0]"], "give context_size="),
        (["--sites", "layer.3"], "selects nothing"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_two(run: Run, tmp_path: Path, monkeypatch, capsys, words, said) -> None:
    assert call(monkeypatch, "export", run.path, "--to", tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert call(monkeypatch, "export", run.path, "--to", tmp_path / "out") == 2
    assert "exists" in capsys.readouterr().err
