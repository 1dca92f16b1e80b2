"""run.batches: every row once per epoch, in an order that seed, epoch and run decide, whoever reads and wherever it is resumed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import BUCKET
from s3_server import options as object_storage
from strategies import random_values, same_bits, seeds, small_chunks, writer_at

from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores import batches as batching
from tensortape.stores.batches import Batches
from tensortape.stores.errors import MissingExampleError, NotARunError, SchemaError, UnknownColumnError
from tensortape.stores.row_order import RowOrder


def written(path: Path, sessions: Sequence[Sequence[int]]) -> Run:
    """A run of one part per session; `token/h` [rows, 2] counts rows over all of them, and `token/wide` [rows, 11] repeats it."""
    row = 0
    for number, lengths in enumerate(sessions):
        rows = [np.arange(row + sum(lengths[:i]), row + sum(lengths[: i + 1]), dtype=np.float32) for i in range(len(lengths))]
        row += sum(lengths)
        columns: dict[str, Any] = {
            "token/h": [np.stack([value, value], 1) for value in rows],
            "token/wide": [np.repeat(value[:, None], 11, 1) for value in rows],
            "token/text": [list(map(str, value)) for value in rows] if sum(lengths) else None,
            "example/y": np.arange(len(lengths), dtype=np.int64),
        }
        given = {name: values for name, values in columns.items() if values is not None}
        with small_chunks(), writer_at(path, "resume") as writer:
            writer.append(ids=[f"{number}.{i}" for i in range(len(lengths))], columns=given)
    return open_run(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """103 rows in two parts, chunks of 8 rows at most; `token/late` covers three examples, in another order than the run's."""
    path = tmp_path_factory.mktemp("batches") / "run.zarr"
    found = written(path, [[13, 0, 29, 7], [31, 23]])
    late = {number: found["token/h"][number] for number in (4, 0, 2)}
    with small_chunks():
        found.add_column("token/late", list(late.values()), ids=[found.ids[number] for number in late])
    return open_run(path)


def numbers(batches: Any) -> list[list[int]]:
    """The rows in each batch of `token/h`, which counts them."""
    return [np.asarray(batch)[:, 0].astype(int).tolist() for batch in batches]


def flat(batches: Any) -> list[int]:
    return [row for batch in numbers(batches) for row in batch]


# Every row, once.

sessions = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), min_size=1, max_size=3).filter(
    lambda drawn: any(map(any, drawn))
)
sizes = st.integers(1, 70)


@settings(deadline=None, max_examples=40)
@given(sessions, sizes, st.one_of(st.none(), st.integers(1, 200)), st.booleans(), seeds, st.data())
def test_an_epoch_is_every_row_of_the_chosen_examples_once(tmp_path_factory, sessions, batch, buffer, shuffle, seed, data):
    """Over one to three parts, any sizes of batch and buffer, and any choice of examples; both columns show the same rows."""
    run = written(tmp_path_factory.mktemp("epoch") / "run.zarr", sessions)
    filled = np.flatnonzero(run["token/h"].lengths > 0).tolist()
    examples = data.draw(st.one_of(st.none(), st.lists(st.sampled_from(filled), min_size=1)))
    chosen = range(len(run)) if examples is None else sorted(set(examples))
    expected = [row for number in chosen for row in run["token/h"][number][:, 0].tolist()]
    batches = run.batches(
        ["token/wide", "token/h"],
        batch,
        buffer_rows=buffer,
        shuffle=shuffle,
        seed=seed,
        examples=None if examples is None else examples,
    )
    for _ in range(2):
        found = list(batches)
        assert all(np.array_equal(one["token/wide"][:, :2], one["token/h"]) for one in found)
        rows = flat(one["token/h"] for one in found)
        assert sorted(rows) == expected
        assert [len(one["token/h"]) for one in found[:-1]] == [batch] * (len(batches) - 1)
        if not shuffle:
            assert rows == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), sizes, st.integers(1, 300), seeds, st.integers(0, 3))
