"""Columns: examples, rows, slices, gathers and blocks are those of plain arrays, however parts and chunks lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, Feature, feature_shapes, random_values, same_bits, seeds, small_chunks, writer_at

from tensortape.stores import Column, Run, open_run
from tensortape.stores.errors import MissingExampleError, SchemaError, UnknownColumnError


def written(path: Path, feature: Feature, sessions: Sequence[Sequence[int]], seed: int) -> tuple[Run, list[np.ndarray]]:
    """A run of one column, in one part per session, and the values of each of its examples."""
    rng, given = np.random.default_rng(seed), []
    for number, lengths in enumerate(sessions):
        values = feature.values(rng, lengths)
        with small_chunks(), writer_at(path, "resume") as writer:
            writer.append(ids=[f"{number}.{i}" for i in range(len(lengths))], columns={feature.name: values})
        given += list(values)
    return open_run(path), given


tables = st.sampled_from(["token", "token.image", "example"])
column_features = st.builds(
    lambda table, dtype, shape: Feature(f"{table}/h", dtype, shape), tables, st.sampled_from(sorted(DTYPES)), feature_shapes
)
sessions = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=6), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
@given(column_features, sessions, seeds, st.data())
def test_a_column_reads_like_a_plain_array(tmp_path_factory, feature, sessions, seed, data):
    """Examples, slices of examples, rows by slice, number and mask, blocks of any size, over one to three parts."""
    run, given = written(tmp_path_factory.mktemp("column") / "run.zarr", feature, sessions, seed)
    column = run[feature.name]
    every = np.concatenate(given) if feature.ragged else np.stack(given)
    count = len(every)
    assert (column.shape, len(column), column.dtype) == (every.shape, count, DTYPES[feature.dtype])
    assert column.nbytes == every.nbytes
    assert same_bits(column.rows(), every)
    assert all(same_bits(column[number], value) for number, value in enumerate(given))
    assert all(same_bits(found, value) for found, value in zip(column[1:], given[1:], strict=True))
    picked = data.draw(st.slices(count) if count else st.just(slice(None)))
    assert same_bits(column.rows(picked), every[picked])
    numbers = data.draw(st.lists(st.integers(-count, count - 1), max_size=30)) if count else []
    assert same_bits(column.rows(numbers), every[np.array(numbers, np.int64)])
    mask = np.random.default_rng(seed).random(count) < 0.3
    assert same_bits(column.rows(mask), every[mask])
    blocks = list(column.blocks(rows=data.draw(st.integers(1, 100))))
    assert same_bits(np.concatenate([every[:0], *blocks]), every)


@settings(deadline=None, max_examples=20)
@given(sessions, seeds)
def test_edges_are_where_a_chunk_a_shard_or_a_part_begins(tmp_path_factory, sessions, seed):
    """Chunks of 8 rows and shards of 32, counted within each part."""
    run, _ = written(tmp_path_factory.mktemp("edges") / "run.zarr", Feature("token/h", "float32", (8,)), sessions, seed)
    for unit, size in (("chunk", 8), ("shard", 32)):
        expected, row = set(), 0
        for lengths in sessions:
            expected |= set(range(row, row + sum(lengths), size))
            row += sum(lengths)
        assert run["token/h"].edges(unit).tolist() == sorted(expected | {row})
    assert run["token/h"].lengths.tolist() == [length for lengths in sessions for length in lengths]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Two parts: token rows 0 to 29 in examples of 7, 0, 13 and then 10, chunks of 8 rows, shards of 32."""
    path = tmp_path_factory.mktemp("columns") / "run.zarr"
    rows = np.arange(90, dtype=np.float32).reshape(30, 3)
    with small_chunks(), writer_at(path) as writer:
        columns = {"token/h": [rows[:7], rows[:0], rows[7:20]], "example/y": [0.5, 1.5, 2.5], "example/t": ["x", "", "zé"]}
        writer.describe("token/h", axes=("neuron",), attributes={"unit": "none"})
        writer.append(ids=["a", "b", "c"], columns=columns)
    with small_chunks(), writer_at(path, "resume") as writer:
        writer.append(
            ids=["d"], columns={"token/h": [rows[20:]], "example/y": [3.5], "example/t": ["w"], "token/more": [rows[20:]]}
        )
    return open_run(path)


