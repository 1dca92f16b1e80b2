"""zarr-python, TensorStore and zarrs read what RunWriter wrote, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
import zarrs  # noqa: F401 (its codec pipeline is named below)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, Feature, bits, edit_json, features, lengths, same_bits, seeds, small_chunks, writer_at

from tensortape.stores import Run, codecs, open_run

ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}


def with_zarr(path: Path) -> np.ndarray:
    return zarr.open_array(path, mode="r")[...]


def with_tensorstore(path: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, open=True, read=True).result().read().result()


def with_zarrs(path: Path) -> np.ndarray:
    with zarr.config.set(ZARRS):
        return zarr.open_array(path, mode="r")[...]


READERS: list[Callable[[Path], np.ndarray]] = [with_zarr, with_tensorstore, with_zarrs]


def assert_all_read(path: Path, expected: np.ndarray) -> None:
    for reader in READERS:
        found = reader(path)
        assert same_bits(found, expected), f"{reader.__name__} reads something else at {path}"


def assert_foreign_readers_agree(run: Run, name: str, sessions: Sequence[np.ndarray], dtype: str) -> None:
    """Every array of a column, one per part, holds what its session gave."""
    column = run[name]
    assert len(column.paths) == len(sessions)
    assert column.role_paths == {"values": column.paths}
    for path, values in zip(column.paths, sessions, strict=True):
        assert zarr.open_array(run.path / path, mode="r").attrs["logical_dtype"] == dtype
        assert_all_read(run.path / path, bits(values) if dtype == "bfloat16" else values)


def write_session(
    path: Path, plan: Any, drawn: list[Feature], rng: np.random.Generator, first: int, codec: str = "none"
) -> dict[str, np.ndarray]:
    """One writer's session: an append per entry of `plan`, with a commit where it says so. Returns what each column holds."""
    given: dict[str, list[np.ndarray]] = {feature.name: [] for feature in drawn}
    with small_chunks(), writer_at(path, mode="resume") as writer:
        for feature in drawn:
            writer.describe(feature.name, compress=codec)
        for rows, commit in plan:
            columns = {feature.name: feature.values(rng, rows) for feature in drawn}
            writer.append(ids=range(first, first + len(rows)), columns=columns)
            first += len(rows)
            for feature in drawn:
                given[feature.name] += columns[feature.name] if feature.ragged else [columns[feature.name]]
            if commit:
                writer.commit()
    return {name: np.concatenate(blocks) for name, blocks in given.items()}


appends = st.lists(st.tuples(lengths, st.booleans()), min_size=1, max_size=4)


@settings(deadline=None, max_examples=25)
@given(features(), st.lists(appends, min_size=1, max_size=2), seeds, st.sampled_from(codecs.NAMES))
def test_three_foreign_readers_return_the_bits_that_were_written(tmp_path_factory, drawn, plans, seed, codec):
    """P9: whatever dtype, feature shape, codec, lengths, commits and sessions: every array of every part holds the given bits."""
    path = tmp_path_factory.mktemp("foreign") / "run.zarr"
    rng = np.random.default_rng(seed)
    sessions = [write_session(path, plan, drawn, rng, 1000 * number, codec) for number, plan in enumerate(plans)]
    run = open_run(path)
    for feature in drawn:
        assert_foreign_readers_agree(run, feature.name, [session[feature.name] for session in sessions], feature.dtype)
    assert run.ids == [1000 * n + i for n, plan in enumerate(plans) for i in range(sum(len(rows) for rows, _ in plan))]