def test_groups_are_whole_batches_of_about_the_same_size(blocks, batch, buffer, seed, epoch):
    """A model in plain Python: groups follow one another, cut blocks only at their ends, and hold no more than asked for."""
    order = RowOrder(np.concatenate([[0], np.cumsum(blocks)]), batch, buffer, seed)
    owners = [order.group_of(number) for number in range(order.batches)]
    counts = [owners.count(group) for group in range(order.groups)]
    assert owners == sorted(owners)
    assert max(counts) - min(counts) <= 1
    assert max(counts) <= max(1, buffer // batch)
    visited = []
    for group in range(order.groups):
        rows = [row for first, last in order.blocks(epoch, group) for row in range(first, last)]
        first, last = order.bounds(group)
        assert len(rows) == last - first <= order.most
        assert sorted(order.mixing(epoch, group)) == list(range(len(rows)))
        visited += rows
    starts = np.cumsum(blocks) - blocks
    order_of_blocks = [int(np.searchsorted(starts, row, "right")) - 1 for row in visited]
    runs = [block for at, block in enumerate(order_of_blocks) if at == 0 or block != order_of_blocks[at - 1]]
    assert sorted(runs) == list(range(len(blocks)))
    assert sorted(visited) == list(range(sum(blocks)))


def test_a_shuffled_epoch_is_mixed_and_the_next_one_is_another(run):
    batches = run.batches("token/h", 17, seed=5)
    first, second = flat(batches), flat(batches)
    assert first != second != list(range(103))
    assert np.abs(np.diff(first)).mean() > 103 / 6  # a third is what rows drawn at random would have
    assert first == flat(run.batches("token/h", 17, seed=5))
    assert first != flat(run.batches("token/h", 17, seed=6))


def test_the_order_is_the_same_in_every_version():
    """Written down once: whoever resumes from a checkpoint, years and releases of numpy later, must find the same order."""
    order = RowOrder(np.arange(0, 50, 7), batch_rows=5, buffer_rows=14, seed=3)
    assert order.blocks(2, 1) == [(45, 49), (0, 6)]
    assert order.mixing(2, 1).tolist() == [0, 4, 7, 9, 6, 3, 8, 1, 5, 2]


def test_blocks_lie_in_one_chunk_each(run):
    """With a buffer of one batch, blocks can be told apart: rows come in stretches that lie in one chunk of the wide column."""
    chunk = run._parts[0].array(run["token/wide"]._schema.arrays["values"]).geometry.chunk_rows
    found = run.batches(["token/wide"], chunk, buffer_rows=1)._order.edges
    assert np.diff(found).max() <= chunk
    assert found.tolist() == sorted({*range(0, 49, chunk), *range(49, 103, chunk), 103})


def test_only_examples_that_have_every_column_are_visited(run):
    found = list(run.batches(["token/late", "token/h"], 10))
    assert all(same_bits(one["token/late"], one["token/h"]) for one in found)
    assert sorted(flat(one["token/h"] for one in found)) == [*range(13), *range(13, 42), *range(49, 80)]


def test_examples_may_be_a_mask(run):
    mask = np.zeros(len(run), bool)
    mask[[0, 3]] = True
    assert sorted(flat(run.batches("token/h", 9, examples=mask))) == [*range(13), *range(42, 49)]
    assert sorted(flat(run.batches("token/h", 9, examples=run.where(id="0.3")))) == [*range(42, 49)]


def test_columns_of_the_example_table_and_reduced_ones(run):
    found = np.concatenate([one["example/y"] for one in run.batches(["example/y"], 4)])
    assert sorted(found.tolist()) == [0, 0, 1, 1, 2, 3]
    means = np.concatenate(list(run.batches("token/h|last", 4, shuffle=False)))
    assert same_bits(means, run["token/h|last"].rows())


@pytest.fixture(scope="module", params=[{"compress": "lz4"}, {"quantize": "int8"}, {"quantize": "int8", "compress": "zstd"}])
def smaller(tmp_path_factory, request) -> Run:
    """`token/h` compressed or in few bits, in two parts, beside the number of each row."""
    path, rng, rows = tmp_path_factory.mktemp("smaller") / "run.zarr", np.random.default_rng(0), iter(range(1000))
    for ids in (range(4), range(4, 7)):
        with small_chunks(), writer_at(path, "resume") as writer:
            writer.describe("token/h", **request.param)
            values = [rng.normal(size=(id_ * 5 + 3, 7)).astype(ml_dtypes.bfloat16) for id_ in ids]
            counted = [[next(rows) for _ in value] for value in values]
            writer.append(ids=list(ids), columns={"token/h": values, "token/row": counted})
    return open_run(path)


def test_compressed_and_quantised_columns_are_read_alike(smaller):
    found = list(smaller.batches(["token/h", "token/row"], 11, buffer_rows=33))
    numbers = np.concatenate([one["token/row"] for one in found])
    assert sorted(numbers.tolist()) == list(range(126))
    assert same_bits(np.concatenate([one["token/h"] for one in found]), smaller["token/h"].rows()[numbers])
    again = pickle.loads(pickle.dumps(open_run(smaller.path).batches("token/h", 50, shuffle=False)))
    assert same_bits(np.concatenate(list(again)), smaller["token/h"].rows())
    assert same_bits(smaller["token/h"].to_dask().compute(scheduler="sync"), smaller["token/h"].rows())


def test_the_last_batch_may_be_dropped(run):
    whole, cut = run.batches("token/h", 25, seed=1), run.batches("token/h", 25, seed=1, drop_last=True)
    assert (len(whole), len(cut)) == (5, 4)
    assert numbers(whole)[:4] == numbers(cut)


def test_one_name_gives_arrays_and_a_list_gives_dicts(run):
    array, named = run.batches("token/h", 11)[2], run.batches(["token/h"], 11)[2]
    assert array.shape == (11, 2)
    assert list(named) == ["token/h"]
    assert same_bits(named["token/h"], array)


def test_batches_are_never_overwritten(run):
    """Buffers are used again; what was handed out stays, and may be written to."""
    for shuffle in (True, False):
        batches = run.batches("token/h", 8, buffer_rows=16, shuffle=shuffle)
        kept = list(batches)
        copies = [batch.copy() for batch in kept]
        list(batches)
        assert all(map(same_bits, kept, copies))
        kept[0][:] = -1
        assert -1 not in flat(batches)


def test_a_buffer_that_nobody_asked_for_stays_small(run, monkeypatch):
    assert run.batches("token/wide", 5).state_dict()["buffer_rows"] == 80
    monkeypatch.setattr(batching, "MIXED_BYTES", 1000)  # rows have 44 bytes
    assert run.batches("token/wide", 5).state_dict()["buffer_rows"] == 22
    assert run.batches(["token/wide", "token/h"], 50).state_dict()["buffer_rows"] == 50


# Going on.


@pytest.mark.parametrize("shuffle", [True, False])
def test_resuming_at_any_position_yields_what_was_left(run, shuffle):
    options: dict[str, Any] = {"batch_rows": 11, "buffer_rows": 33, "seed": 3, "shuffle": shuffle}
    whole = run.batches("token/h", **options)
    expected = [numbers(whole), numbers(whole)]
    for epoch in range(2):
        for position in range(len(whole) + 1):
            first = run.batches("token/h", **options)
            first.epoch = epoch
            for _ in range(position):
                next(iter(first))
            again = open_run(run.path).batches("token/h", **options)
            again.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert numbers(again) == expected[epoch][position:]
            assert (again.epoch, again.position) == (epoch + 1, 0)


def test_a_loop_may_be_left_and_entered_again(run):
    batches = run.batches("token/h", 11)
    expected = numbers(run.batches("token/h", 11))
    found = []
    for batch in batches:
        found += numbers([batch])
        if len(found) == 4:
            break
    assert batches.state_dict()["position"] == 4
    assert found + numbers(batches) == expected


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_rows": 12}, "batch_rows was 11 and is 12"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"shuffle": False}, "shuffle was True and is False"),
        ({"buffer_rows": 12}, "buffer_rows was 176 and is 12"),
        ({"drop_last": True}, "drop_last was False and is True"),
        ({"examples": [0, 2]}, "rows was 103 and is 42"),
        ({"examples": [0, 1, 2, 3, 4, 5]}, None),
        ({"sites": "token/wide"}, "columns was"),
        ({"sites": ["token/h", "token/wide"]}, "columns was"),
    ],
)
def test_a_state_of_other_batches_is_refused_with_what_differs(run, changed, said):
    state = run.batches("token/h", 11).state_dict()
    other = run.batches(**{"sites": "token/h", "batch_rows": 11, **changed})
    if said is None:
        other.load_state_dict(state)
        return
    with pytest.raises(SchemaError, match=said):
        other.load_state_dict(state)


