"""RunWriter: all of an append or nothing, what is committed stands, and every refusal says what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import files_below, random_values, same_bits, small_chunks, writer_at

from tensortape.stores import RunWriter, StoreError, commits, open_run, zarr_documents
from tensortape.stores.errors import (
    BrokenWriterError,
    KeyRepeatedError,
    LostPartError,
    MissingExampleError,
    RunExistsError,
    SchemaError,
)

Columns = dict[str, Any]


def columns(*lengths: int, seed: int = 0) -> Columns:
    """Two token columns, a number and a text for examples of these lengths."""
    rng = np.random.default_rng([seed, *lengths])
    return {
        "token/h": [random_values(rng, "bfloat16", (length, 3)) for length in lengths],
        "token/tag": [rng.integers(0, 9, length) for length in lengths],
        "example/label": list(range(len(lengths))),
        "example/title": [f"title {length}" for length in lengths],
    }


def assert_holds(path: Path, expected: dict[Any, Columns]) -> None:
    """The run holds these examples in this order, bit for bit; each was appended alone."""
    run = open_run(path)
    assert run.ids == list(expected)
    for number, given in enumerate(expected.values()):
        for name, values in given.items():
            assert same_bits(run[name][number], values[0]) if name != "example/title" else run[name][number] == values[0]
    assert run.verify().ok


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture
def writer(path) -> Iterator[RunWriter]:
    """A writer with one example committed ("a") and one pending ("b")."""
    with writer_at(path) as writer:
        writer.append(ids=["a"], columns=columns(5))
        writer.commit()
        writer.append(ids=["b"], columns=columns(2))
        yield writer


# Bad input.

TWO = columns(2, 3)

BAD_IDS = {
    "none": (None, SchemaError, "ids must be a sequence"),
    "one text": ("xy", SchemaError, "ids must be a sequence"),
    "one number in an array": (np.array(5), SchemaError, "ids must be a sequence"),
    "a missing one": (["x", None], SchemaError, "must all be strings or all be integers"),
    "mixed": (["x", 1], SchemaError, "must all be strings or all be integers; got int and str"),
    "integers in a run of text": ([1, 2], SchemaError, "this run's ids are text, but got 1"),
    "repeated in one call": (["x", "x"], KeyRepeatedError, "'x' is given twice"),
    "repeated from a commit": (["x", "a"], KeyRepeatedError, "'a'.*already in the run"),
    "repeated from pending ones": (["x", "b"], KeyRepeatedError, "'b'.*already in the run"),
    "repeated, as a numpy text": ([np.str_("x"), np.str_("b")], KeyRepeatedError, "b.*already in the run"),
    "too many": (["x", "y", "z"], SchemaError, "needs one array per example, 3 in all, but got 2"),
    "too few": (["x"], SchemaError, "needs one array per example, 1 in all, but got 2"),
    "no utf-8": (["x", "\ud800"], SchemaError, "(?i)utf-8|surrogate"),
}

BAD_COLUMNS = {
    "too many labels": ({"example/label": [1, 2, 3]}, "'example/label' needs 2 values, one per row of its table, but got 3"),
    "too few labels": ({"example/label": [1]}, "'example/label' needs 2 values, one per row of its table, but got 1"),
    "one label": ({"example/label": 1}, "'example/label' needs 2 values.*but got a single value"),
    "too few arrays": ({"token/tag": [np.ones(2, np.int64)]}, "'token/tag' needs one array per example, 2 in all, but got 1"),
    "packed without lengths": ({"token/tag": np.ones(5, np.int64)}, "need lengths="),
    "token counts disagree": ({"token/tag": [np.ones(2, np.int64), np.ones(4, np.int64)]}, "disagree on example 1.*3 rows.*4"),
    "another dtype": ({"token/h": [np.ones((2, 3), "f4"), np.ones((3, 3), "f4")]}, "'token/h' holds bfloat16.*but got float32"),
    "floats for labels": ({"example/label": [1.0, 2.0]}, "'example/label' holds int64 .*but got float64"),
    "text for labels": ({"example/label": ["x", "y"]}, "'example/label' holds int64 .*but got text"),
    "numbers for text": ({"example/title": [1, 2]}, "'example/title' holds text .*but got int64"),
    "another feature shape": ({"token/h": [value[:, :2] for value in TWO["token/h"]]}, r"shape \(3,\), but got .*shape\s+\(2,\)"),
    "no feature axis": ({"token/h": [value[:, 0] for value in TWO["token/h"]]}, r"but got bfloat16 rows of shape\s+\(\)"),
    "a new column": ({"token/new": TWO["token/tag"]}, r"missing: \[\], new: \['token/new'\]"),
    "an id column": ({"example/id": ["x", "y"]}, "'example/id' is written by the run itself; give ids="),
    "a phase column": ({"example/phase": ["x", "y"]}, "'example/phase' is written by the run itself"),
    "a step column": ({"example/step": [1, 2]}, "'example/step' is written by the run itself"),
    "a start column": ({"example/start.token": [0, 2]}, "'example/start.token' is written by the run itself"),
    "a length column": ({"example/length.pair": [2, 3]}, "'example/length.pair' is written by the run itself"),
    "an unknown table": ({"tokens/h": TWO["token/h"]}, "'tokens/h' names no table; write 'example/<name>'"),
    "no table": ({"h": TWO["token/h"]}, "'h' names no table"),
    "objects": ({"example/label": np.array([{}, []], object)}, "'example/label': values of kind ndarray have no numeric dtype"),
    "none": ({"example/label": None}, "'example/label'"),
    "a missing text": ({"example/title": ["x", None]}, "'example/title'"),
    "text that is no utf-8": ({"example/title": ["x", "\ud800"]}, "'example/title'"),
    "rows of several texts": ({"example/title": np.array([["x", "y"], ["z", "w"]])}, "'example/title'"),
    "rows of unequal length": ({"example/label": [[1], [1, 2]]}, "'example/label'"),
    "several dtypes": ({"token/tag": [np.ones(2, np.int64), np.ones(3, np.int8)]}, "'token/tag' is given with several dtypes"),
    "complex numbers": ({"example/label": np.ones(2, np.complex64)}, "complex64"),
    "integers beyond 64 bits": ({"example/label": [1, 2**64]}, "'example/label'"),
    "a name that is no utf-8": ({"token/\ud800": TWO["token/tag"]}, "(?i)utf-8|surrogate"),
}


def assert_refused(writer: RunWriter, error: type[StoreError], message: str, **arguments: Any) -> None:
    """The append raises, changes nothing on disk, and the writer goes on as if it had not been."""
    before = files_below(writer.path)
    with pytest.raises(error, match=message):
        writer.append(**arguments)
    assert files_below(writer.path) == before
    writer.append(ids=["c"], columns=columns(4))
    writer.close()
    assert_holds(writer.path, {"a": columns(5), "b": columns(2), "c": columns(4)})


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids_are_refused_and_nothing_is_appended(writer, case):
    ids, error, message = BAD_IDS[case]
    assert_refused(writer, error, message, ids=ids, columns=TWO)


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_columns_are_refused_and_nothing_is_appended(writer, case):
    changed, message = BAD_COLUMNS[case]
    assert_refused(writer, SchemaError, message, ids=["x", "y"], columns={**TWO, **changed})


@pytest.mark.parametrize("name", sorted(TWO))
def test_a_column_that_is_missing_is_named(writer, name):
    given = {other: values for other, values in TWO.items() if other != name}
    assert_refused(writer, SchemaError, rf"missing: \['{name}'\], new: \[\]", ids=["x", "y"], columns=given)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2], "needs 2 values|lengths of table 'token' are 1, but there are 2"),
        ([5, 0, 0], "lengths of table 'token' are 3, but there are 2 examples"),
        ([2, 4], "needs 6 values, one per row of its table, but got 5"),
        ([-1, 6], "lengths"),
        ([2.5, 2.5], "lengths"),
        ([[2], [3]], "lengths"),
        ("ab", "lengths"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(writer, lengths, message):
    packed = {name: np.concatenate(TWO[name]) for name in ("token/h", "token/tag")}
    arguments = {"ids": ["x", "y"], "columns": {**TWO, **packed}, "lengths": {"token": lengths}}
    assert_refused(writer, SchemaError, message, **arguments)


@pytest.mark.parametrize("step", [1.5, "first", None, 2**63])
def test_a_step_that_is_no_64_bit_integer_is_refused(writer, step):
    """It would be cut to an integer on disk, and the key would be another one after resuming."""
    assert_refused(writer, SchemaError, "step", ids=["x", "y"], columns=TWO, step=step)


@pytest.mark.parametrize("phase", [None, 5, "\ud800"])
def test_a_phase_that_is_no_text_is_refused(writer, phase):
    assert_refused(writer, SchemaError, "phase", ids=["x", "y"], columns=TWO, phase=phase)


def test_ids_must_be_given(writer):
    with pytest.raises(TypeError, match="ids"):
        writer.append(columns=TWO)


def test_text_is_refused_where_ids_are_integers(path):
    with writer_at(path) as writer:
        writer.append(ids=[7], columns={"example/y": [1]})
        with pytest.raises(SchemaError, match="this run's ids are int64, but got '8'"):
            writer.append(ids=["8"], columns={"example/y": [1]})
        writer.append(ids=[8], columns={"example/y": [2]})
    assert open_run(path).ids == [7, 8]


@pytest.mark.parametrize("ids", [[2**63], np.array([2**64 - 1], np.uint64)])
def test_integers_that_int64_cannot_hold_are_refused(path, ids):
    with writer_at(path) as writer:
        with pytest.raises(SchemaError):
            writer.append(ids=ids, columns={"example/y": [1]})
        writer.append(ids=[2**63 - 1], columns={"example/y": [2]})
    assert open_run(path).ids == [2**63 - 1]


FIRST = {
    "a feature axis of no values": ({"token/h": [np.ones((2, 0))]}, {}, "every axis needs at least one value"),
    "wrong number of labels": ({"example/y": [1, 2]}, {}, "needs 1 values"),
    "no table": ({"h": [1]}, {}, "names no table"),
    "rows of several texts": ({"example/t": np.array([["x", "y"]])}, {}, "'example/t'"),
    "text that is no utf-8": ({"example/t": ["\ud800"]}, {}, "'example/t'"),
    "a name that is no utf-8": ({"example/\ud800": [1]}, {}, "(?i)utf-8|surrogate"),
    "too many axes": ({"example/y": [1]}, {"axes": ("a", "b")}, "axes"),
    "attributes that are no JSON": ({"example/y": [1]}, {"attributes": {"x": object()}}, "attributes|JSON"),
    "attributes that are not finite": ({"example/y": [1]}, {"attributes": {"x": float("nan")}}, "attributes|JSON"),
    "a site that is no JSON": ({"example/y": [1]}, {"site": {"x": {1, 2}}}, "site|JSON"),
}


def describe_and_append(writer: RunWriter, case: str) -> None:
    given, said, _ = FIRST[case]
    for name in given if said else ():
        writer.describe(name, **said)
    writer.append(ids=["a"], columns=given)


@pytest.mark.parametrize("case", FIRST)
def test_a_refused_first_append_creates_nothing(path, case):
    """No run that is in the way of the next attempt, which may be in another process."""
    writer = writer_at(path)
    with pytest.raises(SchemaError, match=FIRST[case][2]):
        describe_and_append(writer, case)
    assert files_below(path.parent) == {}
    writer.close()
    with writer_at(path) as second:
        second.append(ids=["a"], columns=columns(3))
    assert_holds(path, {"a": columns(3)})


@pytest.mark.parametrize("case", FIRST)
def test_a_refused_first_append_can_be_followed_by_a_good_one(path, case):
    with writer_at(path) as writer:
        with pytest.raises(SchemaError, match=FIRST[case][2]):
            describe_and_append(writer, case)
        writer.append(ids=["a"], columns=columns(3))
        writer.commit()
        assert_holds(path, {"a": columns(3)})


def test_a_refused_append_does_not_settle_the_kind_of_ids(path):
    """Nothing was appended: the next append may still choose."""
    with writer_at(path) as writer:
        with pytest.raises(SchemaError, match="needs 1 values"):
            writer.append(ids=["a"], columns={"example/y": [1, 2]})
        writer.append(ids=[1], columns={"example/y": [1]})
    assert open_run(path).ids == [1]


def test_a_refused_overwrite_leaves_the_old_run_where_it_is(path):
    with writer_at(path) as writer:
        writer.append(ids=["a"], columns=columns(3))
    with writer_at(path, "overwrite") as writer, pytest.raises(SchemaError, match="every axis"):
        writer.append(ids=["b"], columns={"token/h": [np.ones((2, 0))]})
    assert_holds(path, {"a": columns(3)})


# Across sessions.


@pytest.fixture
def closed(path) -> Path:
    with writer_at(path) as writer:
        writer.append(ids=["a"], columns=columns(5))
    return path


@pytest.mark.parametrize("id_", ["a", np.str_("a")])
def test_ids_of_an_earlier_session_are_refused(closed, id_):
    with writer_at(closed, "resume") as writer:
        with pytest.raises(KeyRepeatedError, match=r"a.*already in the run"):
            writer.append(ids=[id_], columns=columns(2))
        writer.append(ids=["b"], columns=columns(2))
    assert_holds(closed, {"a": columns(5), "b": columns(2)})


def test_ids_of_another_kind_are_refused_in_a_later_session(closed):
    with writer_at(closed, "resume") as writer, pytest.raises(SchemaError, match="this run's ids are text, but got 1"):
        writer.append(ids=[1], columns=columns(2))
    assert_holds(closed, {"a": columns(5)})


OTHERWISE = {
    "another dtype": {"token/h": [np.ones((2, 3), np.float32)]},
    "another feature shape": {"token/h": [np.ones((2, 4), columns(1)["token/h"][0].dtype)]},
    "text for numbers": {"example/label": ["x"]},
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_column_that_changes_between_sessions_is_refused(closed, case):
    """Both parts could not be one column: the run must stay readable."""
    with writer_at(closed, "resume") as writer:
        with pytest.raises(SchemaError, match="holds"):
            writer.append(ids=["b"], columns={**columns(2), **OTHERWISE[case]})
        writer.append(ids=["b"], columns=columns(2))
    assert_holds(closed, {"a": columns(5), "b": columns(2)})


def test_a_later_session_that_begins_with_empty_examples_stays_one_column_with_the_earlier_ones(closed):
    """An empty list has no dtype of its own."""
    with writer_at(closed, "resume") as writer:
        writer.append(ids=["b"], columns={**columns(0), "token/h": [[]], "token/tag": [[]]})
        writer.append(ids=["c"], columns=columns(2))
    run = open_run(closed)
    assert run["token/h"][1].shape == (0, 3)
    assert same_bits(run["token/h"][2], columns(2)["token/h"][0])


def test_a_new_session_may_have_other_columns(closed):
    """Within a session every append has the same; another session may record more, or less, of other examples."""
    with writer_at(closed, "resume") as writer:
        writer.append(ids=["b"], columns={"token/h": columns(2)["token/h"], "token/new": [np.ones(2)]})
    run = open_run(closed)
    assert run["token/h"].present.tolist() == [True, True]
    assert run["token/new"].present.tolist() == [False, True]
    assert run["example/label"].present.tolist() == [True, False]
    with pytest.raises(MissingExampleError, match="'example/label' has no value for example 'b'"):
        run["example/label"][1]


# What is fine.


def test_no_examples_are_nothing(path):
    with writer_at(path) as writer:
        writer.append(ids=[], columns={})
        writer.append(ids=np.array([]), columns={"token/h": []})
        writer.commit()
    assert not path.exists()


def test_no_examples_between_others_are_nothing(writer):
    before = files_below(writer.path)
    writer.append(ids=[], columns=columns())
    assert files_below(writer.path) == before


def test_one_id_may_come_again_with_another_phase_or_step(path):
    with writer_at(path) as writer:
        for phase, step in [("train", 0), ("train", 1), ("eval", 1)]:
            writer.append(ids=["a"], columns={"example/y": [step]}, phase=phase, step=step)
        with pytest.raises(KeyRepeatedError, match=r"'a' \(phase 'train', step 1\)"):
            writer.append(ids=["a"], columns={"example/y": [5]}, phase="train", step=1)
    run = open_run(path)
    assert run.keys == [("a", "train", 0), ("a", "train", 1), ("a", "eval", 1)]
    assert run["example/y"].rows().tolist() == [0, 1, 1]


def test_examples_without_any_column_have_keys(path):
    with writer_at(path) as writer:
        writer.append(ids=["a", "b"], columns={})
    assert open_run(path).ids == ["a", "b"]


def test_packed_columns_and_columns_per_example_are_the_same(path):
    given = columns(2, 0, 3)
    packed = {name: np.concatenate(given[name]) for name in ("token/h", "token/tag")}
    with writer_at(path) as writer:
        writer.append(ids=["a", "b", "c"], columns={**given, **packed}, lengths={"token": [2, 0, 3]})
    run = open_run(path)
    assert all(same_bits(run["token/h"][number], given["token/h"][number]) for number in range(3))
    assert run.tables["token"].lengths.tolist() == [2, 0, 3]


@pytest.mark.parametrize("packed", [False, True])
def test_arrays_may_be_changed_after_they_were_appended(path, packed):
    """What was given counts, in rows that are written at once and in rows that wait."""
    rows = np.arange(3000, dtype=np.float32).reshape(-1, 3)
    lengths = {"token": [len(rows)]} if packed else None
    with small_chunks(), writer_at(path) as writer:
        for number in range(3):
            given = rows + 10_000 * number
            label = np.array([number])
            writer.append(ids=[number], columns={"token/h": given if packed else [given], "example/y": label}, lengths=lengths)
            given[:] = -1
            label[:] = -1
    run = open_run(path)
    assert len(run.parts[0].arrays["token/h"].shards) > 3
    assert all(np.array_equal(run["token/h"][number], rows + 10_000 * number) for number in range(3))
    assert run["example/y"].rows().tolist() == [0, 1, 2]


def test_counts_of_nonfinite_values_are_summed_into_the_record(path):
    """numpy's counts are as good as plain ones."""
    with writer_at(path) as writer:
        for id_ in ("a", "b"):
            writer.append(ids=[id_], columns=columns(2), nonfinite={"token/h": np.isnan([np.nan, 1.0]).sum()})
    assert open_run(path).parts[0].nonfinite == {"token/h": 2}