def test_small_runs_of_the_property_have_several_shards_and_commits(tmp_path):
    """The property above would prove little if everything fitted into one shard."""
    drawn = [Feature("token/c0", "bfloat16", (5,)), Feature("token/c1", "float64", ())]
    plan = [([40, 0, 37, 31], True)] * 6
    write_session(tmp_path / "run.zarr", plan, drawn, np.random.default_rng(0), first=0)
    [part] = open_run(tmp_path / "run.zarr").parts
    assert part.commits >= 6
    assert min(len(part.arrays[f"token/c{number}"].shards) for number in (0, 1)) >= 2


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_foreign_readers_agree_on_chunks_of_ordinary_size(tmp_path, dtype):
    """Nothing made small for the test: 20,011 rows are five chunks, in more than one shard, with the last one partly filled."""
    rng = np.random.default_rng(1)
    feature = Feature("token/h", dtype, (3,))
    pieces = [feature.values(rng, [length]) for length in (9999, 10012)]
    with writer_at(tmp_path / "run.zarr", memory_budget=600_000) as writer:
        for number, piece in enumerate(pieces):
            writer.append(ids=[number], columns={"token/h": piece})
            writer.commit()
    run = open_run(tmp_path / "run.zarr")
    assert len(run.parts[0].arrays["token/h"].shards) >= 2
    assert_foreign_readers_agree(run, "token/h", [np.concatenate([array for piece in pieces for array in piece])], dtype)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "bool", "float64"])
def test_foreign_readers_agree_on_compressed_chunks_of_ordinary_size(tmp_path, dtype, codec):
    """Values that do compress, in several shards of several chunks, the last chunk filled in part."""
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(20011, 3)) * [1, 0.01, 0] * 10).round().astype(DTYPES[dtype])
    with writer_at(tmp_path / "run.zarr", memory_budget=800_000) as writer:
        writer.describe("token/h", compress=codec)
        for number, piece in enumerate((values[:9999], values[9999:])):
            writer.append(ids=[number], columns={"token/h": [piece]})
            writer.commit()
    run = open_run(tmp_path / "run.zarr")
    assert len(run.parts[0].arrays["token/h"].shards) >= 2
    assert run["token/h"].stored_bytes < run["token/h"].nbytes
    assert_foreign_readers_agree(run, "token/h", [values], dtype)
    document = zarr.open_array(run.path / run["token/h"].paths[0], mode="r").metadata.codecs[0].to_dict()
    inner = [codec["name"] for codec in document["configuration"]["codecs"]]
    assert inner == ["bytes", {"lz4": "blosc", "zstd": "zstd"}[codec], "crc32c"]


@pytest.mark.parametrize("codec", codecs.NAMES)
def test_a_quantised_column_can_be_put_together_from_what_foreign_readers_see(tmp_path, codec):
    """Codes times scales, and outliers at the positions that their array's attributes name."""
    values = np.random.default_rng(3).normal(size=(211, 3, 67)).astype(np.float32)
    values[:, 1, 5] += 300
    with small_chunks(rows=32, chunk_bytes=1 << 14, shard_bytes=1 << 16), writer_at(tmp_path / "run.zarr") as writer:
        writer.describe("token/h", quantize="int8", compress=codec)
        for number, piece in enumerate(np.array_split(values, 3)):
            writer.append(ids=[number], columns={"token/h": [piece]})
    run = open_run(tmp_path / "run.zarr")
    column = run["token/h"]
    paths = {role: run.path / path for role, [path] in column.role_paths.items()}
    for reader in READERS:
        codes, scale, outliers = (reader(paths[role]) for role in ("codes", "scale", "outliers"))
        assert (codes.shape, scale.shape, outliers.shape) == ((211, 3, 67), (211,), (211, 1))
        built = codes * scale[:, None, None]
        positions = zarr.open_array(paths["outliers"], mode="r").attrs["positions"]
        assert positions == [67 + 5]
        built.reshape(211, -1)[:, positions] = outliers
        assert same_bits(column.rows(), built)
    assert same_bits(column.rows()[:, 1, 5], values[:, 1, 5])


texts = st.lists(st.text(max_size=30), min_size=1, max_size=60)