def test_a_state_of_other_examples_of_the_same_lengths_is_refused(tmp_path):
    run = written(tmp_path / "run.zarr", [[3, 3, 3]])
    state = run.batches("token/h", 2, examples=[0, 1]).state_dict()
    with pytest.raises(SchemaError, match="of other batches than these: places was"):
        run.batches("token/h", 2, examples=[0, 2]).load_state_dict(state)


def test_a_state_of_another_run_or_of_one_that_grew_is_refused(tmp_path):
    run = written(tmp_path / "run.zarr", [[5, 6]])
    state = run.batches("token/h", 4).state_dict()
    with pytest.raises(SchemaError, match="run was"):
        written(tmp_path / "other.zarr", [[5, 6]]).batches("token/h", 4).load_state_dict(state)
    with writer_at(tmp_path / "run.zarr", "resume") as writer:
        writer.append(ids=["more"], columns={"token/h": [np.zeros((3, 2), np.float32)]})
    with pytest.raises(SchemaError, match="rows was 11 and is 14"):
        open_run(tmp_path / "run.zarr").batches("token/h", 4).load_state_dict(state)


# Elsewhere: pickles and workers.


def test_batches_go_on_after_pickling(run):
    batches = run.batches(["token/h", "token/wide"], 11, seed=2, buffer_rows=22)
    expected = numbers(one["token/h"] for one in run.batches(["token/h", "token/wide"], 11, seed=2, buffer_rows=22))
    for _ in range(3):
        next(iter(batches))
    again: Batches = pickle.loads(pickle.dumps(batches))
    assert numbers(one["token/h"] for one in again) == expected[3:]