def test_assets_are_kept_once(path):
    with writer_at(path) as writer:
        writer.add_asset("tokenizer.json", b"first")
        writer.append(ids=["a"], columns=columns(2))
    with writer_at(path, "resume") as writer:
        writer.add_asset("tokenizer.json", b"second")
        writer.add_asset("Special Tokens.json", b"")
        writer.append(ids=["b"], columns=columns(2))
    run = open_run(path)
    assert sorted(run.assets) == ["Special Tokens.json", "tokenizer.json"]
    assert run.asset("tokenizer.json") == b"first"


def test_an_asset_with_a_long_name_is_listed_by_a_name_that_finds_it(path):
    with writer_at(path) as writer:
        writer.add_asset("x" * 300, b"1")
        writer.append(ids=["a"], columns=columns(2))
    run = open_run(path)
    assert [run.asset(name) for name in run.assets] == [b"1"]


# Commits.


def records(path: Path) -> list[Path]:
    return sorted(path.glob("parts/*/commits/*.json"))


def test_nothing_is_written_before_the_first_append(path):
    with writer_at(path) as writer:
        writer.describe("token/h", axes=("neuron",))
        writer.commit()
        assert files_below(path.parent) == {}
    assert files_below(path.parent) == {}


def test_only_a_commit_makes_examples_visible(writer):
    assert open_run(writer.path).ids == ["a"]
    assert (len(writer.committed_ids), "a" in writer.committed_ids, "b" in writer.committed_ids) == (1, True, False)
    writer.commit()
    assert open_run(writer.path).ids == ["a", "b"]
    assert (len(writer.committed_ids), "b" in writer.committed_ids) == (2, True)


