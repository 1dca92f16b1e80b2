"""Timing competitors in turns, and printing tables."""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def needed(module: str) -> Any:
    """A competitor's module.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}); benchmarks need pip install 'tensortape[bench]'") from error


def sizes(**defaults: int) -> argparse.Namespace:
    """Numbers that a benchmark is made of, each an option of its command line."""
    parser = argparse.ArgumentParser()
    for name, number in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=number)
    return parser.parse_args()


def interleaved(
    competitors: Mapping[str, Callable[[], object]],
    repetitions: int,
    clear: Callable[[], object] = lambda: None,
    clock: Callable[[], Any] = time.perf_counter,
) -> dict[str, list[Any]]:
    """What each competitor takes by `clock`, in turns; one more repetition is run first and dropped.

    `clear` follows each turn, untimed. A clock returns seconds, or an array of several kinds of seconds.
    """
    found: dict[str, list[Any]] = {name: [] for name in competitors}
    for _ in range(repetitions + 1):
        for name, run in competitors.items():
            began = clock()
            run()
            found[name].append(clock() - began)
            clear()
    return {name: seconds[1:] for name, seconds in found.items()}


def spread(figures: Iterable[float]) -> str:
    """The median, and the range of the middle half."""
    ordered = sorted(figures)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return f"{statistics.median(ordered):.3g} ({low:.3g} to {high:.3g})"


def ratio_table(times: Mapping[str, list[float]], *, against: Sequence[str], amount: float, unit: str) -> list[str]:
    """A Markdown table: median rate, and how many times the rate of some competitors that is, repetition by repetition."""
    lines = [f"| | {unit} | {' | '.join(f'of {base}' for base in against)} |", "|---|---|" + "---|" * len(against)]
    for name, seconds in times.items():
        ratios = (spread(base / own for base, own in zip(times[base], seconds, strict=True)) for base in against)
        lines.append(f"| {name} | {amount / statistics.median(seconds):.3g} | {' | '.join(ratios)} |")
    return lines


def clear(folder: Path) -> None:
    """Remove what a turn has written, and so give the pages back that the next one is going to fill."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def publish(name: str, title: str, sections: Mapping[str, list[str]], packages: Sequence[str] = ()) -> None:
    """Print a report, with the versions of the packages it is about, and keep it under `results/`."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("tensortape", "zarr", "numpy", "torch", *packages))
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
