"""`tensortape heads` over the embedded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from tensortape.analyses import head_stats
from tensortape.app import cli
from tensortape.stores import RunWriter, open_run

SOURCE = "import os\n\ndef path(name):\n    return os.path.join('a', name)\n"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["tensortape", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "a.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        words = ("record", "--model", "demo", "--text", folder / "a.py", "--sites", "none", "--attention", "qk")
        assert call(patch, *words, "--to", folder / "r.zarr") == 0
    return folder / "r.zarr"


def test_a_table_on_the_terminal(recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line per head with what the analysis says, and one for uniform attention."""
    assert call(monkeypatch, "heads", recorded, "--sites", "2", "--sites", "attention[4]") == 0
    lines = capsys.readouterr().out.splitlines()
    stats = head_stats(open_run(recorded), sites=[2, 4])
    assert len(lines) == 1 + 2 * (4 + 1) + 1 + 1
    assert lines[-1] == repr(stats)
    site, head, *values = lines[7].split()
    assert (site, head) == ("model.layers.4.self_attn", "1")
    assert [float(value) for value in values] == pytest.approx(stats.sites[1].heads[1].tolist(), abs=6e-4)
    assert lines[5].split()[1] == "uniform"
    assert [float(value) for value in lines[5].split()[2:]] == pytest.approx(stats.sites[0].uniform.tolist(), abs=6e-4)


def test_json_and_files(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They hold the same numbers as the analysis."""
    wanted = head_stats(open_run(recorded)).to_pandas()
    assert call(monkeypatch, "heads", recorded, "--json", "--csv", tmp_path / "h.csv", "--plot", tmp_path / "h.png") == 0
    found = pd.DataFrame(json.loads(capsys.readouterr().out))
    pd.testing.assert_frame_equal(found, wanted, check_exact=False, rtol=1e-12, atol=1e-12)
    read = pd.read_csv(tmp_path / "h.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(read, wanted, check_exact=False, rtol=1e-12)
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_defined_is_left_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without token ids there is no induction score: blank, and null in JSON."""
    facts = {"tier": "interface", "scale": 1.0, "softcap": None, "cross": False, "window": None, "stored": "qk"}
    site = {"path": "attn", "call": 1, "aliases": [], "layout": "example token ...", "attention": facts}
    columns = {"q": [[[[1.0]], [[2.0]]]], "k": [[[[1.0]], [[2.0]]]], "keys": [[[0, 1], [0, 2]]]}
    with RunWriter(tmp_path / "r.zarr", durability="rename") as writer:
        for port in columns:
            writer.describe(f"token/attn:{port}", site={**site, "port": port})
        writer.append(ids=[0], columns={f"token/attn:{port}": values for port, values in columns.items()})
    assert call(monkeypatch, "heads", tmp_path / "r.zarr", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["induction"] is None
    assert call(monkeypatch, "heads", tmp_path / "r.zarr") == 0
    assert len(capsys.readouterr().out.splitlines()[1].split()) == 2 + 6


@pytest.mark.parametrize("sites", ["17", "nothing"])
def test_a_site_that_was_not_recorded(
    recorded: Path, sites: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names those that were."""
    assert call(monkeypatch, "heads", recorded, "--sites", sites) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.layers.0.self_attn" in line
