"""The fault suite in short: every scenario with few trials. `make faults` runs all of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from faults import damage
from faults.scenarios import SCENARIOS, Scenario, working_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a RAM disk where there is one: a sync of a busy disk takes longer than all else."""
    with working_folder() as folder:
        yield folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_promises_hold_after(scenario: Scenario, folder: Path) -> None:
    if reason := scenario.needs():
        pytest.skip(reason)
    trials = list(scenario.run(folder, in_full=False))
    assert trials
    assert [wrong for trial in trials for wrong in trial] == []


def test_what_is_known_to_be_missed_still_is(folder: Path) -> None:
    """Otherwise the list would hide what breaks again later."""
    kinds = {kind for kind, _ in damage.NOT_YET_REPORTED}
    if kinds:
        flips = damage.flips(folder / "flips", count=4 * len(kinds), seed=0, kinds=kinds)
        deletions = damage.deletions(folder / "deletions", count=20, seed=0, kinds=kinds & {"commit record", "end of a part"})
        missed = {(miss.kind, miss.what) for misses in chain(flips, deletions) for miss in misses}
        assert missed >= damage.NOT_YET_REPORTED
