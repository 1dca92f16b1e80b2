"""Exports: what the libraries of the formats themselves read back is what was recorded, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from strategies import DTYPES, Feature, feature_shapes, random_values, same_bits, seeds, small_chunks, writer_at

from tensortape.stores import Run, exports, open_run
from tensortape.stores.errors import OutputExistsError, SchemaError, UnknownColumnError


def written(path: Path, features: list[Feature], sessions: list[list[int]], seed: int = 0) -> Run:
    """A run of one part per session."""
    rng = np.random.default_rng(seed)
    for number, lengths in enumerate(sessions):
        columns = {feature.name: feature.values(rng, lengths) for feature in features}
        with small_chunks(), writer_at(path, "resume") as writer:
            writer.append(ids=[f"{number}.{i}" for i in range(len(lengths))], columns=columns)
    return open_run(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Two parts, a text column, names that file systems do not like, and a column of one example."""
    features = [Feature("token/Model.0:out", "bfloat16", (3,)), Feature("token/ids", "int64", ()), Feature("example/y", "bool", ())]
    found = written(tmp_path_factory.mktemp("export") / "run.zarr", features, [[19, 0, 52], [41]])
    found.add_column("token/late", [found["token/ids"][2].astype(np.float32)], ids=["0.2"])
    found.add_column("example/said", ["a", "b", "c", "d"])
    return open_run(found.path)