def test_a_commit_with_nothing_pending_writes_nothing(writer):
    writer.commit()
    before = files_below(writer.path)
    writer.commit()
    writer.commit()
    assert files_below(writer.path) == before


def test_every_commit_is_one_record(path):
    with writer_at(path) as writer:
        for number in range(4):
            writer.append(ids=[number], columns=columns(3))
            writer.commit()
            assert len(records(path)) == number + 1
    assert len(records(path)) == 5, "and closing one more"


def test_closing_commits_what_is_pending(writer):
    writer.close()
    assert_holds(writer.path, {"a": columns(5), "b": columns(2)})
    assert all(part.closed for part in open_run(writer.path).parts)


def test_closing_twice_does_nothing(writer):
    writer.close()
    before = files_below(writer.path)
    writer.close()
    assert files_below(writer.path) == before


@pytest.mark.parametrize("use", ["append", "commit", "add_asset"])
def test_a_closed_writer_refuses_to_be_used(writer, use):
    writer.close()
    before = files_below(writer.path)
    arguments = {"append": {"ids": ["x"], "columns": columns(1)}, "commit": {}, "add_asset": {"name": "x", "content": b""}}[use]
    with pytest.raises(BrokenWriterError, match="this writer is closed"):
        getattr(writer, use)(**arguments)
    assert files_below(writer.path) == before


