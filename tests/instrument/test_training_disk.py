"""A disk that fills up while a model trains: real RAM disks of a few MB, each in a process and a namespace of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import full_disk_training
import pytest
import training_loop
from faults.full_disk import may_mount
from training_loop import Loop, optimizer_of, train

STEPS = full_disk_training.STEPS
NEVER_ASKED = -(1 << 50)  # room is not looked for, so that the disk is full in the middle of a write
LIMIT = 120  # seconds, after which a training that hangs is an error

pytestmark = pytest.mark.skipif(not may_mount(), reason="this system lets only root mount a RAM disk (unshare -Urm)")


def trained(folder: Path, kibibytes: int, on_error: str, reserve: int) -> dict[str, Any]:
    command = ["unshare", "-Urm", sys.executable, full_disk_training.__file__, str(folder), str(kibibytes), on_error, str(reserve)]
    done = subprocess.run(
        command, cwd=Path(full_disk_training.__file__).parent, capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "log": done.stderr}


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """Of a training that nobody records."""
    net = training_loop.model(Loop())
    return train(Loop(), net, optimizer_of(net), range(1, STEPS + 1)).losses


@pytest.mark.parametrize("on_error", ["raise", "drop"])
@pytest.mark.parametrize(("kibibytes", "reserve"), [(9200, 8 << 20), (700, NEVER_ASKED), (4500, NEVER_ASKED)])
def test_a_full_disk(tmp_path, losses, kibibytes, reserve, on_error):
    """Training stops at a step, or goes on as if nobody recorded; what was committed is whole."""
    found = trained(tmp_path, kibibytes, on_error, reserve)
    assert found["ok"]
    assert found["recorded"] == list(range(1, len(found["recorded"]) + 1))
    assert len(found["recorded"]) < STEPS, "the disk was never full"
    assert set(found["rows"]) - set(found["recorded"]) <= {len(found["recorded"])}
    if on_error == "raise":
        assert found["raised"] in ("DiskShortError", "OSError")
        assert found["losses"] == losses[: len(found["losses"])]
        assert len(found["losses"]) < STEPS
    else:
        assert found["raised"] is None
        assert found["losses"] == losses
        assert found["dropped"] > 0
        assert "on_error='drop'" in found["log"]
        assert f"{found['dropped']} batches and steps could not be stored" in found["log"]
