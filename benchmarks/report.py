"""Timing competitors in turns, and printing tables."""

from __future__ import annotations

import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def interleaved(
    competitors: Mapping[str, Callable[[], object]], repetitions: int, clear: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each competitor, in turns; one more repetition is run first and dropped. `clear` follows each turn, untimed."""
    found: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(repetitions + 1):
        for name, run in competitors.items():
            began = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - began)
            clear()
    return {name: seconds[1:] for name, seconds in found.items()}


def ratio_table(times: Mapping[str, list[float]], *, against: str, amount: float, unit: str) -> list[str]:
    """A Markdown table: median rate, and its ratio to one competitor repetition by repetition, with the middle half's range."""
    lines = [f"| | {unit} | of {against} | middle half |", "|---|---|---|---|"]
    for name, seconds in times.items():
        ratios = sorted(base / own for base, own in zip(times[against], seconds, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        rate = amount / statistics.median(seconds)
        ratio = statistics.median(times[against]) / statistics.median(seconds)
        lines.append(f"| {name} | {rate:.3g} | {ratio:.3g} | {low:.3g} to {high:.3g} |")
    return lines


def publish(name: str, title: str, sections: Mapping[str, list[str]]) -> None:
    """Print a report and keep it under `results/`."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("tensortape", "zarr", "numpy", "torch"))
    lines = [f"# {title}", "", f"Python {platform.python_version()}, {versions}; {platform.machine()}", ""]
    for heading, table in sections.items():
        lines += [f"## {heading}", "", *table, ""]
    text = "\n".join(lines)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)


@contextmanager
def ram_folder() -> Iterator[Path]:
    """A temporary folder on a RAM disk where there is one, so that disks do not decide."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="tensortape-bench-", dir=shared if shared.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
