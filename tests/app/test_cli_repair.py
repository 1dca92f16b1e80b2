"""`verify --quick`, `repair` and `gc` on the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from strategies import flip, writer_at

from tensortape.app import cli
from tensortape.stores import open_run

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Exit code, output and error output of a command."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tensortape", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.zarr"
    with writer_at(path) as writer:
        writer.append(ids=["a", "b"], columns={"token/h": [np.ones((3, 2)), np.ones((5, 2))], "example/y": [1, 2]})
    return path


SHARD = "parts/p000000/token/h/c.0.0"


def test_a_quick_check_finds_what_is_cut_and_not_what_has_changed(call, path):
    assert call("verify", "--quick", path)[0] == 0
    flip(path / SHARD, 5)
    assert call("verify", "--quick", path)[0] == 0
    assert call("verify", path)[0] == 1
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-1])
    code, out, _ = call("verify", "--quick", path, "--json")
    found = json.loads(out)
    assert (code, found["ok"], [damage["path"] for damage in found["damaged"]]) == (1, False, [SHARD])
    code, out, _ = call("verify", "--quick", path)
    assert code == 1
    assert SHARD in out


def test_repair_names_what_it_gave_up_and_says_how_to_have_it_back(call, path):
    flip(path / SHARD, 5)
    code, out, _ = call("repair", path)
    assert code == 0
    assert f"replaced {SHARD}" in out
    assert "2 examples withdrawn: 'a', 'b'; record them again with mode='resume'" in out
    assert "what was there before lies in quarantine/" in out
    assert call("verify", path)[0] == 0
    assert open_run(path).ids == []
    code, out, _ = call("repair", path)
    assert (code, out) == (0, f"{path}: 0 objects replaced\n")


def test_repair_as_json(call, path):
    flip(path / "parts/p000000/example/y/zarr.json", 5)
    code, out, _ = call("repair", path, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["replaced"] == ["parts/p000000/example/y/zarr.json"]
    assert (found["withdrawn"], found["lost"], found["path"]) == ([], [], str(path))
    assert (path / found["quarantine"] / found["replaced"][0]).exists()


def test_gc_lists_what_it_removed(call, path):
    name = "parts/p000000/token/h/.c.1.0.0123456789abcdef0123456789abcdef.partial"
    (path / name).write_bytes(b"half a shard")
    assert call("gc", path)[:2] == (0, f"{name}\n1 files removed\n")
    assert not (path / name).exists()
    assert json.loads(call("gc", path, "--json")[1]) == {"removed": []}


@pytest.mark.parametrize("command", ["verify", "repair", "gc"])
def test_what_is_no_run_is_one_line_and_exit_code_2(call, tmp_path, command):
    (tmp_path / "notes").mkdir()
    code, _, err = call(command, tmp_path / "notes")
    assert code == 2
    assert err.startswith("tensortape: ")
    assert "is not a tensortape run" in err
    assert not list((tmp_path / "notes").iterdir())
