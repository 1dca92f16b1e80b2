"""Opening a run: seconds and memory, over numbers of parts, of columns and of commits."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from report import publish, ram_folder

from tensortape.stores import chain, layout, open_run
from tensortape.stores.keys import PHASE, STEP
from tensortape.stores.parts import PartWriter, key_columns
from tensortape.stores.places import LocalPlace
from tensortape.stores.ragged import Cells
from tensortape.stores.runs import start
from tensortape.stores.schema import PartDocument, RunDocument

UID = "0" * 32


def new_run(path: Path) -> LocalPlace:
    """A run without parts."""
    place = LocalPlace(path, "rename")
    start(place, "create", RunDocument(uid=UID, session="bench"))
    return place


def part_writer(place: LocalPlace, ids: range, columns: int) -> PartWriter:
    """A part that holds examples, still to be committed."""
    writer = PartWriter(place, lambda: PartDocument(run=UID, session="bench"), layout.DEFAULT_BUDGET)
    count = len(ids)
    values = {f"example/c{number}": Cells("float32", (), [np.zeros(count, np.float32)], None) for number in range(columns)}
    keys = key_columns(np.arange(ids.start, ids.stop), np.full(count, PHASE, object), np.full(count, STEP))
    writer.prepare({**values, **keys}, {})
    writer.append({**values, **keys})
    return writer


def write_parts(path: Path, parts: int, columns: int) -> None:
    """Closed parts of one example each."""
    place = new_run(path)
    for part in range(parts):
        part_writer(place, range(part, part + 1), columns).commit("closed")


def write_commits(path: Path, commits: int) -> None:
    """One part whose records each state the tails of all arrays, as a commit of a few rows does; open."""
    place = new_run(path)
    writer = part_writer(place, range(commits), 1)
    writer.commit()
    assert writer.state is not None
    state = writer.state
    tails = {path: {max(array.shards): array.shards[max(array.shards)]} for path, array in state.arrays.items()}
    rows = {path: array.rows for path, array in state.arrays.items()}
    for _ in range(commits - 1):
        chain.add_record(place, state, "commit", array_rows=rows, shards=tails)


def resident() -> float:
    """MiB of memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def opened(path: Path) -> str:
    """Seconds of the processor and MiB that opening takes, and then reading all ids."""
    before, began = resident(), time.process_time()
    run = open_run(path)
    seconds, more = time.process_time() - began, resident() - before
    began = time.process_time()
    examples = len(run)
    return f"{examples} | {seconds:.3f} | {more:.1f} | {time.process_time() - began:.3f}"


def measured(path: Path) -> str:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--open", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure and publish, or open a run in a child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--open", type=Path)
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("--commits", type=int, default=100_000)
    options = parser.parse_args()
    if options.open:
        print(opened(options.open))
        return
    head = ["examples | CPU seconds to open | MiB | CPU seconds to list the examples then |", "---|---|---|---|"]
    by_parts = [f"| parts | columns | {head[0]}", f"|---|---|{head[1]}"]
    by_commits = [f"| commits | {head[0]}", f"|---|{head[1]}"]
    for parts, columns in ((options.parts // 10, 50), (options.parts, 5), (options.parts, 50)):
        with ram_folder() as folder:
            write_parts(folder / "run.zarr", parts, columns)
            by_parts.append(f"| {parts} | {columns} | {measured(folder / 'run.zarr')} |")
    for commits in (options.commits // 100, options.commits // 10, options.commits):
        with ram_folder() as folder:
            write_commits(folder / "run.zarr", commits)
            by_commits.append(f"| {commits} | {measured(folder / 'run.zarr')} |")
    publish("open", "Opening a run", {"Closed parts": by_parts, "Commits of one open part": by_commits})


if __name__ == "__main__":
    main()
