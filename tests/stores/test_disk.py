"""A disk that runs short: appends are refused while there still is room to commit what came before."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from tensortape.stores import RunWriter, open_run
from tensortape.stores.errors import DiskShortError
from tensortape.stores.writer import RESERVE

Usage = namedtuple("Usage", "total used free")
ROWS = 257


def values(number: int) -> np.ndarray:
    """Rows [257, 1031] float32, 1.06 MB, that differ from append to append."""
    return np.random.default_rng(number).standard_normal((ROWS, 1031), np.float32)


def append(writer: RunWriter, number: int) -> None:
    writer.append(ids=[number], columns={"token/h": [values(number)]})


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the disk says it has free: the last entry."""
    found = [1 << 40]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, found[-1]))
    return found


def test_an_append_that_does_not_fit_is_refused_and_nothing_is_lost(tmp_path: Path, free: list[int]) -> None:
    writer = RunWriter(tmp_path / "r.zarr", durability="rename")
    append(writer, 0)
    writer.commit()
    append(writer, 1)
    free.append(RESERVE + 3 * values(0).nbytes - 1)  # two in the buffer, of which a longer tail is to be written, and one to come
    with pytest.raises(DiskShortError, match=r"needs about 0.012 GB .* has 0.012 GB free.*mode='resume'"):
        append(writer, 2)
    assert isinstance(DiskShortError(), OSError)
    free.append(RESERVE + 4 * values(0).nbytes)
    append(writer, 2)  # the writer goes on once there is room
    writer.close()
    run = open_run(tmp_path / "r.zarr")
    assert run.ids == [0, 1, 2]
    assert all(np.array_equal(run["token/h"][number], values(number)) for number in range(3))


def test_a_first_append_that_does_not_fit_leaves_nothing(tmp_path: Path, free: list[int]) -> None:
    free.append(0)
    with RunWriter(tmp_path / "r.zarr") as writer, pytest.raises(DiskShortError):
        append(writer, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system(tmp_path: Path) -> None:
    """On a real file system of 40 MiB: whatever was appended is committed at the end, and the disk is not full."""
    script = f"""
import shutil, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_disk import append, values, DiskShortError, RunWriter, open_run, np
with RunWriter({str(tmp_path / "r.zarr")!r}, memory_budget=24 << 20) as writer:
    count = 0
    try:
        while count < 100:
            append(writer, count)
            count += 1
    except DiskShortError:
        pass
run = open_run({str(tmp_path / "r.zarr")!r})
assert run.ids == list(range(count)), (run.ids, count)
assert all(np.array_equal(run["token/h"][number], values(number)) for number in range(count))
assert run.verify().ok
print(count, shutil.disk_usage({str(tmp_path)!r}).free)
"""
    mount = f'mount -t tmpfs -o size=40m tmpfs {tmp_path} && exec {sys.executable} -c "$0"'
    if subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    found = subprocess.run(["unshare", "-Urm", "bash", "-c", mount, script], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    count, left = map(int, found.stdout.split())
    assert 20 <= count <= 35
    assert left > RESERVE // 2