@pytest.fixture
def column(run) -> Column:
    return run["token/h"]


def first(values: Any) -> list[int]:
    """Rows are told by their first value, a multiple of 3."""
    return (np.asarray(values)[:, 0] / 3).astype(int).tolist()


def test_an_example_is_its_rows(column):
    assert [first(column[number]) for number in range(4)] == [list(range(7)), [], list(range(7, 20)), list(range(20, 30))]
    assert column[1].shape == (0, 3)


def test_negative_numbers_count_from_the_end(column):
    assert first(column[-1]) == first(column[3])
    assert first(column[-4]) == first(column[0])
    assert first(column[np.int64(2)]) == first(column[2])


@pytest.mark.parametrize("number", [4, -5, 100])
def test_an_example_that_is_not_there_is_an_index_error(column, number):
    with pytest.raises(IndexError, match=f"example {number} of a run that has 4"):
        column[number]


def test_a_slice_of_examples_is_a_list(column):
    assert [first(rows) for rows in column[1:3]] == [[], list(range(7, 20))]
    assert [first(rows) for rows in column[::-1]] == [first(column[number]) for number in (3, 2, 1, 0)]
    assert column[4:] == []


def test_a_column_can_be_iterated_over_its_examples(column):
    assert [len(rows) for rows in column] == [7, 0, 13, 10]


def test_values_of_the_example_table_are_single_values(run):
    assert run["example/y"][2] == 2.5
    assert run["example/t"][2] == "zé"
    assert [run["example/t"][number] for number in range(4)] == ["x", "", "zé", "w"]
    assert run["example/t"][-1:] == ["w"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (slice(None), range(30)),
        (slice(5, 25), range(5, 25)),
        (slice(-3, None), range(27, 30)),
        (slice(None, None, -1), range(29, -1, -1)),
        (slice(25, 5, -7), range(25, 5, -7)),
        (slice(20, 5), []),
        (slice(28, 99), range(28, 30)),
        ([29, 0, 0, -1, 19, 20], [29, 0, 0, 29, 19, 20]),
        (np.array([3], np.uint8), [3]),
        ([], []),
        (np.array([], np.int32), []),
        (range(3, 5), [3, 4]),
        (np.arange(30) % 11 == 0, [0, 11, 22]),
        (np.zeros(30, bool), []),
        ([True] + 29 * [False], [0]),
    ],
    ids=str,
)
def test_rows_are_picked_as_numpy_picks_them(column, selection, expected):
    found = column.rows(selection)
    assert first(found) == list(expected)
    assert found.dtype == np.float32
    assert found.shape == (len(list(expected)), 3)


def test_rows_of_text_are_picked_likewise(run):
    assert run["example/t"].rows([3, 0, 0, -2]).tolist() == ["w", "x", "x", "zé"]
    assert run["example/t"].rows(slice(1, 3)).tolist() == ["", "zé"]
    assert run["example/t"].rows([]).tolist() == []


@pytest.mark.parametrize("selection", [[30], [-31], [0, 99], np.array([2**40])])
def test_rows_that_are_not_there_are_an_index_error(column, selection):
    with pytest.raises(IndexError, match="of a column that has 30"):
        column.rows(selection)


@pytest.mark.parametrize("length", [1, 29, 31])
@pytest.mark.parametrize("value", [True, False])
def test_a_mask_of_another_length_is_an_index_error(column, length, value):
    """A mask over examples, say, must not pick rows."""
    with pytest.raises(IndexError, match="30"):
        column.rows(np.full(length, value))


@pytest.mark.parametrize("selection", [[1.0, 2.7], np.array([0.5]), ["1"], None])
def test_rows_are_picked_by_integers_only(column, selection):
    with pytest.raises((IndexError, TypeError)):
        column.rows(selection)


