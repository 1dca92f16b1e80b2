"""Batches that are done, on their way to the writer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tensortape.stores import RunWriter, keys

from .batch import CONTENT, Batch
from .capture import Capture, Pins
from .metrics import Metrics
from .progress import Moment
from .rows import Rows, first_of_each, keep
from .sites import Tap
from .steps import Key, Step

_SAID = ("attention", "scaled", "sample", "projection")  # of what a capture is about, what the run keeps


@dataclass(frozen=True)
class Learned:
    """What the first batch of a phase had: its sites, and what a column looks like in which a batch has nothing."""

    expected: set[Key]
    absent: dict[str, Any]


class BatchWriter:
    """Checks that each batch has what the first one of its phase had, and appends what the run does not hold yet."""

    def __init__(self, writer: RunWriter, taps: list[Tap], pins: Pins, *, resumes: bool) -> None:
        self._writer = writer
        self._taps = taps
        self._pins = pins
        self._resumes = resumes
        self._learned: dict[str, Learned] = {}
        self._described: set[str] = set()

    def has_all(self, batch: Batch, targets: set[str]) -> bool:
        """Whether a resumed run holds every example of a batch already."""
        given, moment = batch.given, batch.moment
        if not self._resumes or given.examples is None:
            return False
        recorded = [self._recorded_of(tap, targets) for tap in self._taps_of(moment)]
        wanted = set(given.labels).union(*recorded)
        missing = (self._writer.missing(wanted, id_, moment.phase, moment.step) for id_ in keys.normalise(given.ids))
        return bool(recorded) and all(recorded) and not any(missing)

    def write(self, batch: Batch, metrics: Metrics) -> None:
        """Hand a batch that is done to the writer."""
        found, moment = batch.whole(), batch.moment
        learned = self._learned.get(moment.phase)
        batch.check(found, self._taps_of(moment), learned.expected if learned else None)
        self._pins.check_targets(found.captures.values())
        rows = batch.rows(found, learned.absent if learned else {})
        if learned is None:
            learned = self._learn(found, rows)
        metrics.take(found.captures.values(), moment.phase)
        found.captures.clear()
        batch.forget()
        if once := batch.given.ids == CONTENT and moment.step != keys.STEP:  # a text may come twice in a training step
            rows = keep(rows, first_of_each(rows.ids), rows.columns.keys())
        for new in self._new_only(rows, moment, once=once):
            said: Any = {"phase": moment.phase, "step": moment.step, "arrived": new.arrived}
            self._writer.drain(ids=new.ids, columns=new.columns, lengths=new.lengths, **said)
        self._learned[moment.phase] = learned

    def _new_only(self, rows: Rows, moment: Moment, *, once: bool) -> list[Rows]:
        """What a resumed run does not have yet, together for examples that miss the same columns."""
        if not self._resumes and not once:
            return [rows]
        missing = [self._writer.missing(rows.columns, id_, moment.phase, moment.step) for id_ in rows.ids]
        return [
            keep(rows, np.array([other == columns for other in missing]), columns) for columns in dict.fromkeys(missing) if columns
        ]

    def _learn(self, found: Step, rows: Rows) -> Learned:
        """After the first batch of a phase: say what each column is, and remember what an absent one looks like."""
        for taken in found.captures.values():
            if taken.column not in self._described:
                self._describe(taken)
        absent = [taken.column for taken in found.captures.values() if taken.tap.options.missing == "absent"]
        return Learned(set(found.captures), {name: rows.columns[name][:0] for name in absent})

    def _describe(self, taken: Capture) -> None:
        options = taken.tap.options
        smaller: dict[str, Any] = {} if taken.is_companion else {"compress": options.compress, "quantize": options.quantize}
        self._writer.describe(taken.column, site=self._described_site(taken), **smaller)
        if "projection" in taken.about and options.project is not None:
            basis = options.project.basis(str(taken.site))
            self._writer.add_asset(basis.asset, basis.content)
        self._described.add(taken.column)

    def _described_site(self, taken: Capture) -> dict[str, Any]:
        site = taken.site
        aliases = self._pins.aliases_of(site, cross=bool(taken.about.get("cross")))
        said: dict[str, Any] = {name: taken.about[name] for name in _SAID if name in taken.about}
        return {
            "path": site.path,
            "port": site.port,
            "call": site.call,
            "aliases": [[alias.stack, alias.name, alias.layer, alias.depth] for alias in aliases],
            "layout": str(taken.layout),
            "reduce": taken.suffix,
            "tap": taken.tap.asked,
            "target": taken.about.get("target"),
            **said,
        }

    def _taps_of(self, moment: Moment) -> list[Tap]:
        """The taps that have something to show: an evaluation has no gradients."""
        return [tap for tap in self._taps if not (moment.evaluates and tap.site.is_gradient)]

    def _recorded_of(self, tap: Tap, targets: set[str]) -> set[str]:
        """The columns a resumed run has of a tap; none where some may be missing."""
        sites = {name: column.site for name, column in self._writer.columns.items() if column.site is not None}
        found = {name: site["port"] for name, site in sites.items() if site.get("tap") == tap.asked}
        if tap.site.is_gradient and tap.site.target is None:
            held = {port.partition("@")[2] for port in found.values()}
            return set(found) if targets and targets <= held else set()
        return set(found)
