"""Run the fault suite in full and print its table: `python -m faults.report`, with words that a scenario's name must have."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence


def main(words: Sequence[str]) -> int:
    """Print the table line by line, then what was wrong; 1 if anything was."""
    print("| scenario | promises | trials | failures | seconds |\n|---|---|---|---|---|", flush=True)
    every: list[str] = []
    for line, wrong in _rows(words):
        print(line, flush=True)
        every += wrong
    print("", *every, sep="\n")
    return int(bool(every))


def _rows(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """A line per scenario, and everything that was wrong."""
    import torch  # here, and not above: each process that is to be killed imports this module first

    from .scenarios import SCENARIOS, working_folder

    torch.set_num_threads(1)
    for scenario in (scenario for scenario in SCENARIOS if all(word in scenario.name for word in words)):
        began = time.perf_counter()
        reason = scenario.needs()
        with working_folder() as folder:
            found = [] if reason else list(scenario.run(folder, in_full=True))
        counts = [f"skipped: {reason}"] if reason else [str(len(found)), str(sum(map(bool, found)))]
        cells = [scenario.name, scenario.promises, *counts, f"{time.perf_counter() - began:.0f}"]
        yield f"| {' | '.join(cells)} |", [wrong for trial in found for wrong in trial]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
