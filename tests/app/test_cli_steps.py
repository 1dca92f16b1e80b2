"""`tensortape drift` and `tensortape probe --per-step` over a training of a small model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_models import VOCABULARY, SdpaDecoder, random_tokens, seeded

from tensortape.analyses import Drift, drift, probe_steps
from tensortape.app import cli
from tensortape.instrument import ProbeSet, Recorder
from tensortape.stores import open_run


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["tensortape", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven steps, of which every third is recorded, with a probe set of 13 examples of 11 tokens."""
    path = tmp_path_factory.mktemp("trained") / "run.zarr"
    model = seeded(lambda: SdpaDecoder(18, layers=2))
    head = torch.nn.Linear(18, VOCABULARY)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.3)
    tokens = random_tokens(13, 11, seed=1)
    given = {"tokens": tokens, "id": [f"p{n}" for n in range(13)], "odd": (tokens % 2).tolist()}
    probes = ProbeSet([given], ids="id", labels={"token/odd": "odd"})
    with Recorder(model, sites="resid_post", to=path, every=3, durability="rename") as recorder:
        for step in range(7):
            probes.record(recorder)
            batch = random_tokens(5, 11, seed=step + 2)
            with recorder.batch(ids=[f"t{step}.{n}" for n in range(5)], labels={"token/odd": batch % 2}):
                states = model(batch)
            loss = torch.nn.functional.cross_entropy(head(states[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
            optimizer.zero_grad()
    return path


def test_drift(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--csv", tmp_path / "t.csv", "--plot", tmp_path / "p.png", "--out", tmp_path / "r"]
    assert call(monkeypatch, "drift", trained, "--reference", 3, *files, "--json") == 0
    found = drift(open_run(trained), reference=3)
    assert found.steps.tolist() == [0, 3, 6]
    assert found.cka[0, 0, 0] < 1 == pytest.approx(found.cka[0, 1, 0])
    printed = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert printed["cosine"].tolist() == pytest.approx(found.cosine[:, :, 0].ravel().tolist())
    assert pd.read_csv(tmp_path / "t.csv")["step"].tolist() == [0, 3, 6] * 2
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert Drift.load(tmp_path / "r") == found
    assert call(monkeypatch, "drift", trained, "--step", 0, "--step", 6, "--sites", "resid_post[1]") == 0
    *_, row, last = capsys.readouterr().out.splitlines()
    assert row.split()[:3] == ["blocks.1:out", "1", "6"]
    assert last.startswith("<Drift of 1 sites over 2 steps, 0 to 6, from step 0: 13 examples")


def test_probes_at_each_step(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "probe", trained, "--labels", "token/odd", "--fit", "lda", "--per-step", "--json") == 0
    printed = pd.DataFrame(json.loads(capsys.readouterr().out))
    found = probe_steps(open_run(trained), "token/odd", fit="lda")
    assert printed["step"].tolist() == [0, 0, 3, 3, 6, 6]
    assert printed["accuracy"].tolist() == pytest.approx(found.to_pandas()["accuracy"].tolist())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["drift", "--phase", "train"], "record a probe set"),
        (["drift", "--reference", "4"], "step 4; it has 0, 3, 6"),
        (["probe", "--labels", "token/odd", "--per-step", "--mdl"], "--per-step goes without --mdl"),
        (["probe", "--labels", "token/odd", "--per-step", "--phase", "x"], "its phases are probe, train"),
    ],
)
def test_what_is_wrong_is_said(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert call(monkeypatch, words[0], trained, *words[1:]) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
