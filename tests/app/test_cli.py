"""The command line, in process, over real files and the embedded model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from s3_server import BUCKET
from strategies import same_bits

from tensortape.app import cli
from tensortape.app.show import printable
from tensortape.stores import RunWriter, open_run

SOURCE = "import os\n\ndef path(name):\n    return os.path.join('a', name)\n"


class Outcome:
    """What a command printed and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Call = Callable[..., Outcome]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["tensortape", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, and a run recorded from them by the command line."""
    found = tmp_path_factory.mktemp("cli")
    (found / "texts").mkdir()
    for number in range(3):
        (found / "texts" / f"{number}.py").write_text(SOURCE * (number + 1))
    arguments = [
        "record",
        "--model",
        "demo",
        "--text",
        str(found / "texts"),
        "--sites",
        "resid_post[0:2]",
        "--to",
        str(found / "run.zarr"),
    ]
    cli.app(arguments, standalone_mode=False)
    return found


def test_record_writes_what_was_asked_for(folder: Path) -> None:
    run = open_run(folder / "run.zarr")
    assert [id_.split(":")[0] for id_ in run.ids] == ["0.py", "1.py", "2.py"]
    assert len(run.sites) == 2
    assert run.verify().ok


def test_info_prints_tables_and_json(call: Call, folder: Path) -> None:
    assert "table token" in call("info", folder / "run.zarr").out
    found = json.loads(call("info", folder / "run.zarr", "--json").out)
    assert found["tables"]["token"]["rows"] == len(open_run(folder / "run.zarr")["token/input_ids"])
    assert found["model"]["class"] == "LlamaForCausalLM"


def test_info_says_what_compressing_and_quantising_did(call: Call, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float16)
    with RunWriter(tmp_path / "run.zarr", compress="zstd") as writer:
        writer.describe("token/coded", quantize="int8")
        writer.describe("token/plain", compress="none")
        writer.append(ids=["a"], columns={name: [values] for name in ("token/small", "token/coded", "token/plain")})
    run = open_run(tmp_path / "run.zarr")
    lines = {line.split()[0]: line for line in call("info", run.path).out.splitlines()}
    found = {column["name"]: column for column in json.loads(call("info", run.path, "--json").out)["tables"]["token"]["columns"]}
    stored = run["token/small"].stored_bytes
    assert f"zstd: {stored / 1e6:.1f} MB stored" in lines["small"]
    assert found["small"]["stored_bytes"] == stored
    cost = run["token/coded"].quantization
    assert cost is not None
    assert f"int8: relative RMS error {100 * cost.relative_rms:.2g} %" in lines["coded"]
    assert found["coded"]["quantization"] == {"relative_rms": cost.relative_rms, "largest_error": cost.largest_error}
    assert "stored" not in lines["plain"]
    assert "int8" not in lines["plain"]
    assert found["plain"]["quantization"] is None


def test_head_decodes_tokens_and_shows_norms(call: Call, folder: Path) -> None:
    found = json.loads(call("head", folder / "run.zarr", "-n", 1, "--tokens", 5, "--json").out)
    assert "".join(found[0]["tokens"]).replace("<|end|>", "").startswith("import")
    assert all(len(norms) == 5 for norms in found[0]["norms"].values())


def test_verify_says_sound_or_exits_with_one(call: Call, folder: Path, tmp_path: Path) -> None:
    assert call("verify", folder / "run.zarr").code == 0
    shutil.copytree(folder / "run.zarr", tmp_path / "bad.zarr")
    shard = next(path for path in (tmp_path / "bad.zarr").rglob("c.0.0") if "layers" in str(path))
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    found = call("verify", tmp_path / "bad.zarr", "--json")
    assert found.code == 1
    assert [damage["first"].split(":")[0] for damage in json.loads(found.out)["damaged"]] == ["0.py"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "nowhere.zarr"], "not a tensortape run"),
        (["record", "--model", "demo", "--to", "x.zarr"], "--text or as --dataset"),
        (["record", "--model", "demo", "--to", "x.zarr", "--text", "nowhere"], "no file or folder"),
        (["record", "--model", "no/such/model", "--to", "x.zarr", "--text", "TEXTS"], "no/such/model"),
        (["record", "--model", "demo", "--to", "RUN", "--text", "TEXTS"], "exists"),
        (["record", "--model", "demo", "--to", "x.zarr", "--text", "TEXTS", "--sites", "layer.3"], "matches nothing"),
        (["record", "--model", "demo", "--to", "x.zarr", "--text", "TEXTS", "--overflow", "wrap"], "overflow"),
        (
            ["record", "--model", "demo", "--to", "x.zarr", "--text", "TEXTS", "--max-length", "4", "--overflow", "error"],
            "max_length=4",
        ),
        (["head", "RUN", "--sites", "nothing"], "selects nothing"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_two(
    call: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"TEXTS": folder / "texts", "RUN": folder / "run.zarr"}
    found = call(*(places.get(word, word) for word in words))
    assert found.code == 2
    assert message in " ".join(found.err.split())
    assert "Traceback" not in found.err
    assert not (tmp_path / "x.zarr").exists()


def test_lines_and_jsonl_are_examples_of_their_own(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x = 1\n\ny = 2\n")
    (tmp_path / "b.jsonl").write_text('{"body": "z = 3"}\n{"body": "w = 4"}\n')
    found = call(
        *("record", "--model", "demo", "--text", tmp_path / "a.txt", "--text", tmp_path / "b.jsonl", "--lines"),
        *("--text-column", "body", "--to", tmp_path / "run.zarr", "--overflow", "truncate"),
    )
    assert found.code == 0
    assert open_run(tmp_path / "run.zarr").ids == ["a.txt:1", "a.txt:3", "b.jsonl:1", "b.jsonl:2"]


def test_a_recording_on_s3_is_the_one_in_a_folder(call: Call, folder: Path, s3_environment: None) -> None:
    """Recorded, shown and verified where it is; every value is bit for bit that of the same recording in a folder."""
    url = f"s3://{BUCKET}/cli/run.zarr"
    words = ("record", "--model", "demo", "--text", folder / "texts", "--sites", "resid_post[0:2]", "--to", url)
    assert call(*words).code == 0
    assert f"{url}: 3 examples" in call("info", url).out
    assert call("head", url, "--json").out == call("head", folder / "run.zarr", "--json").out
    assert call("verify", url).code == 0
    local, remote = open_run(folder / "run.zarr"), open_run(url)
    assert (remote.ids, remote.assets) == (local.ids, local.assets)
    for table in local.tables.values():
        for column in table.values():
            found, expected = remote.tables[table.name][column.name.partition("/")[2]].rows(), column.rows()
            assert np.array_equal(found, expected) if expected.dtype == object else same_bits(found, expected)
    again = call(*words)
    assert (again.code, "mode='resume' to continue it" in again.err) == (2, True)


def test_tokens_cannot_write_to_the_terminal() -> None:
    assert printable("a\x1b[31m\n") == "a\\x1b[31m\\n"