def test_a_block_within_one_chunk_is_a_view_of_the_file(column):
    """Zero-copy: blocks of the chunk size that start at chunks share memory with the mapped shard, and are read-only."""
    blocks = list(column.blocks(rows=4))
    whole = column.rows(slice(0, 8))
    assert [len(block) for block in blocks] == [4, 4, 4, 4, 4, 4, 4, 2]
    assert np.shares_memory(blocks[0], whole)
    assert np.shares_memory(blocks[1], whole)
    assert not np.shares_memory(blocks[2], whole)
    assert not blocks[0].flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        blocks[0][0] = 1


def test_reading_the_same_rows_twice_maps_them_once(column):
    assert np.shares_memory(column.rows(slice(1, 3)), column.rows(slice(2, 4)))


def test_present_says_which_examples_have_values(run):
    assert run["token/h"].present.tolist() == [True] * 4
    assert run["token/more"].present.tolist() == [False, False, False, True]
    assert run["token/more"].present.dtype == bool


def test_an_example_without_a_value_is_named(run):
    with pytest.raises(MissingExampleError, match="'token/more' has no value for example 'b'") as caught:
        run["token/more"][1]
    assert isinstance(caught.value, KeyError)
    with pytest.raises(MissingExampleError, match="example 'a'"):
        run["token/more"][:]


def test_a_column_of_some_examples_has_their_rows_only(run):
    assert run["token/more"].shape == (10, 3)
    assert first(run["token/more"].rows()) == list(range(20, 30))
    assert first(run["token/more"][3]) == list(range(20, 30))


def test_what_a_column_says_of_itself(run):
    column = run["token/h"]
    assert column.axes == ("token", "neuron")
    assert column.attributes == {"unit": "none"}
    assert column.site is None
    assert repr(column) == "<Column token/h float32 (30, 3)>"
    assert run["example/y"].axes == ("example",)
    assert (run["example/t"].dtype, run["example/t"].shape) == (np.dtype(object), (4,))
    assert run["example/t"].nbytes == 5 + 4 * 8
    assert column.paths == ["parts/p000000/token/h", "parts/p000001/token/h"]
    assert run["example/t"].role_paths["end"] == [f"parts/p00000{part}/example/t/end" for part in (0, 1)]


def test_numpy_takes_a_column_as_its_rows(run):
    assert np.asarray(run["token/h"]).shape == (30, 3)
    assert np.asarray(run["example/y"], dtype=np.float16).tolist() == [0.5, 1.5, 2.5, 3.5]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_torch_gets_the_same_bits(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    values = [random_values(np.random.default_rng(4), dtype, (length, 3)) for length in (5, 0, 7)]
    with small_chunks(), writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=[0, 1, 2], columns={"token/h": values})
    tensor = open_run(tmp_path / "run.zarr")["token/h"].to_torch()
    assert tensor.dtype == getattr(torch, dtype)
    assert tensor.shape == (12, 3)
    assert tensor.view(torch.uint8).numpy().tobytes() == np.concatenate(values).tobytes()


def test_text_has_no_tensor(run):
    with pytest.raises(SchemaError, match="'example/t' is text, which torch has no dtype for"):
        run["example/t"].to_torch()


# Tables.


def test_a_table_lists_its_columns(run):
    token = run.tables["token"]
    assert list(token) == ["h", "more"]
    assert "h" in token
    assert len(token) == 2
    assert (token.rows, token.lengths.tolist()) == (30, [7, 0, 13, 10])
    assert run.tables["example"].lengths.tolist() == [1, 1, 1, 1]
    assert repr(token) == "<Table token: 30 rows, 2 columns>"


def test_a_column_that_a_table_does_not_have_is_refused_with_those_it_has(run):
    with pytest.raises(UnknownColumnError, match="table 'token' has no column 'H'; it has h, more"):
        run.tables["token"]["H"]


def test_single_values_become_a_data_frame(run):
    frame = run.examples
    assert set(frame.columns) == {"id", "phase", "step", "y", "t"}
    assert frame["id"].tolist() == ["a", "b", "c", "d"]
    assert frame["y"].tolist() == [0.5, 1.5, 2.5, 3.5]
    assert frame["t"].tolist() == ["x", "", "zé", "w"]
    assert frame["phase"].tolist() == ["record"] * 4
    assert frame["step"].tolist() == [-1] * 4


