"""The demo: the embedded model over the standard library of the machine it runs on."""

from __future__ import annotations

import hashlib
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensortape.analyses import ProbeReport, fit_probes
from tensortape.analyses.probe_report import LabelSet
from tensortape.instrument import record
from tensortape.stores import Run

from . import models, show
from .python_labels import label_tokens, lexical_spans, role_spans

_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "encodings",
    "turtledemo",
    "ensurepip",
    "__pycache__",
}
SITES = ["embed", "resid_post"]
WINDOW = 256
LABELS = {"token/lexical": "lexical class", "token/role": "identifier role"}


def run_demo(to: Path, *, files: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Record, verify, show, probe; writes `run.zarr`, `probes.csv` and `probes.png` into the folder and returns the figures."""
    began = time.monotonic()
    to.mkdir(parents=True, exist_ok=True)
    paths = source_files(files, seed)
    say(f"recording {', '.join(SITES)} of the embedded model over {len(paths)} files of the standard library")
    run = record_sources(to / "run.zarr", paths)
    say("\n".join(show.info_lines(show.info(run))))
    checked = run.verify()
    say(f"verified: {checked!r}")
    say("\n".join(show.head_lines(show.head(run, examples=1, tokens=10, sites=None, tokenizer=models.recorded_tokenizer(run)))))
    report = fit_probes(run, labels=list(LABELS), sites=SITES, control=True, seed=seed)
    report.to_pandas().to_csv(to / "probes.csv", index=False)
    report.plot().savefig(to / "probes.png", dpi=150)
    for one in report.sets:
        say("\n".join(_table(report, one)))
    say(f"run, probes.csv and probes.png are in {to} ({time.monotonic() - began:.0f} s)")
    return {
        "verified": checked.ok,
        "examples": len(run),
        "probes": {one.name: _json(report, one) for one in report.sets},
    }


def source_files(count: int, seed: int) -> list[Path]:
    """Files of the standard library, drawn by the hash of their names so that the draw is the same on every machine."""
    library = Path(sysconfig.get_path("stdlib"))
    found = [path for path in library.rglob("*.py") if not _SKIPPED & set(path.relative_to(library).parts[:-1])]
    drawn = sorted(found, key=lambda path: hashlib.sha256(f"{seed} {path.relative_to(library).as_posix()}".encode()).digest())
    return [path for path in drawn if 2_000 <= path.stat().st_size <= 40_000 and path.read_bytes().isascii()][:count]


def record_sources(to: Path, paths: list[Path]) -> Run:
    """Record the embedded model over Python files, with exact labels of their tokens."""
    library = Path(sysconfig.get_path("stdlib"))
    model, tokenizer = models.load(models.DEMO)
    return record(
        model,
        [path.read_text(encoding="ascii") for path in paths],
        tokenizer=tokenizer,
        ids=[path.relative_to(library).as_posix() for path in paths],
        labels={"token/lexical": _labels(lexical_spans), "token/role": _labels(role_spans)},
        to=to,
        sites=SITES,
        max_length=WINDOW,
        overflow="window",
        mode="overwrite",
    )


def _labels(spans: Callable[[str], Any]) -> Callable[[str, Any], list[str]]:
    return lambda text, offsets: label_tokens(spans(text), text, offsets)


def _table(report: ProbeReport, one: LabelSet) -> list[str]:
    head = f"\n{LABELS[one.name]}: {len(one.classes)} classes, {one.train_rows} tokens to fit, {one.test_rows} of other files"
    lookup = f"{one.type_lookup:.3f}" if one.type_lookup is not None else "-"
    lines = [
        f"  {score.site:<28} accuracy {score.accuracy:.3f}  control {score.control:.3f}  macro F1 {score.macro_f1:.3f}"
        for score in report.scores
        if score.labels == one.name
    ]
    return [
        head,
        *lines,
        f"  {'majority class':<28} accuracy {one.majority:.3f}",
        f"  {'type look-up':<28} accuracy {lookup}",
    ]


def _json(report: ProbeReport, one: LabelSet) -> dict[str, Any]:
    return {
        "majority": one.majority,
        "type_lookup": one.type_lookup,
        "accuracy": {score.site: score.accuracy for score in report.scores if score.labels == one.name},
    }
