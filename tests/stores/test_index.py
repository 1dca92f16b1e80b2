"""The join of parts: an example is its key, whichever sessions wrote its columns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import small_chunks, writer_at

from tensortape.stores import RunWriter, open_run
from tensortape.stores.errors import MissingExampleError, SchemaError


def value(id_: int, column: str, length: int) -> np.ndarray:
    """Rows that no other cell has."""
    return np.arange(length) + 1000 * id_ + {"token/h": 0, "token/g": 500}[column]


def append(writer: RunWriter, id_: int, *columns: str, length: int | None = None, step: int = -1) -> None:
    length = id_ % 5 if length is None else length
    writer.append(ids=[id_], columns={column: [value(id_, column, length)] for column in columns}, step=step)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.zarr"


def two_sessions(path: Path, **options: Any) -> tuple[RunWriter, RunWriter]:
    """Two writers of one run that do not know of each other's examples."""
    with writer_at(path) as writer:
        append(writer, 0, "token/h", "token/g")
    return writer_at(path, "resume", **options), writer_at(path, "resume", **options)


plans = st.lists(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), max_size=6), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(plans)
def test_every_example_resolves_to_its_own_rows(tmp_path_factory, plans):
    """Sessions with both columns, or one of them, over the same ids at different steps: rows are found by the whole key."""
    path = tmp_path_factory.mktemp("join") / "run.zarr"
    expected: dict[tuple[int, int], tuple[str, ...]] = {}
    for plan in plans:
        columns = [("token/h",), ("token/g",), ("token/h", "token/g")][len(expected) % 3]
        with small_chunks(), writer_at(path, "resume") as writer:
            for id_, step in plan:
                if (id_, step) not in expected:
                    append(writer, id_, *columns, step=step)
                    expected[id_, step] = columns
    if not expected:
        return
    run = open_run(path)
    assert run.keys == [(id_, "record", step) for id_, step in expected]
    for number, ((id_, _), columns) in enumerate(expected.items()):
        for column in columns:
            assert run[column][number].tolist() == value(id_, column, id_ % 5).tolist()
        for column in {name.partition("/")[2] for name in ("token/h", "token/g") if name not in columns} & set(run.tables["token"]):
            assert not run[f"token/{column}"].present[number]


def test_columns_of_one_example_may_come_from_different_sessions(path):
    """Two sessions each record another column of the same examples, in another order."""
    first, second = two_sessions(path)
    for id_ in (3, 1, 2):
        append(first, id_, "token/h")
    for id_ in (2, 4, 3):
        append(second, id_, "token/g")
    first.close()
    second.close()
    run = open_run(path)
    assert run.ids == [0, 3, 1, 2, 4]
    assert run["token/h"].present.tolist() == [True, True, True, True, False]
    assert run["token/g"].present.tolist() == [True, True, False, True, True]
    for number, id_ in enumerate(run.ids):
        for column in ("token/h", "token/g"):
            if run[column].present[number]:
                assert run[column][number].tolist() == value(id_, column, id_ % 5).tolist()
    with pytest.raises(MissingExampleError, match=r"'token/g' has no value for example .*1"):
        run["token/g"][2]
    assert run.tables["token"].lengths.tolist() == [0, 3, 1, 2, 4]


def test_rows_of_a_joined_column_follow_the_order_of_examples(path):
    first, second = two_sessions(path)
    for id_ in (3, 1):
        append(first, id_, "token/h")
    append(second, 4, "token/h")
    second.close()
    first.close()
    run = open_run(path)
    expected = np.concatenate([value(id_, "token/h", id_ % 5) for id_ in (0, 3, 1, 4)])
    assert run["token/h"].rows().tolist() == expected.tolist()
    assert run["token/h"].rows([7, 0, 4, 3]).tolist() == expected[[7, 0, 4, 3]].tolist()
    assert np.concatenate(list(run["token/h"].blocks(rows=3))).tolist() == expected.tolist()


def test_the_same_cell_from_two_sessions_is_an_error_that_names_it(path):
    """Which of them is meant cannot be known."""
    first, second = two_sessions(path)
    append(first, 7, "token/h")
    append(second, 7, "token/h")
    first.close()
    second.close()
    run = open_run(path)
    for read in (lambda: run["token/h"][1], lambda: run["token/h"].rows(), lambda: run["token/h"].present):
        with pytest.raises(SchemaError, match=r"'token/h' has two values for example .*7.*, in parts p000001 and p000002"):
            read()


