"""When a writer commits without being asked, by a clock that the test moves."""

from __future__ import annotations

import pytest

from tensortape.stores import cadence
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
