"""Several classifications of the same rows, fitted and tested site by site."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from operator import add
from typing import Literal

import numpy as np

from tensortape.stores import Column
from tensortape.stores.dtypes import Array

from . import closed, logistic
from .gram import ClassSums, ClassTotals, Gram, Sums, shift_of
from .rows import Rows
from .spaces import Labels, Space
from .splits import Split
from .sweep import Job, sweep
from .tasks import Probe, Selection, Task
from .trials import GROUP, Trial, Trials

Kind = Literal["exact", "lda", "ridge"]


@dataclass(frozen=True)
class Manner:
    """How to fit: which classifier, with what penalty, by whom, and whether sums are kept in the run."""

    kind: Kind = "exact"
    strength: float = 1.0
    executor: Executor | None = None
    keep: bool = True


@dataclass
class Study:
    """Tasks on the rows of a space, which a split cuts into cells. `tags`: what is known of each row."""

    space: Space
    split: Split
    tags: dict[str, Array]
    tasks: list[Task] = field(default_factory=list)

    def add(self, name: str, labels: Labels, like: str) -> slice:
        """Tasks for labels, one for each fold; `like` is the tag of labels missing on the same rows. Where they are in `tasks`."""
        self.tags[name] = labels.of_row
        classes, folds = len(labels.classes), self.split.folds
        return self._add(Task(name, classes, Selection(like, trained), Selection(like, tested)) for trained, tested in folds)

    def add_code(self, name: str, labels: Labels) -> slice:
        """Tasks for an online code: each block of the training rows is tested on after training on those before it."""
        blocks, classes = self.split.blocks, len(labels.classes)
        pairs = [(Selection(name, blocks[:n]), Selection(name, (blocks[n],))) for n in range(1, len(blocks))]
        return self._add(Task(name, classes, *pair, Selection(name, blocks), penalise_bias=True) for pair in pairs)

    def fit(self, column: Column, manner: Manner) -> list[tuple[Probe, Trial]]:
        """Every task's probe of one column, and how it does."""
        labelled = np.logical_or.reduce([self.tags[task.labels] >= 0 for task in self.tasks])
        rows = self.space.rows([column], self.tags, None if labelled.all() else labelled)
        shift = shift_of(rows.first_block())
        sums, classes = self._sums(rows, shift, manner)
        if manner.kind == "exact":
            counts = [int(task.trained.rows(self.tags).sum()) for task in self.tasks]
            scales = [
                logistic.Coordinates(one, manner.strength / count, task.width)
                for task, count, one in zip(self.tasks, counts, sums, strict=True)
            ]
            fits = [logistic.Fit(*one) for one in zip(self.tasks, counts, scales, strict=True)]
            probes = logistic.fit(rows, fits, shift, manner.executor)
        else:
            probes = [_closed(manner, *one) for one in zip(sums, classes, strict=True)]
        tests = Trials(self.tasks, probes, shift, int(self.tags[GROUP].max()) + 1)
        [[tested]] = sweep([Job(rows, (tests,))], manner.executor, title="trying")
        return list(zip(probes, tested, strict=True))

    def _sums(self, rows: Rows, shift: Array, manner: Manner) -> tuple[list[Sums], list[ClassTotals]]:
        """Of each task: sums of the rows that scale it and, for closed forms, of the classes of those it is trained on."""
        atoms = [self._atoms(task.scaled or task.trained) for task in self.tasks]
        grams = [Gram(shift, atom, rows.key("gram", atom.rows(self.tags), shift)) for atom in dict.fromkeys(chain(*atoms))]
        wanted = [] if manner.kind == "exact" else self.tasks
        classes = [ClassSums(shift, task.labels, task.classes, task.trained) for task in wanted]
        kept = self.space.run.derived if manner.keep else None
        [found] = sweep([Job(rows, (*grams, *classes))], manner.executor, kept=kept, title="summing")
        by_atom = {gram.selection: one for gram, one in zip(grams, found, strict=False)}
        return [reduce(add, (by_atom[atom] for atom in some)) for some in atoms], found[len(grams) :]

    def _atoms(self, selection: Selection) -> list[Selection]:
        """Selections that make up one; folds share those of the cells."""
        if len(self.split.folds) == 1 or selection.cells is None:
            return [selection]
        return [Selection(selection.labels, (cell,)) for cell in selection.cells]

    def _add(self, tasks: Iterable[Task]) -> slice:
        start = len(self.tasks)
        self.tasks.extend(tasks)
        return slice(start, len(self.tasks))


def _closed(manner: Manner, sums: Sums, classes: ClassTotals) -> Probe:
    return closed.lda(sums, classes) if manner.kind == "lda" else closed.ridge(sums, classes, manner.strength)