def test_a_pickled_run_is_the_same_snapshot(tmp_path):
    """Also while its writer goes on; rows that are read for the first time afterwards included."""
    with writer_at(tmp_path / "run.zarr") as writer, small_chunks():
        writer.append(ids=["a", "b"], columns={"token/h": [np.ones((9, 3)), np.zeros((5, 3))]})
        writer.commit()
        pickled = pickle.dumps(open_run(tmp_path / "run.zarr"))
        writer.append(ids=["c"], columns={"token/h": [np.full((50, 3), 7.0)]})
        writer.commit()
        run: Run = pickle.loads(pickled)
        assert (run.ids, run["token/h"].shape) == (["a", "b"], (14, 3))
        assert run["token/h"].rows()[:, 0].tolist() == [1.0] * 9 + [0.0] * 5


def test_a_pickled_run_keeps_how_it_verifies_and_leaves_files_behind(run):
    column = open_run(run.path, verify="off")["token/h"]
    column.rows()
    again = pickle.loads(pickle.dumps(column))
    assert again._parts[0].cache._verify is False
    assert not again._parts[0].cache._open
    assert same_bits(again.rows(), column.rows())


def test_a_pickled_run_that_was_overwritten_or_moved_says_so(tmp_path):
    pickled = pickle.dumps(written(tmp_path / "run.zarr", [[5]]))
    (tmp_path / "run.zarr").rename(tmp_path / "moved.zarr")
    with pytest.raises(NotARunError, match="no longer where it was"):
        pickle.loads(pickled)
    written(tmp_path / "run.zarr", [[5]])
    with pytest.raises(NotARunError, match="overwritten"):
        pickle.loads(pickled)


MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine has cores


@MANY_WORKERS
@pytest.mark.parametrize(("workers", "start"), [(0, None), (1, "fork"), (2, "fork"), (3, "fork"), (2, "spawn")])
def test_any_number_of_workers_yields_the_same_batches(run, workers, start):
    expected = run.batches("token/h", 7, seed=4, buffer_rows=30)
    batches = run.batches("token/h", 7, seed=4, buffer_rows=30)
    loader = batches.to_torch(num_workers=workers, multiprocessing_context=start)
    for epoch in range(1 if start == "spawn" else 2):  # a spawned worker takes seconds to import torch
        assert batches.epoch == epoch
        found = list(loader)
        assert len(found) == len(loader) == 15
        assert all(isinstance(one, torch.Tensor) for one in found)
        assert numbers(found) == numbers(expected)


