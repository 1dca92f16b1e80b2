"""Run the fault suite in full and print its table: `python -m faults.report`, with words that a scenario's name must have."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from .scenarios import SCENARIOS, Scenario, working_folder


def row(scenario: Scenario) -> tuple[str, list[str]]:
    """A scenario's line of the table, and everything that was wrong."""
    if reason := scenario.needs():
        return f"| {scenario.name} | {scenario.promises} | skipped: {reason} | | |", []
    began = time.perf_counter()
    with working_folder() as folder:
        found = list(scenario.run(folder, in_full=True))
    failed = sum(map(bool, found))
    line = f"| {scenario.name} | {scenario.promises} | {len(found)} | {failed} | {time.perf_counter() - began:.0f} |"
    return line, [wrong for trial in found for wrong in trial]


def main(words: Sequence[str]) -> int:
    """Print the table line by line, then what was wrong; 1 if anything was."""
    torch.set_num_threads(1)
    print("| scenario | promises | trials | failures | seconds |\n|---|---|---|---|---|", flush=True)
    every: list[str] = []
    for scenario in SCENARIOS:
        if all(word in scenario.name for word in words):
            line, wrong = row(scenario)
            print(line, flush=True)
            every += wrong
    print("", *every, sep="\n")
    return int(bool(every))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
