"""Training steps: rows of the step table, examples keyed by step, and rewinding to a checkpoint."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import writer_at

from tensortape.stores import RunWriter, open_run
from tensortape.stores.errors import BrokenWriterError, KeyRepeatedError, RunEndedError, SchemaError
from tensortape.stores.repair import repair_run


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.zarr"


def train(writer: RunWriter, steps: range, session: float, *, every: int = 1) -> None:
    """Steps whose values tell which session wrote them."""
    for step in steps:
        if (step - 1) % every == 0:
            states = [np.full((2, 3), session + step / 1000, np.float32)]
            writer.append(ids=["a"], columns={"token/h": states}, phase="train", step=step)
        writer.append_steps(steps=[step], columns={"step/loss": [session + step / 1000]})


def test_steps_are_read_back(path):
    with writer_at(path) as writer:
        for step in range(1, 6):
            rows = {"step/loss": [0.5 / step], "step/note": [f"n{step}"], "step/g": [np.full((2, 3), step, np.float32)]}
            writer.append_steps(steps=[step], columns=rows)
    run = open_run(path)
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5]
    assert run.steps["loss"].tolist() == [0.5 / step for step in range(1, 6)]
    assert run.steps["note"].tolist() == [f"n{step}" for step in range(1, 6)]
    assert run.tables["step"]["g"].shape == (5, 2, 3)
    assert run["step/g"][3].tolist() == np.full((2, 3), 4).tolist()
    assert (len(run), run.last_step) == (0, 5)
    assert run.verify().ok
    plain = zarr.open_array(path / run["step/g"].paths[0], mode="r")
    np.testing.assert_array_equal(plain[:], run["step/g"].rows())


def test_columns_of_some_steps_only_join_the_others(path):
    with writer_at(path) as writer:
        for step in range(1, 8):
            more = {"step/score": [float(step)]} if step % 3 == 0 else {}
            writer.append_steps(steps=[step], columns={"step/loss": [-float(step)], "step/lr": [0.1], **more})
    run = open_run(path)
    assert len(run.parts) == 2, "one for what every step has, one for the score"
    assert run.steps["loss"].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]
    np.testing.assert_array_equal(run.steps["score"], [np.nan, np.nan, 3, np.nan, np.nan, 6, np.nan])
    assert run["step/score"].present.tolist() == [False, False, True, False, False, True, False]


def test_steps_stand_beside_examples(path):
    with writer_at(path) as writer:
        train(writer, range(1, 7), 0, every=2)
    run = open_run(path)
    assert run.keys == [("a", "train", 1), ("a", "train", 3), ("a", "train", 5)]
    assert run.where(step=3).tolist() == [1]
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert sorted(run.tables) == ["example", "step", "token"]
    run.add_column("example/topic", [0, 1, 0])
    assert run["example/topic"].rows().tolist() == [0, 1, 0]


@pytest.mark.parametrize("steps", [[3], [2], [1, 1], [5, 4], [-1], [], [1.5]])
def test_steps_come_in_order_and_once(path, steps):
    with writer_at(path) as writer:
        writer.append_steps(steps=[3], columns={"step/loss": [1.0]})
        with pytest.raises(SchemaError, match=r"steps are|rewind"):
            writer.append_steps(steps=steps, columns={"step/loss": [0.0] * len(steps)})
        writer.append_steps(steps=[2], columns={"step/other": [2.0]})  # in a column of its own
    assert open_run(path).steps["step"].tolist() == [2, 3]


@pytest.mark.parametrize("name", ["step/step", "token/h", "example/x", "loss"])
def test_only_the_step_table_has_rows_of_steps(path, name):
    with writer_at(path) as writer, pytest.raises(SchemaError):
        writer.append_steps(steps=[1], columns={name: [1.0]})


def test_ranks_write_steps_side_by_side(path):
    for rank in range(3):
        with writer_at(path, "resume", session="job", rank=rank, world_size=3) as writer:
            for step in (1, 2):
                writer.append_steps(steps=[step], columns={"step/loss": [10.0 * rank + step]})
    found = open_run(path).steps
    assert found[["step", "rank", "loss"]].values.tolist() == [[1, 0, 1], [1, 1, 11], [1, 2, 21], [2, 0, 2], [2, 1, 12], [2, 2, 22]]


def test_rewinding_hides_what_came_after_the_checkpoint(path):
    with writer_at(path) as writer:
        train(writer, range(1, 9), 100)
        writer.append(ids=["p"], columns={"token/h": [np.ones((1, 3), np.float32)]}, phase="probe", step=4)
        writer.append(ids=["p"], columns={"token/h": [np.ones((1, 3), np.float32)]}, phase="probe", step=8)
    with writer_at(path, "resume") as writer:
        writer.rewind(5)
        assert ("a", "train", 4) in writer.committed_ids
        assert ("a", "train", 5) not in writer.committed_ids
        assert open_run(path).last_step == 8, "nothing is hidden before anything is committed"
        train(writer, range(5, 8), 200)
    run = open_run(path)
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert run.steps["loss"].tolist() == [100 + n / 1000 for n in range(1, 5)] + [200 + n / 1000 for n in range(5, 8)]
    assert sorted(run.keys) == [*(("a", "train", step) for step in range(1, 8)), ("p", "probe", 4)]
    of_step = {key[2]: run["token/h"][number][0, 0] for number, key in enumerate(run.keys) if key[1] == "train"}
    assert of_step == {n: np.float32((100 if n < 5 else 200) + n / 1000) for n in range(1, 8)}
    assert run.verify().ok
    assert len(run["token/h"]) == 2 * 7 + 1, "hidden rows are no rows of the column"


def test_columns_that_were_added_are_rewound_too(path):
    with writer_at(path) as writer:
        train(writer, range(1, 7), 100)
    before = open_run(path)
    before.add_column("example/topic", [1, 2, 3, 4, 5, 6])
    before.add_column("token/tag", [np.full(2, n) for n in range(6)])
    identity = before["example/topic"].identity
    with writer_at(path, "resume") as writer:
        writer.rewind(4)
        train(writer, range(4, 6), 200)
    run = open_run(path)
    assert run["example/topic"].present.tolist() == [True, True, True, False, False]
    assert [run["token/tag"][number].tolist() for number in range(3)] == [[0, 0], [1, 1], [2, 2]]
    assert run["example/topic"].identity != identity, "numbers kept of the column as it was are not taken for its own"
    run.add_column("example/after", [1, 2, 3, 4, 5])
    assert run["example/after"].rows().tolist() == [1, 2, 3, 4, 5]


@settings(max_examples=60, deadline=None)
@given(
    sessions=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=5),
    ranks=st.integers(1, 2),
    every=st.integers(1, 3),
)
def test_every_step_is_seen_once_and_of_the_last_trajectory(tmp_path_factory, sessions, ranks, every):
    """Trainings that go on from checkpoints again and again, against a dict."""
    path = tmp_path_factory.mktemp("rewinds") / "run.zarr"
    expected: dict[int, float] = {}
    for number, (checkpoint, count) in enumerate(sessions):
        begin = min([checkpoint + 1, *(step + 1 for step in [max(expected, default=0)])])
        for rank in range(ranks):
            with writer_at(path, "resume", session=f"{number}", rank=rank, world_size=ranks) as writer:
                writer.rewind(begin)
                train(writer, range(begin, begin + count), 100 * number, every=every) if rank == 0 else None
        if count:
            expected = {step: value for step, value in expected.items() if step < begin}
            expected.update({step: 100 * number + step / 1000 for step in range(begin, begin + count)})
    if not expected:
        return
    run = open_run(path)
    assert dict(zip(run.steps["step"], run.steps["loss"], strict=True)) == expected
    assert run.steps["step"].is_unique
    shown = {key[2]: float(run["token/h"][n][0, 0]) for n, key in enumerate(run.keys)} if len(run) else {}
    assert shown == {step: float(np.float32(value)) for step, value in expected.items() if (step - 1) % every == 0}


def test_a_writer_rewinds_before_its_first_append(path):
    with writer_at(path) as writer:
        writer.append_steps(steps=[1], columns={"step/loss": [1.0]})
        with pytest.raises(BrokenWriterError, match="before its first append"):
            writer.rewind(1)


def test_steps_that_a_checkpoint_left_behind_are_missed(path, caplog):
    """A loop that saved its checkpoint without asking the recorder to commit."""
    with writer_at(path) as writer:
        train(writer, range(1, 4), 0)
    with writer_at(path, "resume") as writer:
        writer.rewind(4)
    assert not caplog.records
    with writer_at(path, "resume") as writer:
        writer.rewind(7)
    assert "the steps 4 to 6 are missing" in caplog.text


def test_resuming_without_rewinding_refuses_steps_there_are(path):
    with writer_at(path) as writer:
        train(writer, range(1, 4), 0)
    with writer_at(path, "resume") as writer, pytest.raises(KeyRepeatedError, match="rewind to the step"):
        writer.append_steps(steps=[3], columns={"step/loss": [0.0]})


def test_damaged_steps_are_named_and_given_up(path):
    with writer_at(path) as writer:
        train(writer, range(1, 6), 0)
    run = open_run(path)
    shard = next((path / run["step/loss"].paths[0]).glob("c*"))
    content = bytearray(shard.read_bytes())
    content[3] ^= 0x40
    shard.write_bytes(bytes(content))
    report = open_run(path).verify()
    assert [(damage.first, damage.last) for damage in report.damaged] == [(1, 5)]
    assert repair_run(path).withdrawn == [1, 2, 3, 4, 5]
    assert open_run(path).verify().ok
    assert len(open_run(path)) == 5, "the examples are as they were"


def test_a_run_is_followed_while_it_is_written(path):
    writer = writer_at(path)
    train(writer, range(1, 3), 0)
    writer.commit()
    run = open_run(path)
    together = threading.Event()

    def more() -> None:
        together.wait()
        train(writer, range(3, 6), 0)
        writer.commit()

    thread = threading.Thread(target=more)
    thread.start()
    with pytest.raises(TimeoutError, match="the last step is 2"):
        run.wait_for(step=5, timeout=0.2, poll=0.02)
    together.set()
    assert run.wait_for(step=5, timeout=30, poll=0.02).last_step == 5
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5]
    thread.join()
    writer.close()
    with pytest.raises(RunEndedError, match="ended with step 5, before step 9"):
        run.wait_for(step=9)


def test_a_run_that_is_resumed_has_not_ended(path):
    """Between the sealing of a dead writer's part and the first commit of the next one."""
    dead = writer_at(path)
    train(dead, range(1, 3), 0)
    dead.commit()
    run = open_run(path)
    with writer_at(path, "resume") as writer:
        writer.rewind(3)
        with pytest.raises(TimeoutError):
            run.wait_for(step=4, timeout=0.2, poll=0.02)
        assert all(part.closed for part in run.parts)
        train(writer, range(3, 5), 100)
    assert run.wait_for(step=4, poll=0.02).last_step == 4


def test_columns_of_steps_stay_of_one_kind(path):
    """Also in steps that have other columns beside them, and go to another part."""
    with writer_at(path) as writer:
        writer.append_steps(steps=[1], columns={"step/loss": [1.0]})
        with pytest.raises(SchemaError, match="of one kind"):
            writer.append_steps(steps=[2], columns={"step/loss": ["none"], "step/other": [1]})
    with writer_at(path, "resume") as writer:
        writer.rewind(2)
        with pytest.raises(SchemaError, match="of one kind"):
            writer.append_steps(steps=[2], columns={"step/loss": [np.ones(3)]})


def test_columns_are_shown_in_an_order_that_helps(path):
    with writer_at(path) as writer:
        rows = {
            "step/param.b.grad|norm": [1.0],
            "step/param.a.grad|norm": [1.0],
            "step/epoch": [0],
            "step/lr": [0.1],
            "step/loss": [2.0],
        }
        writer.append_steps(steps=[1], columns=rows)
    assert open_run(path).steps.columns.tolist() == ["step", "loss", "lr", "epoch", "param.b.grad|norm", "param.a.grad|norm"]