def test_leaving_the_context_by_an_error_keeps_whole_appends(path):
    with suppress(ZeroDivisionError), writer_at(path) as writer:
        writer.append(ids=["a"], columns=columns(5))
        _ = 1 / 0
    assert_holds(path, {"a": columns(5)})


def test_commits_come_by_themselves_as_data_comes(path):
    """With a budget of 1 MiB full shards leave the buffers often. How often it commits depends on the time that takes."""
    rng = np.random.default_rng(0)
    given = [[random_values(rng, "float16", (1000, 7))] for _ in range(60)]
    writer = writer_at(path, memory_budget=1 << 20)
    for number, values in enumerate(given):
        writer.append(ids=[number], columns={"token/h": values})
    assert 1 <= len(records(path)) < len(given)
    seen = open_run(path)
    assert seen.ids == list(range(len(writer.committed_ids)))
    assert len(seen) > 1
    assert all(same_bits(seen["token/h"][number], given[number][0]) for number in range(len(seen)))
    writer.close()
    run = open_run(path)
    assert len(run.parts[0].arrays["token/h"].shards) > 2
    assert all(same_bits(run["token/h"][number], value) for number, [value] in enumerate(given))


def test_representation_says_state_and_counts(writer):
    assert repr(writer) == f"<RunWriter {writer.path} open: 1 examples committed, 1 pending>"
    writer.close()
    assert repr(writer) == f"<RunWriter {writer.path} closed: 2 examples committed, 0 pending>"