def test_an_integer_id_is_named_as_it_was_given(path):
    """Not as numpy shows its numbers."""
    first, second = two_sessions(path)
    append(first, 7, "token/h")
    append(second, 8, "token/g")
    first.close()
    second.close()
    with pytest.raises(MissingExampleError, match=r"'token/g' has no value for example 7$"):
        open_run(path)["token/g"][1]


def test_cells_that_only_one_session_has_stay_readable_beside_a_conflict(path):
    first, second = two_sessions(path)
    append(first, 7, "token/h")
    append(second, 7, "token/h", "token/g")
    first.close()
    second.close()
    assert open_run(path)["token/g"][1].tolist() == value(7, "token/g", 2).tolist()


def test_within_one_session_the_lowest_part_wins(path):
    """A sampler that pads its last batch gives two ranks the same example: equal by construction."""
    first, second = two_sessions(path, session="ranks of one job")
    append(first, 7, "token/h")
    append(second, 7, "token/h")
    append(second, 8, "token/h")
    first.close()
    second.close()
    run = open_run(path)
    assert run.ids == [0, 7, 8]
    assert run["token/h"][1].tolist() == value(7, "token/h", 2).tolist()
    assert run["token/h"].rows().tolist() == [*value(7, "token/h", 2), *value(8, "token/h", 3)]


def test_unequal_token_counts_of_one_example_are_an_error_that_names_it(path):
    first, second = two_sessions(path)
    append(first, 7, "token/h", length=3)
    append(second, 7, "token/g", length=4)
    first.close()
    second.close()
    run = open_run(path)
    for read in (lambda: run.tables["token"].lengths, lambda: run.tables["token"].rows, lambda: run.tokens):
        with pytest.raises(SchemaError, match=r"p000002 has 4 rows of table 'token' for example .*7.* earlier part has 3"):
            read()


@pytest.mark.parametrize("other", [np.float32, np.int8])
def test_sessions_that_disagree_on_a_dtype_do_not_hide_the_other_columns(path, other):
    """Two writers at once cannot know of each other: only the column they disagree on may be lost to a join."""
    first, second = two_sessions(path)
    first.append(ids=[1], columns={"token/g": [[1, 2]], "token/new": [np.ones(2, np.float64)]})
    second.append(ids=[2], columns={"token/g": [[1, 2]], "token/new": [np.ones(2, other)]})
    first.close()
    second.close()
    run = open_run(path)
    with pytest.raises(SchemaError, match="'token/new'"):
        run["token/new"].rows()
    assert run["token/h"].present.tolist() == [True, False, False]


def test_a_part_that_has_committed_nothing_adds_nothing(path):
    first, second = two_sessions(path)
    append(first, 1, "token/h")
    append(second, 2, "token/h")
    second.close()
    assert open_run(path).ids == [0, 2]
    assert [part.name for part in open_run(path).parts] == ["p000000", "p000002"]


def test_parts_are_taken_in_the_order_of_their_names_whatever_the_order_of_closing(path):
    """No order depends on a clock (P12)."""
    first, second = two_sessions(path)
    append(first, 1, "token/h")
    append(second, 2, "token/h")
    second.close()
    first.close()
    assert open_run(path).ids == [0, 1, 2]


def test_a_copied_run_reads_like_the_first(path, tmp_path):
    """Nothing depends on times or places."""
    first, second = two_sessions(path)
    append(first, 1, "token/h")
    first.close()
    append(second, 2, "token/h", "token/g")
    second.close()
    shutil.copytree(path, tmp_path / "copy", copy_function=shutil.copyfile)
    one, other = open_run(path), open_run(tmp_path / "copy")
    assert one.keys == other.keys
    assert one["token/h"].rows().tolist() == other["token/h"].rows().tolist()
    assert other.verify().ok


def test_a_run_of_nothing_has_no_examples_and_no_tables(path):
    writer = writer_at(path)
    writer.append(ids=[1], columns={"token/h": [np.ones(2)]})
    run = open_run(path)
    assert (len(run), run.ids, run.keys, run.tables, run.sites, run.nbytes) == (0, [], [], {}, [], 0)
    assert run.where(id=1).tolist() == []
    assert run.examples.empty
    assert run.verify().ok
    assert "0 examples" in repr(run)
    assert len(writer.committed_ids) == 0
