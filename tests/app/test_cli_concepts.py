"""The commands `cav` and `tcav`, in process, over a small run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from concept_runs import write_topics

from tensortape.analyses import TCAV, CAVs, fit_cavs, tcav
from tensortape.app import cli
from tensortape.stores import Run

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_topics(tmp_path_factory.mktemp("cli") / "run.zarr", seed=0)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Exit code, output and errors of a command, called in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tensortape", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return command


def test_vectors_and_their_test(call: Call, run: Run, tmp_path: Path) -> None:
    concepts = ["example/topic=net", "example/topic=gui"]
    words = [word for one in concepts for word in ("--concept", one)]
    code, out, _ = call("cav", run.path, *words, "--null", 20, "--out", "cavs", "--csv", "cavs.csv", "--plot", "cavs.png")
    assert code == 0
    assert "topic=gui" in out
    expected = fit_cavs(run, concepts=concepts, null=20)
    assert CAVs.load("cavs") == expected
    assert pd.read_csv("cavs.csv")["auc"].tolist() == pytest.approx([cav.auc for cav in expected])
    code, out, _ = call(
        "tcav", run.path, "--cavs", "cavs", "--target", "logit", "--examples", "example/topic=mail", "--out", "t", "--json"
    )
    assert code == 0
    tested = tcav(run, expected, target="logit", examples="example/topic=mail")
    assert [row["sign_count"] for row in json.loads(out)["rows"]] == [score.sign_count for score in tested]
    assert TCAV.load("t") == tested
    code, out, _ = call("tcav", run.path, "--cavs", "cavs.json", "--target", "logit", "--sites", "resid_post[1]", "--plot", "t.png")
    assert code == 0
    assert "layers.0" not in out
    assert out.count("layers.1:out") >= 2
    for picture in ("cavs.png", "t.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_without_random_sets_there_is_no_p(call: Call, run: Run) -> None:
    assert call("cav", run.path, "--concept", "example/is_net", "--null", 0, "--out", "cavs")[0] == 0
    _, out, _ = call("tcav", run.path, "--cavs", "cavs", "--target", "logit", "--json")
    assert {row["p"] for row in json.loads(out)["rows"]} == {None}


def test_errors_are_one_line(call: Call, run: Run) -> None:
    code, _, err = call("cav", run.path, "--concept", "example/topic=nothing", "--out", "cavs")
    assert (code, err.count("\n")) == (2, 1)
    assert "example/topic=net" in err
    call("cav", run.path, "--concept", "example/is_net", "--null", 0, "--out", "cavs")
    code, _, err = call("tcav", run.path, "--cavs", "cavs", "--target", "loss")
    assert (code, err.count("\n")) == (2, 1)
    assert "layers.0:out.grad@logit" in err