@pytest.mark.parametrize("durability", ["fsync", "rename"])
def test_both_durabilities_write_the_same_run(path, durability):
    with RunWriter(path, durability=durability) as writer:
        writer.append(ids=["a"], columns=columns(5))
    assert_holds(path, {"a": columns(5)})
    assert not list(path.rglob("*.partial"))


@pytest.mark.parametrize("durability", ["none", "", None, True])
def test_other_durabilities_are_refused_with_those_there_are(path, durability):
    with pytest.raises(ValueError, match="durability is 'fsync' or 'rename'"):
        RunWriter(path, durability=durability)
    assert not path.exists()


# Failures, other processes, other folders.


def test_a_writer_whose_part_somebody_else_continued_fails_and_changes_nothing_of_theirs(writer):
    """Its next record is there already, with content that is not its own."""
    theirs = commits.path_of("p000000", 2)
    (writer.path / theirs).write_bytes(b"theirs")
    with pytest.raises(LostPartError, match="sealed or continued by somebody else"):
        writer.commit()
    assert (writer.path / theirs).read_bytes() == b"theirs"
    with pytest.raises(BrokenWriterError, match=r"failed before.*mode='resume'"):
        writer.append(ids=["x"], columns=columns(1))
    before = files_below(writer.path)
    writer.close()
    assert files_below(writer.path) == before


