"""`tensortape anchors` over a recorded run: the table is that of the functions it calls."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tensortape.analyses import anchor_auc, anchor_flow, anchor_positions
from tensortape.app import cli, models
from tensortape.instrument import record
from tensortape.stores import Run, open_run

ANSWERS = [(" True", " False"), (" False", " True"), (" True", " True"), (" False", " False"), (" True", " False")]
TEXTS = [f"x = {number}\nflag ={one}\nn = {7**number}\nflag ={other}\nk = 7\nflag =" for number, (one, other) in enumerate(ANSWERS)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The embedded model over prompts in which ` True` and ` False` follow ` =`; predictions are made up."""
    model, tokenizer = models.load(models.DEMO)
    found = record(
        model,
        TEXTS,
        tokenizer=tokenizer,
        to=tmp_path_factory.mktemp("cli") / "run.zarr",
        sites=["attention.grad[0:2]"],
        targets={"chosen": lambda outputs, batch: outputs.logits[:, -1, 5]},
        batch_size=1,
        durability="rename",
    )
    found.add_column("example/answer", [" True", " False", " False", " True", " True"])
    return found


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tensortape", "anchors", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def words_of(run: Run) -> dict[str, int]:
    tokenizer: Any = models.recorded_tokenizer(run)
    return {word: tokenizer.encode(word)[0] for word in (" True", " False")}


LABELS = ("--label", " True", "--label", " False", "--target", "chosen")


def test_the_table_is_that_of_the_functions(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer: Any = models.recorded_tokenizer(run)
    prefix = tokenizer.encode(" =")
    options = ("--prefix", " =", "--query", "prefix", "--predictions", "example/answer")
    folder = Path(run.path).parent
    assert call(monkeypatch, run.path, *LABELS, *options, "--json", "--csv", folder / "a.csv", "--plot", folder / "a.png") == 0
    said = json.loads(capsys.readouterr().out)
    positions = anchor_positions(run, words_of(run), prefix=prefix, target="prefix")
    assert positions.counts.tolist() == [2] * 5
    flow, auc = anchor_flow(run, positions, target="chosen"), anchor_auc(run, positions, "example/answer")
    assert [row["S_wp"] for row in said["sites"]] == pytest.approx(flow.mean[:, 0].tolist())
    assert [row["AUCROC_l"] for row in said["sites"]] == pytest.approx(auc.auc.tolist())
    assert said["prompts"] == 5
    assert pd.read_csv(folder / "a.csv")["S_pq"].to_numpy() == pytest.approx(flow.mean[:, 1])
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


def test_text_and_token_ids_are_the_same(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [part for token in words_of(run).values() for part in ("--label", token)]
    shown = []
    for labels in (LABELS, (*ids, "--target", "chosen")):
        assert call(monkeypatch, run.path, *labels, "--sites", "1") == 0
        shown.append(capsys.readouterr().out.splitlines()[1:])
    assert shown[0] == shown[1]
    assert "S_wp" in shown[0][0]
    assert len(shown[0]) == 2


def test_what_cannot_be_done(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says why, and exit code 2."""
    for words, message in (
        (("--label", " True", "--no-flow"), "nothing to do without --predictions"),
        ((*LABELS, "--query", "end"), "target is 'last' or 'prefix'"),
        (("--label", "1234"), "no label word stands"),
        ((*LABELS[:4], "--target", "loss"), "z.grad@loss was not recorded"),
    ):
        assert call(monkeypatch, run.path, *words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_attention_alone_is_enough_for_auc(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, run.path, *LABELS, "--no-flow", "--predictions", "example/answer") == 0
    table = capsys.readouterr().out
    assert "AUCROC_l" in table
    assert "S_wp" not in table
    assert np.isfinite(anchor_auc(open_run(run.path), anchor_positions(run, words_of(run)), "example/answer").auc).all()
