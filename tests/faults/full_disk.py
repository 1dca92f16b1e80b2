"""A disk that is really full: small RAM disks in a namespace of our own, and the limit that a process has on the size of files.

Both need a process of their own: `python -m faults.full_disk tmpfs 1 2 4` prints what was wrong with each trial, as JSON.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tensortape.stores import writer as writer_module

from .promises import broken, broken_after_resuming
from .recipe import ADDED, Recipe, record

RECIPE = Recipe(31, 24, 3000)  # 10 MB in shards that grow to 500 KB
OPTIONS = {"every": 3, "memory_budget": 16 << 20}


def tmpfs(folder: Path, kibibytes: Sequence[int]) -> Iterator[list[str]]:
    """One trial per size of disk: record until it is full, look, make it larger, go on."""
    yield from _in_own_process(["unshare", "-Urm"], "tmpfs", folder, kibibytes)


def file_size_limit(folder: Path, kibibytes: Sequence[int]) -> Iterator[list[str]]:
    """One trial per limit: as `tmpfs`, but it is the process that may write no larger files."""
    yield from _in_own_process([], "limit", folder, kibibytes)


def may_mount() -> bool:
    """Whether this system lets us have a RAM disk of our own without being root."""
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(["unshare", "-Urm", *_mount(Path(folder), 64)], capture_output=True, check=False).returncode == 0


def _in_own_process(prefix: list[str], route: str, folder: Path, kibibytes: Sequence[int]) -> Iterator[list[str]]:
    command = [*prefix, sys.executable, "-m", "faults.full_disk", route, str(folder), *map(str, kibibytes)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield from map(json.loads, done.stdout.splitlines())


def _mount(folder: Path, size: int, *more: str) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", ",".join([*more, f"size={size}k"]), "tmpfs", str(folder)]


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Callable[[], object]]:
    subprocess.run(_mount(folder, size), check=True)
    yield lambda: subprocess.run(_mount(folder, 1 << 20, "remount"), check=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def _small_files(folder: Path, size: int) -> Iterator[Callable[[], object]]:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size << 10, most[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, most)
    shutil.rmtree(folder / "run.zarr")


ROUTES = {"tmpfs": _small_disk, "limit": _small_files}


def _trial(folder: Path, larger: Callable[[], object]) -> list[str]:
    path, acknowledged, wrong = folder / "run.zarr", list[int | str](), []
    try:
        record(path, RECIPE, acknowledged.append, durability="fsync", **OPTIONS)
    except OSError:
        wrong += broken(path, RECIPE, acknowledged)
    if ADDED in acknowledged:
        wrong.append("the disk was never full")
    larger()
    return [*wrong, *broken_after_resuming(path, RECIPE, **OPTIONS)]


def main(route: str, folder: str, *sizes: str) -> None:
    """Run trials and print them."""
    writer_module.RESERVE = -(1 << 50)  # a writer that looks how much room there is would never meet a full disk
    for size in map(int, sizes):
        with ROUTES[route](Path(folder), size) as larger:
            print(json.dumps([f"{route} of {size} KiB: {one}" for one in _trial(Path(folder), larger)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