def test_after_a_failure_a_new_session_goes_on_from_the_last_commit(writer):
    """A folder that takes the name of a shard stands for a disk that fails."""
    rows = np.ones((9, 3), columns(1)["token/h"][0].dtype)
    shard = next((writer.path / "parts/p000000/token/h").glob("c.0*"))
    shard.rename(shard.with_name("kept"))
    shard.mkdir()
    with pytest.raises(OSError, match=r"c\.0"):
        writer.commit()
    assert repr(writer).startswith(f"<RunWriter {writer.path} broken")
    with pytest.raises(BrokenWriterError, match="reopen the run with mode='resume'"):
        writer.commit()
    shard.rmdir()
    shard.with_name("kept").rename(shard)
    with writer_at(writer.path, "resume") as second:
        assert "b" not in second.committed_ids
        second.append(ids=["b"], columns={**columns(9), "token/h": [rows]})
    run = open_run(writer.path)
    assert run.ids == ["a", "b"]
    assert same_bits(run["token/h"][1], rows)


def test_two_writers_at_once_take_parts_of_their_own(closed):
    first, second = writer_at(closed, "resume"), writer_at(closed, "resume")
    for number in range(3):
        first.append(ids=[f"f{number}"], columns=columns(number, seed=1))
        second.append(ids=[f"s{number}"], columns=columns(number, seed=2))
        (first if number % 2 else second).commit()
    second.close()
    first.close()
    expected = {"a": columns(5)}
    expected |= {f"f{number}": columns(number, seed=1) for number in range(3)}
    expected |= {f"s{number}": columns(number, seed=2) for number in range(3)}
    assert_holds(closed, expected)