def read_safetensors(folder: Path, name: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The tensors of a column in the order of the index, read by the library, and what the index says of it."""
    entry = json.loads((folder / "index.json").read_text())["columns"][name]
    tensors = []
    for file in entry["files"]:
        with safe_open(folder / file["file"], "pt") as opened:
            assert list(opened.keys()) == [name]
            tensors.append(opened.get_tensor(name))
            assert len(tensors[-1]) == file["rows"][1] - file["rows"][0]
    return tensors, entry


def tensor_bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).numpy()


features = st.builds(Feature, st.sampled_from(["token/h", "example/h"]), st.sampled_from(sorted(DTYPES)), feature_shapes)
sessions = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(deadline=None, max_examples=25)
@given(features, sessions, seeds, st.integers(1, 50))
def test_files_hold_the_bits_that_were_recorded(tmp_path_factory, feature, sessions, seed, rows):
    folder = tmp_path_factory.mktemp("export")
    run = written(folder / "run.zarr", [feature], sessions, seed)
    column = run[feature.name]
    run.export(folder / "st", rows_per_file=rows, sites=[feature.name])
    tensors, entry = read_safetensors(folder / "st", feature.name)
    assert [len(tensor) for tensor in tensors[:-1]] == [rows] * max(len(tensors) - 1, 0)
    assert sum(map(len, tensors)) == len(column)
    assert all(str(tensor.dtype) == f"torch.{feature.dtype}" for tensor in tensors)
    found = np.concatenate([tensor_bits(tensor) for tensor in tensors]) if tensors else np.empty(column.shape, column.dtype)
    assert same_bits(found, column.rows())
    run.export(folder / "npy", "npy", sites=feature.name)
    array = np.load(next((folder / "npy").rglob("*.npy")))
    assert array.shape == column.shape
    assert same_bits(array, column.rows())
    assert entry["dtype"] == feature.dtype


def test_the_index_says_where_everything_is_and_whose(run, tmp_path):
    folder = run.export(tmp_path / "out", rows_per_file=50)
    index = json.loads((folder / "index.json").read_text())
    assert sorted(index["columns"]) == ["example/y", "token/Model.0:out", "token/ids", "token/late"]
    assert (index["run"], index["text_left_out"]) == (run.uid, ["example/id", "example/phase", "example/said"])
    entry = index["columns"]["token/Model.0:out"]
    assert (entry["dtype"], entry["shape"], entry["axes"], entry["table"]) == ("bfloat16", [112, 3], ["token", "feature"], "token")
    assert [file["rows"] for file in entry["files"]] == [[0, 50], [50, 100], [100, 112]]
    assert entry["files"][1]["file"] == "token/~4dodel.0~3aout-00001-of-00003.safetensors"
    assert entry["examples"] is None
    assert index["columns"]["token/late"]["examples"] == [2]
    examples = [json.loads(line) for line in (folder / index["examples"]).read_text().splitlines()]
    assert [(one["id"], one["rows"]["token"]) for one in examples] == [("0.0", 19), ("0.1", 0), ("0.2", 52), ("1.0", 41)]
    first = sum(one["rows"]["token"] for one in examples[:2])
    rows = np.concatenate([tensor_bits(tensor) for tensor in read_safetensors(folder, "token/ids")[0]])
    assert same_bits(rows[first : first + 52], run["token/ids"][2])


def test_npy_names_the_dtype_that_numpy_cannot(run, tmp_path):
    folder = run.export(tmp_path / "out", "npy", sites=["token/Model.0:out", "token/late"])
    entry = json.loads((folder / "index.json").read_text())["columns"]["token/Model.0:out"]
    assert (entry["dtype"], entry["stored_dtype"]) == ("bfloat16", "uint16")
    found = np.load(folder / entry["files"][0]["file"], mmap_mode="r")
    assert found.dtype == np.uint16
    assert same_bits(found, run["token/Model.0:out"].rows())


@pytest.mark.parametrize("format", ["safetensors", "npy"])
def test_files_are_written_a_bounded_piece_at_a_time(run, tmp_path, monkeypatch, format):
    monkeypatch.setattr(exports.safetensors, "FILE_BYTES", 100)
    monkeypatch.setattr(exports.npy, "BLOCK_BYTES", 100)
    sizes: list[int] = []
    column_type = type(run["token/ids"])
    contiguous = column_type._contiguous
    monkeypatch.setattr(column_type, "_contiguous", lambda self, a, b: sizes.append(b - a) or contiguous(self, a, b))
    run.export(tmp_path / "out", format, sites=["token/ids"])
    assert max(sizes) == 12
    assert sum(sizes) == 112


def test_an_output_that_exists_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        run.export(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize("format", ["safetensors", "npy"])
def test_a_failed_export_leaves_nothing_behind(run, tmp_path, monkeypatch, format):
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(exports.index_document, "write", fail)
    with pytest.raises(OSError, match="no space"):
        run.export(tmp_path / "above" / "out", format)
    assert list((tmp_path / "above").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"format": "hdf5"}, ValueError, "'safetensors', 'npy', 'sae-lens', not as 'hdf5'"),
        ({"format": "npy", "rows_per_file": 3}, ValueError, "no rows_per_file"),
        ({"context_size": 3}, ValueError, "no context_size"),
        ({"rows_per_file": 0}, ValueError, "rows_per_file=0"),
        ({"sites": ["example/said"]}, SchemaError, "example/said is text"),
        ({"sites": "token/nothing"}, UnknownColumnError, "no column"),
        ({"format": "sae-lens", "sites": "token/late", "context_size": 53}, SchemaError, "52 rows, which make no sequence of 53"),
        ({"format": "sae-lens", "sites": "token/Model.0:out"}, SchemaError, "19 to 52 rows; give context_size="),
        ({"format": "sae-lens", "sites": "token/ids", "context_size": 3}, SchemaError, "token/ids holds none"),
        ({"format": "sae-lens", "sites": "example/y", "context_size": 3}, SchemaError, "of example"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(run, tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        run.export(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


# SAELens.


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Nothing is written into the user's own folder of datasets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "none"))
    yield
    assert not (tmp_path / "none").exists()


def as_saelens_reads(folder: Path, hook: str, context: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What SAELens' `ActivationsStore.load_cached_activation_dataset` checks and takes: rows [n, d] and token ids [n]."""
    found = datasets.load_from_disk(str(folder))
    found.set_format(type="torch", columns=[hook, "token_ids"], dtype=torch.float32)
    assert found.features[hook].shape == (context, width)
    batch = found[0 : len(found)]
    assert batch[hook].shape == (len(found), context, width)
    assert batch["token_ids"].shape == (len(found), context)
    return batch[hook].reshape(-1, width), batch["token_ids"].reshape(-1)


SITE = {"path": "layers.3", "port": "out", "call": 1, "aliases": [["", "resid_post", 3, 7]]}


def with_hook(path: Path, dtype: str, lengths: list[int], shape: tuple[int, ...] = (5,)) -> Run:
    rng = np.random.default_rng(0)
    with small_chunks(), writer_at(path) as writer:
        writer.describe("token/layers.3:out", site=SITE)
        values = [random_values(rng, dtype, (length, *shape)) for length in lengths]
        ids = [rng.integers(0, 1000, length) for length in lengths]
        writer.append(
            ids=list(range(len(lengths))), columns={"token/layers.3:out": values, "token/input_ids": ids, "example/y": lengths}
        )
    return open_run(path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_saelens_reads_rows_and_tokens(tmp_path, dtype):
    run = with_hook(tmp_path / "run.zarr", dtype, [13] * 9)
    folder = run.export(tmp_path / "out", "sae-lens", sites="resid_post[3]", rows_per_file=40)
    rows, tokens = as_saelens_reads(folder, "blocks.3.hook_resid_post", 13, 5)
    expected = run["resid_post[3]"].rows().astype("float16" if dtype == "float16" else "float32")
    stored = datasets.load_from_disk(str(folder)).data["blocks.3.hook_resid_post"].combine_chunks().storage
    assert same_bits(stored.flatten().flatten().to_numpy().reshape(-1, 5), expected)
    np.testing.assert_array_equal(rows.numpy(), expected.astype(np.float32))
    assert tokens.tolist() == run["token/input_ids"].rows().tolist()
    assert len(list(folder.glob("data-*.arrow"))) == 3
    assert {path.name for path in folder.iterdir() if path.suffix != ".arrow"} == {"dataset_info.json", "state.json"}


@pytest.mark.usefixtures("offline")
def test_examples_of_several_lengths_are_cut_into_sequences(tmp_path):
    run = with_hook(tmp_path / "run.zarr", "float32", [13, 0, 29, 7], shape=(2, 3))
    folder = run.export(tmp_path / "out", "sae-lens", sites=["resid_post[3]"], context_size=11)
    rows, tokens = as_saelens_reads(folder, "blocks.3.hook_resid_post", 11, 6)
    assert same_bits(rows.numpy(), run["resid_post[3]"].rows(slice(44)).reshape(44, 6))
    assert tokens.tolist() == run["token/input_ids"].rows(slice(44)).tolist()


def test_without_datasets_the_error_names_the_extra(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'tensortape\[datasets\]'"):
        run.export(tmp_path / "out", "sae-lens", sites="token/late")
