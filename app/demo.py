"""The demo: record the embedded model, check the run, analyse it, and write a report with pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensortape.analyses import Result, fit_cavs, fit_probes, head_stats, tcav

from . import demo_report, models, show
from .demo_runs import CONCEPTS, SITES, TARGET, record_gradients, record_sources, source_files

LABELS = {"token/lexical": "lexical class", "token/role": "identifier role"}
GRADED = 20  # files whose attention and gradients are recorded
Say = Callable[[str], None]


def run_demo(to: Path, *, files: int, seed: int, say: Say) -> dict[str, Any]:
    """Three runs, a table and a picture of each analysis, and `report.md`, in the folder; returns the figures."""
    began = time.monotonic()
    to.mkdir(parents=True, exist_ok=True)
    paths = source_files(files, seed)
    say(f"recording {', '.join(SITES)} of the embedded model over {len(paths)} files of the standard library")
    run = record_sources(to / "run.zarr", paths)
    say("\n".join(show.info_lines(show.info(run))))
    checked = run.verify()
    say(f"verified: {checked!r}")
    say("\n".join(show.head_lines(show.head(run, examples=1, tokens=10, sites=None, tokenizer=models.recorded_tokenizer(run)))))
    say("recording the same of a model that was not trained; attention and gradients of fewer files")
    untrained = record_sources(to / "untrained.zarr", paths, trained=False)
    graded = record_gradients(to / "gradients.zarr", paths[:GRADED])
    say("fitting probes, concepts and head statistics")
    cavs = fit_cavs(graded, concepts=[f"example/{name}" for name in CONCEPTS], sites="resid_post", seed=seed)
    results: dict[str, Result] = {
        "probes": fit_probes(run, labels=list(LABELS), sites=SITES, control=True, baseline=untrained, seed=seed),
        "tcav": tcav(graded, cavs, target=TARGET),
        "heads": head_stats(graded, examples=24, seed=seed),
    }
    for name, result in results.items():
        result.to_pandas().to_csv(to / f"{name}.csv", index=False)
        result.plot().savefig(to / f"{name}.png", dpi=150)
    sections = demo_report.sections(results)
    (to / "report.md").write_text(demo_report.markdown(sections), encoding="utf-8")
    say("\n\n".join(f"{section.title}\n{section.table}" for section in sections))
    say(f"{to / 'report.md'} shows the tables with their pictures ({time.monotonic() - began:.0f} s)")
    return {
        "verified": checked.ok,
        "examples": len(run),
        "probes": demo_report.probe_figures(results["probes"]),  # type: ignore[arg-type]
    }