def test_a_writer_that_was_overwritten_never_touches_the_new_run(closed):
    """Its path now names somebody else's run: it may fail or write where its own run went, but not there."""
    zombie = writer_at(closed, "resume")
    zombie.append(ids=["z"], columns=columns(7))
    zombie.commit()
    new = {f"n{number}": columns(5, seed=3 + number) for number in range(2)}
    with writer_at(closed, "overwrite") as writer:
        for id_, given in new.items():
            writer.append(ids=[id_], columns=given)
            writer.commit()
    with writer_at(closed, "resume") as writer:
        writer.append(ids=["m"], columns=columns(4))
    with suppress(LostPartError):
        zombie.append(ids=["y"], columns=columns(6))
        zombie.commit()
    assert_holds(closed, {**new, "m": columns(4)})


def test_a_resumed_writer_that_was_overwritten_before_its_first_append_never_touches_the_new_run(closed):
    """It knows the run that it was opened on, also before it has written anything."""
    zombie = writer_at(closed, "resume")
    with writer_at(closed, "overwrite") as writer:
        writer.append(ids=["n"], columns=columns(5))
    before = files_below(closed)
    with suppress(StoreError):
        zombie.append(ids=["z"], columns=columns(7))
        zombie.commit()
    assert files_below(closed) == before
    assert_holds(closed, {"n": columns(5)})


def test_a_writer_whose_run_was_deleted_never_touches_the_run_that_was_made_in_its_place(writer):
    """A notebook cell that deletes its run and writes it again; the first writer is still there and closes at exit.

    The new folder may well have the inode of the old one.
    """
    shutil.rmtree(writer.path)
    with writer_at(writer.path) as second:
        second.append(ids=["n"], columns=columns(5))
    before = files_below(writer.path)
    with suppress(StoreError):
        writer.close()
    assert files_below(writer.path) == before
    assert_holds(writer.path, {"n": columns(5)})


@pytest.mark.parametrize("replaced", [True, False])
def test_a_writer_whose_run_is_gone_leaves_nothing_in_its_place(writer, replaced):
    """Somebody has deleted the folder, or put an empty one there: nothing is written, not even a folder."""
    shutil.rmtree(writer.path)
    if replaced:
        writer.path.mkdir()
    with pytest.raises(StoreError):
        writer.commit()
    assert not writer.path.exists() or list(writer.path.iterdir()) == []
    with writer_at(writer.path) as second:
        second.append(ids=["a"], columns=columns(3))
    assert_holds(writer.path, {"a": columns(3)})


