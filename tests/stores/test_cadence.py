"""When a writer commits without being asked, by a clock that the test moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from strategies import writer_at

from tensortape.stores import RunWriter, cadence, open_run
from tensortape.stores.cadence import REWRITE_SHARE, SLOWEST, TIME_SHARE, Cadence


class Clock:
    """Stands for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cadence, "time", clock)
    return clock


def commit(rhythm: Cadence, clock: Clock, seconds: float) -> None:
    with rhythm:
        clock.now += seconds


def test_a_commit_is_due_when_tails_are_a_small_part_of_what_was_appended(clock):
    rhythm = Cadence()
    assert not rhythm.due(REWRITE_SHARE * 50, 100)
    assert not rhythm.due(REWRITE_SHARE * 50 - 1, 100)
    assert rhythm.due(1, 100)


def test_bytes_are_counted_from_the_last_commit(clock):
    rhythm = Cadence()
    assert rhythm.due(REWRITE_SHARE * 100, 100)
    commit(rhythm, clock, 0.0)
    assert not rhythm.due(REWRITE_SHARE * 100 - 1, 100)
    assert rhythm.due(1, 100)


def test_commits_take_a_small_part_of_the_time_however_many_bytes_come(clock):
    rhythm = Cadence()
    commit(rhythm, clock, 2.0)
    clock.now += 2.0 * TIME_SHARE - 0.1
    assert not rhythm.due(10**12, 0)
    clock.now += 0.1
    assert rhythm.due(0, 0)


def test_a_slow_recording_commits_after_a_while_all_the_same(clock):
    rhythm = Cadence()
    clock.now += SLOWEST - 0.1
    assert not rhythm.due(1, 10**9)
    clock.now += 0.1
    assert rhythm.due(1, 10**9)


def test_a_limit_of_time_is_the_users(clock):
    rhythm = Cadence(seconds=3.0)
    clock.now += 2.9
    assert not rhythm.due(1, 10**9)
    clock.now += 0.2
    assert rhythm.due(1, 10**9)
    commit(rhythm, clock, 0.0)
    clock.now += 2.9
    assert not rhythm.due(1, 10**9)


def test_a_limit_of_bytes_counts_whatever_a_commit_costs(clock):
    """Neither the bytes it rewrites nor the time it takes matter."""
    rhythm = Cadence(nbytes=100)
    commit(rhythm, clock, 1000.0)
    assert not rhythm.due(99, 10**9)
    assert rhythm.due(1, 10**9)
    commit(rhythm, clock, 1000.0)
    assert not rhythm.due(99, 10**9)


# --- of a writer ----------------------------------------------------------------------------------------------------------------

ROWS = np.ones((3, 64), np.float32)  # 768 bytes, and 41 of keys and bounds


def append(writer: RunWriter, number: int) -> None:
    writer.append(ids=[number], columns={"token/h": [ROWS]})


@pytest.fixture(params=[False, True], ids=["foreground", "background"])
def options(request) -> dict[str, bool]:
    return {"background": request.param}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.zarr"


def settled(writer: RunWriter) -> RunWriter:
    """The writer, once everything appended is in its buffers or on disk; nothing is committed for that."""
    if writer._background is not None:
        writer._background.wait()
    return writer


def test_a_writer_commits_after_so_many_bytes(path, clock, options):
    with writer_at(path, commit_bytes=2 * ROWS.nbytes + 1, **options) as writer:
        for number in range(7):
            append(writer, number)
            expected = number + 1 if number % 2 == 1 else number
            assert len(settled(writer).committed_ids) == expected
            assert len(open_run(path)) == expected if number else True


def test_a_writer_commits_after_so_much_time(path, clock, options):
    with writer_at(path, commit_seconds=3.0, **options) as writer:
        append(writer, 0)
        assert len(settled(writer).committed_ids) == 0
        clock.now += 3.0
        append(writer, 1)
        assert len(settled(writer).committed_ids) == 2
        append(writer, 2)
        assert len(settled(writer).committed_ids) == 2
