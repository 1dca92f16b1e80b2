"""Columns added later: an extension part beside the recorded ones, joined by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, Feature, feature_shapes, files_below, same_bits, seeds, writer_at

from tensortape.stores import Run, open_run
from tensortape.stores.errors import MissingExampleError, SchemaError, StoreError

LENGTHS = {"a": 3, "b": 0, "c": 2, "d": 5}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture
def run(path) -> Run:
    """Four examples in two sessions."""
    for ids in ("ab", "cd"):
        with writer_at(path, "resume") as writer:
            for id_ in ids:
                writer.append(ids=[id_], columns={"token/h": [np.full((LENGTHS[id_], 2), ord(id_))], "example/y": [ord(id_)]})
    return open_run(path)


def per_example(ids: str = "abcd") -> list[np.ndarray]:
    return [np.arange(LENGTHS[id_]) + ord(id_) * 100 for id_ in ids]


def as_lists(rows: Any) -> list[list[int]]:
    return [np.asarray(part).tolist() for part in rows]


def assert_added(run: Run, name: str, expected: list[Any]) -> None:
    """The run itself, and who opens it anew, sees the column; nothing else has changed."""
    for seen in (run, open_run(run.path)):
        assert as_lists(seen[name][:]) == as_lists(expected)
        assert seen.ids == list("abcd")
        assert as_lists(seen["example/y"][:]) == [97, 98, 99, 100]
        assert [len(rows) for rows in seen["token/h"][:]] == list(LENGTHS.values())
        assert seen.verify().ok


def test_a_column_for_all_examples_may_be_given_per_example(run):
    column = run.add_column("token/tag", per_example())
    assert column.name == "token/tag"
    assert_added(run, "token/tag", per_example())


def test_a_column_for_all_examples_may_be_given_packed(run):
    run.add_column("token/tag", np.concatenate(per_example()))
    assert_added(run, "token/tag", per_example())


def test_vectors_per_token_may_be_given_packed(run):
    values = np.arange(70, dtype=np.float16).reshape(10, 7)
    run.add_column("token/p", values)
    assert_added(run, "token/p", np.split(values, [3, 3, 5]))


@pytest.mark.parametrize("values", [[0.5, 1.5, 2.5, 3.5], np.arange(4.0) + 0.5, np.arange(8.0).reshape(4, 2)])
def test_values_per_example(run, values):
    run.add_column("example/score", values)
    assert_added(run, "example/score", list(values))


@pytest.mark.parametrize("values", [["x", "", "zé", "x"], np.array(["x", "", "zé", "x"])])
def test_text_labels(run, values):
    run.add_column("example/topic", values)
    assert [run["example/topic"][number] for number in range(4)] == ["x", "", "zé", "x"]
    assert open_run(run.path)["example/topic"].rows().tolist() == ["x", "", "zé", "x"]


def test_text_per_token(run):
    words = [["x", "yy", ""], np.array([], object), ["z", "é"], list("abcde")]
    run.add_column("token/word", words)
    assert [list(part) for part in run["token/word"][:]] == [list(part) for part in words]


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(sorted(DTYPES)), feature_shapes, st.booleans(), seeds)
def test_added_values_keep_their_bits(tmp_path_factory, dtype, shape, packed, seed):
    path = tmp_path_factory.mktemp("extension") / "run.zarr"
    with writer_at(path) as writer:
        writer.append(ids=["a", "b", "c"], columns={"token/h": [np.ones(length) for length in (4, 0, 5)]})
    values = Feature("token/new", dtype, shape).values(np.random.default_rng(seed), [4, 0, 5])
    column = open_run(path).add_column("token/new", np.concatenate(values) if packed else values)
    assert all(same_bits(column[number], value) for number, value in enumerate(values))


# Subsets.


def test_a_subset_is_given_by_ids_in_any_order(run):
    run.add_column("token/tag", per_example("db"), ids=["d", "b"])
    column = open_run(run.path)["token/tag"]
    assert column.present.tolist() == [False, True, False, True]
    assert as_lists([column[1], column[3]]) == as_lists(per_example("bd"))
    assert column.rows().tolist() == np.concatenate(per_example("bd")).tolist()
    with pytest.raises(MissingExampleError, match="'token/tag' has no value for example 'a'"):
        column[0]


def test_a_subset_may_be_packed_in_the_order_of_its_ids(run):
    run.add_column("token/tag", np.concatenate(per_example("dca")), ids=["d", "c", "a"])
    column = run["token/tag"]
    assert as_lists([column[0], column[2], column[3]]) == as_lists(per_example("acd"))


def test_a_subset_of_values_per_example(run):
    run.add_column("example/topic", ["x", "y"], ids=["c", "a"])
    assert run["example/topic"].present.tolist() == [True, False, True, False]
    assert (run["example/topic"][0], run["example/topic"][2]) == ("y", "x")
    assert run.examples["topic"].tolist() == ["y", None, "x", None]


def test_integer_ids_pick_a_subset_too(path):
    with writer_at(path) as writer:
        writer.append(ids=[10, 20, 30], columns={"example/y": [1, 2, 3]})
    column = open_run(path).add_column("example/z", [9, 8], ids=np.array([30, 10]))
    assert (column[0], column[2]) == (8, 9)


def test_ids_that_stand_for_several_examples_are_refused(path):
    """One id at two steps of a training: which of them gets the value is not said."""
    with writer_at(path) as writer:
        for step in (1, 2):
            writer.append(ids=["a", "b"], columns={"example/y": [1, 2]}, phase="train", step=step)
    run = open_run(path)
    with pytest.raises(SchemaError, match="'a'"):
        run.add_column("example/z", [9], ids=["a"])


def test_all_examples_of_a_training_run_get_their_values_in_order(path):
    with writer_at(path) as writer:
        for step in (1, 2):
            writer.append(ids=["a", "b"], columns={"example/y": [1, 2]}, phase="train", step=step)
    column = open_run(path).add_column("example/z", [5, 6, 7, 8])
    assert [column[number] for number in range(4)] == [5, 6, 7, 8]
    assert open_run(path).keys == [("a", "train", 1), ("b", "train", 1), ("a", "train", 2), ("b", "train", 2)]


# Later and elsewhere.


def test_tables_can_be_shown_after_a_column_was_added(run):
    """Keys lie in every part, but they are one column each."""
    run.add_column("example/score", [1, 2, 3, 4])
    run.add_column("token/tag", per_example(), ids=list("abcd"))
    for seen in (run, open_run(run.path)):
        assert seen.examples["id"].tolist() == list("abcd")
        assert seen.examples["y"].tolist() == [97, 98, 99, 100]
        assert seen.examples["score"].tolist() == [1, 2, 3, 4]
        assert seen.tokens["tag"].tolist() == np.concatenate(per_example()).tolist()
        assert [seen.tables["example"]["id"][number] for number in range(4)] == list("abcd")
        assert seen.tables["example"]["length.token"].rows().tolist() == list(LENGTHS.values())


def test_several_columns_are_added_one_after_another(run):
    run.add_column("token/one", per_example())
    run.add_column("token/two", per_example("ca"), ids=["c", "a"])
    run.add_column("token/three", per_example())
    assert_added(run, "token/one", per_example())
    assert_added(run, "token/three", per_example())
    assert run["token/two"].present.tolist() == [True, False, True, False]
    assert len(run.parts) == 5


def test_a_column_of_all_examples_aligns_with_them(run):
    """Its record says that its examples are those of the base parts, in order: no join by key is needed."""
    run.add_column("token/tag", per_example())
    assert run.parts[-1].aligned == (("p000000", 0, 2), ("p000001", 0, 2))
    assert run.parts[-1].document.kind == "extension"
    assert run.parts[-1].closed


def test_the_run_can_be_continued_after_a_column_was_added(run):
    run.add_column("token/tag", per_example())
    with writer_at(run.path, "resume") as writer:
        assert "a" in writer.committed_ids
        writer.append(ids=["e"], columns={"token/h": [np.ones((4, 2), int)], "example/y": [101]})
    seen = open_run(run.path)
    assert seen.ids == list("abcde")
    assert seen["token/tag"].present.tolist() == [True] * 4 + [False]
    assert as_lists(seen["token/tag"][:4]) == as_lists(per_example())
    seen.add_column("token/late", [*per_example(), np.arange(4)])
    assert as_lists(seen["token/late"][:]) == as_lists([*per_example(), np.arange(4)])


def test_a_column_may_be_added_while_the_run_is_being_written(path):
    """It covers the examples that were committed when the run was opened; others come without it."""
    writer = writer_at(path)
    writer.append(ids=["a", "b"], columns={"token/h": [np.ones(3), np.ones(1)]})
    writer.commit()
    run = open_run(path)
    writer.append(ids=["c"], columns={"token/h": [np.ones(2)]})
    writer.commit()
    run.add_column("token/tag", [[1, 2, 3], [4]])
    writer.append(ids=["d"], columns={"token/h": [np.ones(5)]})
    writer.close()
    seen = open_run(path)
    assert seen.ids == list("abcd")
    assert seen["token/tag"].present.tolist() == [True, True, False, False]
    assert seen["token/tag"].rows().tolist() == [1, 2, 3, 4]
    assert [len(rows) for rows in seen["token/h"][:]] == [3, 1, 2, 5]


def test_two_runs_that_add_the_same_column_at_once_are_an_error_for_that_column_alone(run):
    """Each was opened before the other wrote."""
    other = open_run(run.path)
    run.add_column("example/z", [1, 2, 3, 4])
    other.add_column("example/w", [1, 2, 3, 4])
    late = open_run(run.path)
    stale = open_run(run.path)
    late.add_column("example/v", [1, 2, 3, 4])
    stale.add_column("example/v", [5, 6, 7, 8])
    seen = open_run(run.path)
    with pytest.raises(SchemaError, match="'example/v' has two values for example 'a'"):
        seen["example/v"].rows()
    assert seen["example/z"].rows().tolist() == [1, 2, 3, 4]
    assert seen["example/w"].rows().tolist() == [1, 2, 3, 4]


def test_a_run_that_was_overwritten_takes_no_column(run):
    """The run that was opened is elsewhere now; the one in its place is somebody else's."""
    with writer_at(run.path, "overwrite") as writer:
        writer.append(ids=["n"], columns={"example/y": [1]})
    before = files_below(run.path)
    with pytest.raises(StoreError):
        run.add_column("example/z", [1, 2, 3, 4])
    assert files_below(run.path) == before
    assert open_run(run.path).ids == ["n"]


