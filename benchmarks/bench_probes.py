"""Probes of every layer of the embedded model, beside scikit-learn called site by site on arrays in memory.

Two label sets, each with its control task, on tokens of the Python standard library. scikit-learn standardises features and fits
`LogisticRegression`, one task after another; what is compared is the seconds for one site and the objective that was reached. A
second part measures the memory of a fresh process that probes a larger run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import publish, ram_folder
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tensortape.analyses import ProbeReport, controls, fit_probes
from tensortape.analyses.spaces import read_labels, space
from tensortape.analyses.splits import split
from tensortape.app import demo_runs
from tensortape.stores import Run, RunWriter, open_run

LABELS = ["token/lexical", "token/role"]
SITES = ["embed", "resid_post"]


def ours(run: Run, sites: Any) -> ProbeReport:
    """All sites, sets and controls; nothing is kept from an earlier call."""
    return fit_probes(run, labels=LABELS, sites=sites, control=True, bootstrap=0, keep=False)


def theirs(run: Run, site: str, tolerance: float) -> dict[str, tuple[float, float]]:
    """Seconds and objective of each task of one site by scikit-learn."""
    column = run[site]
    rows = space(run, [column], [run[name] for name in LABELS], None)
    parts = split(rows.groups(None), rows.owner, test_share=0.25, folds=None, blocks=False, seed=0)
    x, types, found = column.rows(), rows.types(), {}
    for name in LABELS:
        labels = read_labels(rows, run[name])
        tasks = {name: labels.of_row, f"{name} control": controls.control_labels(labels, types, 0)}
        for task, of_row in tasks.items():
            train = (of_row >= 0) & (parts.of_row == 0)
            own, y = x[train], of_row[train]
            began = time.perf_counter()
            scaled = StandardScaler().fit_transform(own)
            model = LogisticRegression(tol=tolerance, max_iter=5000).fit(scaled, y)
            seconds = time.perf_counter() - began
            loss = -model.predict_log_proba(scaled.astype(np.float64))[np.arange(len(y)), y].mean()
            found[task] = seconds, float(loss + 0.5 * (model.coef_**2).sum() / len(y))
    return found


def compared(run: Run, site: str, tolerance: float) -> list[str]:
    """One site by both, and all sites by ours."""
    ours(run, site)
    began = time.perf_counter()
    report = ours(run, site)
    one = time.perf_counter() - began
    began = time.perf_counter()
    whole = ours(run, SITES)
    every = time.perf_counter() - began
    other = theirs(run, site, tolerance)
    total = sum(seconds for seconds, _ in other.values())
    best = {score.labels: score.probe.objective for score in report.scores}
    return [
        f"{run.tables['token'].rows} tokens; {report.sets[0].train_rows} and {report.sets[1].train_rows} are labelled and trained "
        f"on. Readings of all rows: {', '.join(str(score.probe.passes) for score in report.scores)}.",
        "",
        "| | seconds | of fit_probes |",
        "|---|---|---|",
        f"| fit_probes, {site}, 2 label sets with controls | {one:.1f} | 1 |",
        f"| scikit-learn, the same, tol={tolerance:g} | {total:.1f} | {total / one:.1f} |",
        f"| fit_probes, all {len(whole.scores) // 2} sites | {every:.1f} | {every / one:.1f} |",
        "",
        "Objectives of scikit-learn less ours, of ours: "
        + ", ".join(f"{name} {(other[name][1] - best[name]) / best[name]:.1e}" for name in LABELS)
        + ".",
    ]


def widened(path: Path, to: Path, nbytes: float) -> None:
    """A run of about so many bytes: the same examples again and again under other ids."""
    run = open_run(path)
    names = [column.name for column in run.select(SITES)] + [*LABELS, "token/input_ids", "example/document"]
    times = int(np.ceil(nbytes / run.nbytes))
    with RunWriter(to, durability="rename", background=True) as writer:
        for column in run.select(SITES):
            writer.describe(column.name, site=column.site)
        for copy in range(times):
            for number in range(0, len(run), 16):
                some = slice(number, number + 16)
                writer.append(ids=[f"{copy} {id_}" for id_ in run.ids[some]], columns={name: run[name][some] for name in names})


def peak(path: Path) -> tuple[float, float]:
    """Peak MiB of a fresh process that probes all sites: of its own memory, and with the files it maps."""
    command = [sys.executable, __file__, "--probe", str(path)]
    own, mapped = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(own), float(mapped)


def watched(run: Run) -> tuple[float, float]:
    """Probe, and look at what the kernel says of this process meanwhile."""
    highest = [0.0, 0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            own, every = (int(said[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS"))
            highest[:] = max(highest[0], own), max(highest[1], every)

    watcher = threading.Thread(target=watch)
    watcher.start()
    ours(run, SITES)
    done.set()
    watcher.join()
    return highest[0], highest[1]


def main() -> None:
    """Measure and publish, or probe in a child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=150)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--site", default="resid_post[2]")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--probe", type=Path)
    options = parser.parse_args()
    if options.probe:
        print(*watched(open_run(options.probe)))
        return
    with ram_folder() as folder:
        path = options.run or folder / "run.zarr"
        run = open_run(path) if options.run else demo_runs.record_sources(path, demo_runs.source_files(options.files, seed=0))
        sections = {"Seconds": compared(run, options.site, options.tolerance)}
        if options.gigabytes:
            widened(path, folder / "wide.zarr", options.gigabytes * 1e9)
            own, mapped = peak(folder / "wide.zarr")
            sections[f"Memory: a run of {open_run(folder / 'wide.zarr').nbytes / 1e9:.1f} GB"] = [
                f"Peak of a process that probes all sites on {os.cpu_count()} cores: {own:.0f} MiB of its own memory, "
                f"{mapped:.0f} MiB with the pages of files that it maps."
            ]
    publish("probes", "Probes", sections, ["scikit-learn"])


if __name__ == "__main__":
    main()