@MANY_WORKERS
@pytest.mark.parametrize(("before", "after"), [(3, 2), (0, 3), (2, 0)])
def test_resuming_with_another_number_of_workers(run, before, after):
    """Batches that workers had made ahead, but that were not handed out, come again."""
    expected = numbers(run.batches("token/h", 7, seed=4))
    batches = run.batches("token/h", 7, seed=4)
    found = []
    for batch in batches.to_torch(num_workers=before, multiprocessing_context="fork" if before else None):
        found += numbers([batch])
        if len(found) == 5:
            break
    again = run.batches("token/h", 7, seed=4)
    again.load_state_dict(batches.state_dict())
    assert again.position == 5
    assert found + numbers(again.to_torch(num_workers=after, multiprocessing_context="fork" if after else None)) == expected


def test_workers_that_outlive_an_epoch_are_refused(run):
    loader = run.batches("token/h", 7).to_torch(num_workers=1, multiprocessing_context="fork", persistent_workers=True)
    list(loader)
    with pytest.raises(ValueError, match="persistent_workers=True would repeat the epoch"):
        list(loader)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "bool"])
def test_tensors_have_the_bits_and_the_dtype_that_were_recorded(tmp_path, dtype):
    values = random_values(np.random.default_rng(0), dtype, (37, 3))
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=[0], columns={"token/h": [values]})
    tensors = list(open_run(tmp_path / "run.zarr").batches(["token/h"], 10, shuffle=False).to_torch())
    found = torch.cat([one["token/h"] for one in tensors])
    assert found.dtype == getattr(torch, dtype)
    width = found.element_size()
    assert same_bits(found.view({1: torch.uint8, 2: torch.int16}[width]).numpy().view(f"u{width}"), values)
    if dtype == "bfloat16":
        assert values.dtype == ml_dtypes.bfloat16


# Far away.


def test_batches_of_a_run_on_object_storage_are_those_of_its_copy(s3, tmp_path):
    """Also after pickling. Blocks are fetched several at a time."""
    rows = np.random.default_rng(0).normal(size=(211, 7)).astype(np.float32)
    given = {"token/h": [rows[:97], rows[97:]]}
    url = f"s3://{BUCKET}/{tmp_path.name}/run.zarr"
    for place, options in ((tmp_path / "run.zarr", {}), (url, {"storage_options": object_storage(s3)})):
        with small_chunks(), RunWriter(place, **options) as writer:
            writer.append(ids=["a", "b"], columns=given)
    far = open_run(url, storage_options=object_storage(s3))
    near = open_run(tmp_path / "run.zarr")
    expected = list(near.batches("token/h", 20, buffer_rows=60))
    batches = pickle.loads(pickle.dumps(far.batches("token/h", 20, buffer_rows=60)))
    assert all(map(same_bits, batches, expected))
    assert same_bits(far["token/h"].to_dask().compute(scheduler="threads"), rows)


# What is refused.


@pytest.mark.parametrize(
    ("sites", "options", "error", "said"),
    [
        ("nothing", {}, UnknownColumnError, "no site was recorded"),
        ("token/nothing", {}, UnknownColumnError, "no column 'token/nothing'"),
        (["token/h", "example/y"], {}, SchemaError, "one table"),
        ([], {}, SchemaError, "nothing"),
        ("token/text", {}, SchemaError, "text"),
        ("token/h", {"examples": [1]}, MissingExampleError, "no example"),
        ("token/h", {"examples": [99]}, IndexError, "99"),
        ("token/h", {"batch_rows": 104, "drop_last": True}, SchemaError, "103 rows make no whole batch of 104"),
        ("token/h", {"batch_rows": 0}, ValueError, "batch_rows=0"),
        ("token/h", {"buffer_rows": 0}, ValueError, "buffer_rows=0"),
        ("token/h", {"seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_what_cannot_be_batched_is_refused(run, sites, options, error, said):
    with pytest.raises(error, match=said):
        run.batches(sites, **options)


def test_a_batch_that_there_is_not_is_an_index_error(run):
    batches = run.batches("token/h", 50)
    with pytest.raises(IndexError, match="batch 3 of an epoch of 3"):
        batches[3]
    with pytest.raises(IndexError, match="batch -1"):
        batches[-1]
