"""Memory of recording: bounded by the stated budget, whatever the length of the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tensortape.instrument import Recorder
from tensortape.stores.errors import BudgetError

BUDGET_MIB = 48
PROGRAM = """
import json, resource, sys
import torch
from torch import nn
from tensortape.instrument import Recorder

path, batches, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20
torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(192, 192) for _ in range(6))).eval()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.no_grad():
    for _ in range(4):
        model(torch.zeros(8, 257, 192))
    before = peak()
    with Recorder(model, sites="*", to=path, durability="rename", memory_budget=budget) as recorder:
        for number in range(batches):
            with recorder.batch(ids=[f"{number}-{row}" for row in range(8)], mask=torch.ones(8, 257)):
                model(torch.rand(8, 257, 192))
print(json.dumps({"above": peak() - before, "committed": len(recorder.writer.committed_ids)}))
"""


def recorded(path: Path, batches: int) -> dict[str, float]:
    """Peak MiB above the bare model, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(path), str(batches), str(BUDGET_MIB)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@pytest.mark.slow
def test_peak_memory_stays_in_the_budget_over_a_ten_times_longer_input(tmp_path: Path) -> None:
    short, long = recorded(tmp_path / "short.zarr", 8), recorded(tmp_path / "long.zarr", 80)
    assert (short["committed"], long["committed"]) == (64, 640)
    assert long["above"] <= BUDGET_MIB
    assert long["above"] <= short["above"] + BUDGET_MIB / 2


def test_a_budget_too_small_is_refused_before_anything_is_written_with_the_number_needed(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    recorder = Recorder(model, sites="*", to=tmp_path / "run.zarr", memory_budget=1 << 16)
    with (
        pytest.raises(BudgetError, match=r"memory budget of at least \d+"),
        recorder.batch(ids=["a", "b"], mask=torch.ones(2, 5)),
    ):
        model(torch.rand(2, 5, 64))
    recorder.close()
    assert not (tmp_path / "run.zarr").exists()