@settings(deadline=None, max_examples=25)
@given(texts)
def test_text_is_read_by_foreign_readers_as_utf8_bytes_and_ends(tmp_path_factory, texts):
    """Text is two plain arrays: the UTF-8 bytes of all texts, and where each one ends."""
    path = tmp_path_factory.mktemp("text") / "run.zarr"
    with small_chunks(), writer_at(path) as writer:
        for start in range(0, len(texts), 7):
            some = texts[start : start + 7]
            writer.append(ids=[f"é{start + number}" for number in range(len(some))], columns={"example/text": some})
    run = open_run(path)
    paths = run["example/text"].role_paths
    encoded = [text.encode() for text in texts]
    assert_all_read(path / paths["utf8"][0], np.frombuffer(b"".join(encoded), np.uint8))
    assert_all_read(path / paths["end"][0], np.cumsum([len(text) for text in encoded], dtype=np.int64))
    assert run["example/text"].rows().tolist() == texts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_p9_all_65536_patterns_of_16_bits_survive(tmp_path, dtype):
    """P9: every bfloat16 and every float16, NaN payloads included, for our reader, torch and the three foreign readers."""
    torch = pytest.importorskip("torch")
    every = np.arange(1 << 16, dtype=np.uint16)
    np.random.default_rng(2).shuffle(every)
    values = every.view(DTYPES[dtype])
    with writer_at(tmp_path / "run.zarr", memory_budget=600_000) as writer:
        writer.append(ids=["all"], columns={"token/h": [values]})
    run = open_run(tmp_path / "run.zarr")
    column = run["token/h"]
    assert column[0].dtype == DTYPES[dtype]
    assert same_bits(column[0], values)
    assert column.to_torch().dtype == getattr(torch, dtype)
    assert np.array_equal(column.to_torch().view(torch.int16).numpy().view(np.uint16), every)
    assert len(run.parts[0].arrays["token/h"].shards) > 1
    assert_foreign_readers_agree(run, "token/h", [values], dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_p9_torch_tensors_are_written_without_changing_a_bit(tmp_path, dtype):
    """P9: a torch tensor of all 16-bit patterns is stored as the same patterns."""
    torch = pytest.importorskip("torch")
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=["all"], columns={"token/h": [every.view(getattr(torch, dtype))]})
    assert np.array_equal(bits(open_run(tmp_path / "run.zarr")["token/h"][0]), every.numpy().view(np.uint16))


def test_zarr_sees_groups_and_names_all_the_way_down(tmp_path):
    """A plain zarr.open_group of the run finds parts, tables and columns, and rows past the committed ones are fill values."""
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.describe("token/layers.3:out", axes=("neuron",), attributes={"unit": "none"})
        writer.append(ids=["a"], columns={"token/layers.3:out": [np.ones((2, 3), np.float32)], "example/y": [1]})
    group = zarr.open_group(tmp_path / "run.zarr", mode="r")
    token = group["parts/p000000/token"]
    assert list(token.array_keys()) == ["layers.3~3aout"]
    array = token["layers.3~3aout"]
    assert array.metadata.dimension_names == ("token", "neuron")
    assert dict(array.attrs) == {"logical_dtype": "float32", "column": "token/layers.3:out", "unit": "none"}
    assert sorted(group["parts/p000000/example"].array_keys()) == ["length.token", "start.token", "step", "y"]


FILLS = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000, "int64": -1, "int8": -1, "uint8": 255, "bool": False}


@pytest.mark.parametrize("dtype", sorted(FILLS))
def test_rows_past_the_written_ones_hold_the_fill_value(tmp_path, dtype):
    """A partly filled chunk is padded with NaN, -1 or the largest value: visible to a reader that ignores the shape."""
    with small_chunks(), writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=["a"], columns={"token/h": [np.ones(3, DTYPES[dtype])]})
    path = tmp_path / "run.zarr" / open_run(tmp_path / "run.zarr")["token/h"].paths[0]
    edit_json(path / "zarr.json", lambda document: document.update(shape=[8]))
    for reader in READERS:
        tail = reader(path)[3:]
        assert len(tail) == 5
        expected = FILLS[dtype]
        assert (tail == expected).all() if dtype not in ("float16", "float32") else (bits(tail) == expected).all()