def test_tokens_become_a_data_frame_that_numbers_their_examples(tmp_path):
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(
            ids=["a", "b", "c"],
            columns={"token/tag": [[1, 2], np.array([], int), [3]], "token/h": [np.ones((n, 2)) for n in (2, 0, 1)]},
        )
    frame = open_run(tmp_path / "run.zarr").tokens
    assert frame.to_dict("list") == {"example": [0, 0, 2], "tag": [1, 2, 3]}


def test_examples_without_a_value_are_none_in_a_data_frame(tmp_path):
    path = tmp_path / "run.zarr"
    with writer_at(path) as writer:
        writer.append(ids=["a"], columns={"example/y": [1], "token/tag": [[1, 2]], "token/other": [[7, 8]]})
    with writer_at(path, "resume") as writer:
        writer.append(ids=["b"], columns={"example/z": [2.5], "token/tag": [[3]]})
    run = open_run(path)
    assert run.examples[["y", "z"]].to_dict("list") == {"y": [1, None], "z": [None, 2.5]}
    assert run.tokens.to_dict("list") == {"example": [0, 0, 1], "tag": [1, 2, 3], "other": [7, 8, None]}


def test_an_example_without_rows_in_a_table_has_none_in_its_data_frame(tmp_path):
    path = tmp_path / "run.zarr"
    with writer_at(path) as writer:
        writer.append(ids=["a"], columns={"example/y": [1]})
    with writer_at(path, "resume") as writer:
        writer.append(ids=["b"], columns={"token/tag": [[3, 4]]})
    run = open_run(path)
    assert run.tokens.to_dict("list") == {"example": [1, 1], "tag": [3, 4]}
    assert run.tables["token"].lengths.tolist() == [-1, 2]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_fits_into_a_data_frame(tmp_path, dtype):
    """A loss per token in bfloat16, say."""
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=["a"], columns={"token/x": [np.ones(3, DTYPES[dtype])], "example/x": np.ones(1, DTYPES[dtype])})
    run = open_run(tmp_path / "run.zarr")
    assert run.tokens["x"].astype(float).tolist() == [1.0] * 3
    assert run.examples["x"].astype(float).tolist() == [1.0]


@pytest.mark.parametrize("name", ["example", "index", "id"])
def test_a_token_column_may_have_any_name(tmp_path, name):
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=["a"], columns={f"token/{name}": [[5, 6]]})
    frame = open_run(tmp_path / "run.zarr").tokens
    assert [5, 6] in [frame.iloc[:, number].tolist() for number in range(frame.shape[1])]


def test_a_run_without_a_table_has_an_empty_data_frame(tmp_path):
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=["a"], columns={"example/y": [1]})
    run = open_run(tmp_path / "run.zarr")
    assert isinstance(run.tokens, pd.DataFrame)
    assert run.tokens.empty
    assert run.steps.empty


def test_rows_of_the_step_table_are_not_rows_of_examples(tmp_path):
    with writer_at(tmp_path / "run.zarr") as writer:
        with pytest.raises(SchemaError, match="step table"):
            writer.append(ids=["a", "b"], columns={"step/loss": [0.5, 0.25]})
        writer.append(ids=["a"], columns={"example/y": [1]})
    assert open_run(tmp_path / "run.zarr").steps.empty


def test_pair_tables_are_ragged_too(tmp_path):
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=["a", "b"], columns={"pair/w": [np.ones((4, 2), np.float16), np.ones((9, 2), np.float16)]})
    run = open_run(tmp_path / "run.zarr")
    assert run["pair/w"].shape == (13, 2)
    assert run["pair/w"].axes[0] == "pair"
    assert run.tables["pair"].lengths.tolist() == [4, 9]


def test_float8_is_returned_as_such(tmp_path):
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=["a"], columns={"token/h": [values]})
    column = open_run(tmp_path / "run.zarr")["token/h"]
    assert column.dtype == ml_dtypes.float8_e4m3fn
    assert same_bits(column[0], values)