def test_a_writer_with_a_relative_path_stays_in_its_folder(tmp_path, monkeypatch):
    """Whoever changes the working directory in between (Hydra does) must not tear the run apart."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    writer = writer_at(Path("run.zarr"))
    writer.append(ids=["a"], columns=columns(5))
    monkeypatch.chdir("elsewhere")
    writer.append(ids=["b"], columns=columns(2))
    writer.close()
    assert files_below(tmp_path / "elsewhere") == {}
    assert_holds(tmp_path / "run.zarr", {"a": columns(5), "b": columns(2)})


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


FORK = """
import os, sys, atexit, pathlib
import numpy as np
from tensortape.stores import RunWriter
from tensortape.stores.errors import BrokenWriterError

path = pathlib.Path(sys.argv[1])
files = lambda: {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}
writer = RunWriter(path, durability="rename")
writer.append(ids=[1], columns={"token/h": [np.ones(3)]})
writer.commit()
writer.append(ids=[2], columns={"token/h": [np.ones(2)]})
before = files()
child = os.fork()
if child == 0:
    writer.close()
    writer.__exit__(None, None, None)
    refused = 0
    appends = lambda: writer.append(ids=[3], columns={"token/h": [np.ones(2)]})
    for use in (writer.commit, appends, lambda: writer.add_asset("x", b"")):
        try:
            use()
        except BrokenWriterError as error:
            assert "belongs to the parent process" in str(error)
            refused += 1
    assert refused == 3
    sys.exit(7)  # an ordinary exit, with its atexit hooks
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert files() == before, "the child has written something"
writer.append(ids=[4], columns={"token/h": [np.ones(1)]})
writer.close()
"""


def test_a_forked_child_never_commits(path):
    """Neither by closing, nor at its exit; the parent goes on."""
    done = python(FORK, path)
    assert done.returncode == 0, done.stderr
    assert open_run(path).ids == [1, 2, 4]
    assert open_run(path).verify().ok


FORGET = """
import sys
import numpy as np
from tensortape.stores import RunWriter

writer = RunWriter(sys.argv[1], durability="rename")
writer.append(ids=[1, 2], columns={"token/h": [np.ones(3), np.ones(0)]})
"""


ENDS = {"": 0, "raise SystemExit(3)": 3, "1 / 0": 1, "del writer": 0}


@pytest.mark.parametrize(("then", "code"), ENDS.items())
def test_a_forgotten_writer_is_closed_at_exit(path, then, code):
    """However the script ends, and also where nobody holds the writer any more: a function that made it has returned."""
    assert python(FORGET + then, path).returncode == code
    run = open_run(path)
    assert run.ids == [1, 2]
    assert all(part.closed for part in run.parts)
    assert run.verify().ok


def test_a_killed_writer_leaves_what_it_committed(path):
    then = "writer.commit(); writer.append(ids=[3], columns={'token/h': [np.ones(9)]}); import os; os.kill(os.getpid(), 9)"
    assert python(FORGET + then, path).returncode == -9
    with writer_at(path, "resume") as writer:
        assert [id_ in writer.committed_ids for id_ in (1, 2, 3)] == [True, True, False]
        writer.append(ids=[3], columns={"token/h": [np.ones(4)]})
    assert [len(rows) for rows in open_run(path)["token/h"][:]] == [3, 0, 4]


def claims_interrupted(path: Path) -> None:
    """What a kill leaves between making a part's folder and its document: an unfinished file."""
    folder = path / "parts" / "p000007"
    folder.mkdir()
    (folder / ".zarr.json.d41d8cd98f00b204e9800998ecf8427e.partial").write_bytes(zarr_documents.group()[:20])


def test_a_claim_that_was_interrupted_does_not_hide_the_run(closed):
    """P1: also after a kill at that instant every acknowledged commit reads back, and the run can go on."""
    claims_interrupted(closed)
    assert_holds(closed, {"a": columns(5)})
    with writer_at(closed, "resume") as writer:
        writer.append(ids=["b"], columns=columns(2))
    assert_holds(closed, {"a": columns(5), "b": columns(2)})


def test_create_refuses_a_run_that_appeared_in_the_meantime(path):
    """Two processes that both found the path free: the second one loses, before it has changed anything."""
    first, second = writer_at(path), writer_at(path)
    first.append(ids=["a"], columns=columns(5))
    first.commit()
    before = files_below(path)
    with pytest.raises(RunExistsError, match="mode='resume'"):
        second.append(ids=["b"], columns=columns(2))
    second.close()
    assert files_below(path) == before
