"""`tensortape probe` over a run of the embedded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from tensortape.analyses import ProbeReport, fit_probes
from tensortape.app import cli, demo_runs
from tensortape.stores import open_run


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["tensortape", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probed") / "run.zarr"
    demo_runs.record_sources(path, demo_runs.source_files(5, seed=0))
    return path


def test_a_table_a_picture_and_a_result(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They hold what the analysis says."""
    words = ["probe", recorded, "--labels", "token/role", "--sites", "resid_post[0:2]", "--fit", "lda", "--control"]
    files = ["--csv", tmp_path / "t.csv", "--plot", tmp_path / "p.png", "--out", tmp_path / "r"]
    assert call(monkeypatch, *words, *files, "--json") == 0
    report = fit_probes(open_run(recorded), labels="token/role", sites="resid_post[0:2]", fit="lda", control=True)
    printed = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert printed["accuracy"].tolist() == pytest.approx([score.accuracy for score in report.scores])
    assert pd.read_csv(tmp_path / "t.csv")["control"].tolist() == pytest.approx([score.control for score in report.scores])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert ProbeReport.load(tmp_path / "r") == report


def test_on_the_terminal(recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "probe", recorded, "--labels", "token/role", "--sites", "embed", "--fit", "ridge") == 0
    head, row, last = capsys.readouterr().out.splitlines()
    assert "accuracy" in head.split()
    assert "mdl" not in head
    assert row.split()[:2] == ["token/role", "model.embed_tokens:out"]
    assert last.startswith("<ProbeReport token/role:")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--labels", "token/nothing"], "token/nothing"),
        (["--labels", "token/role", "--fit", "forest"], "fit is one of exact, lda, ridge"),
        (["--labels", "token/role", "--pool", "median"], "pool is one of first, last, mean"),
        (["--labels", "token/role", "--groups", "example/id", "--folds", "1"], "folds=1 at least 2"),
        (["--labels", "example/document", "--control"], "no types"),
        (["--labels", "token/role", "--level", "token/lexical"], "numbered by integers"),
    ],
)
def test_bad_input_is_one_clear_line(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert call(monkeypatch, "probe", recorded, *words) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) == 1