def test_a_new_table_can_be_added(run):
    """Rows of a table that was not recorded: any lengths are right."""
    run.add_column("pair/w", [np.ones((number, 3)) for number in range(4)])
    assert run.tables["pair"].lengths.tolist() == [0, 1, 2, 3]


def test_one_row_per_example_may_be_packed(path):
    """As many rows as examples: an array of them is packed all the same."""
    with writer_at(path) as writer:
        writer.append(ids=["a", "b"], columns={"token/h": [np.ones(1), np.ones(1)]})
    column = open_run(path).add_column("token/p", np.arange(6.0).reshape(2, 3))
    assert as_lists(column[:]) == [[[0.0, 1.0, 2.0]], [[3.0, 4.0, 5.0]]]


# Refused.

REFUSED = {
    "a column that there is": ("token/h", per_example(), None, "'token/h' is already in the run; columns are never rewritten"),
    "a key": ("example/id", list("abcd"), None, "'example/id'"),
    "the run's own lengths": ("example/length.token", [1, 2, 3, 4], None, "'example/length.token'"),
    "the run's own starts, of a table that there is not": ("example/start.pair", [1, 2, 3, 4], None, "'example/start.pair'"),
    "no table": ("tag", per_example(), None, "names no table"),
    "an unknown table": ("tokens/tag", per_example(), None, "names no table"),
    "too few arrays": ("token/tag", per_example("abc"), None, "needs one array per example, 4 in all, but got 3"),
    "another token count": ("token/tag", per_example("abca"), None, "'token/tag' has 3 rows for example 'd', which has 5"),
    "too few packed rows": ("token/tag", np.arange(9), None, "'token/tag'"),
    "too few values": ("example/z", [1, 2, 3], None, "needs 4 values, one per row of its table, but got 3"),
    "values for another number of ids": ("example/z", [1, 2, 3], ["a", "b"], "needs 2 values"),
    "one id twice": ("example/z", [1, 2], ["a", "a"], "'a' is given twice"),
    "an id that there is not": ("example/z", [1, 2], ["a", "x"], "no example 'x'"),
    "ids of another kind": ("example/z", [1, 2], [1, 2], "no example 1"),
    "a text for ids": ("example/z", [1, 2], "ab", "ids must be a sequence"),
    "objects": ("example/z", [1, None, 2, 3], None, "'example/z'"),
    "a feature axis of no values": ("example/z", np.ones((4, 0)), None, "every axis needs at least one value"),
    "a single value": ("token/tag", np.float32(1), None, "'token/tag'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(run, case):
    name, values, ids, message = REFUSED[case]
    before = files_below(run.path)
    with pytest.raises(StoreError, match=message):
        run.add_column(name, values, ids=ids)
    assert files_below(run.path) == before
    run.add_column("token/tag2", per_example())
    assert_added(run, "token/tag2", per_example())


def test_a_run_without_examples_takes_no_column(path):
    """It would settle the kind of ids, and help nobody."""
    writer = writer_at(path)
    writer.append(ids=["a"], columns={"example/y": [1]})
    run = open_run(path)
    before = files_below(path)
    with pytest.raises(StoreError):
        run.add_column("example/z", [])
    assert files_below(path) == before
    writer.close()
    with writer_at(path, "resume") as second:
        second.append(ids=["b"], columns={"example/y": [2]})
    assert open_run(path).ids == ["a", "b"]
