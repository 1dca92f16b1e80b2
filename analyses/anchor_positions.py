"""Where the label words of demonstrations stand, found by their template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tensortape.stores import Run
from tensortape.stores.chosen_rows import ChosenRows
from tensortape.stores.dtypes import Array

from .errors import AnchorError
from .results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

By = Literal["word", "appearance"]


@dataclass(frozen=True, eq=False, repr=False)
class AnchorPositions(Result):
    """Label words p_1 ... p_C of the demonstrations of each prompt, and the target position q behind them.

    Args:
        labels: names of the label words. tokens: the token id of each.
        examples: numbers of the run's examples with a label word before a target, ascending; int64 [n].
        targets: q of each; int64 [n].
        ends: where each example's entries end in the next two; int64 [n].
        positions: of the label words, one example after another, ascending; int64 [m].
        words: which label word each is; int64 [m].
        by: what a class is: a label `word`, or the word that is the first, the second, ... to appear in its example, where every
            example has label words of its own.
        left_out: how many examples of the run have no label word before a target.
        table: whose rows positions count.

    Raises:
        AnchorError: a label word that does not stand before its target, or arrays that do not fit one another.
    """

    labels: tuple[str, ...]
    tokens: tuple[int, ...]
    examples: Array
    targets: Array
    ends: Array
    positions: Array
    words: Array
    by: By = "word"
    left_out: int = 0
    table: str = "token"

    def __post_init__(self) -> None:
        if not len(self.examples) == len(self.targets) == len(self.ends) or len(self.positions) != len(self.words):
            raise AnchorError("examples, targets and ends have one entry per example, positions and words one per label word")
        if len(self.ends) and (self.ends[-1] != len(self.positions) or (np.diff(self.ends, prepend=0) < 1).any()):
            raise AnchorError("every example has at least one label word, and `ends` says where its label words end")
        if (self.positions < 0).any() or (self.positions >= self.targets[self.owner]).any():
            raise AnchorError("label words stand before the target of their example, at positions from 0 on")

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[tuple[int, Array, Array, int]]:
        """(example, positions, classes, target) of every prompt."""
        begins = self.ends - self.counts
        for number, (begin, end) in enumerate(zip(begins.tolist(), self.ends.tolist(), strict=True)):
            yield int(self.examples[number]), self.positions[begin:end], self.classes[begin:end], int(self.targets[number])

    @cached_property
    def counts(self) -> Array:
        """Label words of each example, C; int64 [n]."""
        return np.diff(self.ends, prepend=0)

    @cached_property
    def owner(self) -> Array:
        """The example, 0 to n - 1, of each label word; int64 [m]."""
        return np.repeat(np.arange(len(self)), self.counts)

    @cached_property
    def classes(self) -> Array:
        """The class of each label word; int64 [m]."""
        if self.by == "word":
            return self.words
        order = self._appearance
        found: Array = order[self.owner, self.words]
        return found

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        if self.by == "word":
            return self.labels
        return tuple(f"label {number + 1}" for number in range(int(self.classes.max(initial=-1)) + 1))

    def classify(self, run: Run, given: str | Sequence[Any] | Array) -> Array:
        """The class, int64 [n], of each example's label word: a column, or one entry per example of the run; -1 for any other word.

        Entries are token ids, or names of label words.

        Raises:
            AnchorError: as many entries as the run has no examples.
        """
        kind = object if isinstance(given, (list, tuple)) else None  # names and ids may be mixed
        values = np.asarray(run[given].rows() if isinstance(given, str) else given, kind)
        if len(values) != len(run):
            raise AnchorError(f"label words are given for {len(values)} examples, but the run has {len(run)}; give one for each")
        known: Mapping[Any, int] = {key: n for n, pair in enumerate(zip(self.labels, self.tokens, strict=True)) for key in pair}
        words = np.array([known.get(value, -1) for value in values[self.examples].tolist()], np.int64)
        if self.by == "word":
            return words
        return np.where(words >= 0, self._appearance[np.arange(len(self)), words], -1)

    def part(self, start: int, stop: int) -> AnchorPositions:
        """Those of prompts [start, stop)."""
        begins = self.ends - self.counts
        first, last = (int(begins[start]), int(self.ends[stop - 1])) if start < stop else (0, 0)
        return replace(
            self,
            examples=self.examples[start:stop],
            targets=self.targets[start:stop],
            ends=self.ends[start:stop] - first,
            positions=self.positions[first:last],
            words=self.words[first:last],
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per label word: example, position, word, class, and the example's target."""
        import pandas as pd

        columns = {
            "example": self.examples[self.owner],
            "position": self.positions,
            "word": np.array(self.labels, object)[self.words],
            "class": np.array(self.class_names, object)[self.classes],
            "target": self.targets[self.owner],
        }
        return pd.DataFrame(columns)

    def plot(self) -> Figure:
        """Positions of label words and targets of the first examples. Needs the extra `plots`."""
        from .figures.anchors import positions_figure

        return positions_figure(self)

    def __repr__(self) -> str:
        most = f"{self.counts.min()} to {self.counts.max()}" if len(self) else "no"
        return f"<AnchorPositions: {most} label words ({', '.join(self.labels)}) in {len(self)} examples, {self.left_out} left out>"

    @cached_property
    def _appearance(self) -> Array:
        """The how-manieth each label word is to appear in each example, -1 where it does not; int64 [n, words]."""
        first = np.full((len(self), len(self.labels)), np.iinfo(np.int64).max)
        np.minimum.at(first, (self.owner, self.words), self.positions)
        rank = first.argsort(1, kind="stable").argsort(1, kind="stable")
        return np.where(first < np.iinfo(np.int64).max, rank, -1)


def anchor_positions(
    run: Run,
    labels: Mapping[str, int],
    *,
    prefix: Sequence[int] = (),
    target: Literal["last", "prefix"] = "last",
    by: By = "word",
    table: str = "token",
) -> AnchorPositions:
    """Find label words and target positions in prompts of demonstrations.

    Args:
        run: with `input_ids`.
        labels: label words and the id of each one's (first) token.
        prefix: token ids that a label word must follow, such as those of `Sentiment:`; without one, every label word counts.
        target: where the label of the query is to come: the `last` token, or the last token of the last `prefix`.
        by: see `AnchorPositions`.
        table: of the tokens; `token.decoder` for the decoder of a model that has both.

    Raises:
        AnchorError: no label words, two that begin with the same token, or none found.
    """
    tokens = np.array(list(labels.values()), np.int64)
    if not len(tokens) or len(set(tokens.tolist())) < len(tokens):
        raise AnchorError(f"label words need a token each, and each its own; got {dict(labels)}")
    if target not in ("last", "prefix") or by not in ("word", "appearance"):
        raise ValueError(f"target is 'last' or 'prefix' and by is 'word' or 'appearance'; got {target!r} and {by!r}")
    if target == "prefix" and not len(prefix):
        raise AnchorError("target='prefix' needs the prefix that the query's label would follow")
    column = run.tables[table]["input_ids"]
    examples = column.present
    lengths = column.lengths[examples]
    ids = ChosenRows(column, examples).between(0, int(lengths.sum()))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ending = _endings(ids, place, prefix)
    goals = lengths - 1 if target == "last" else _last(place, owner, ending, len(lengths))
    after = np.roll(ending, 1) & (place > 0) if len(prefix) else ending
    found = np.flatnonzero(np.isin(ids, tokens) & after & (place < goals[owner]))
    counts = np.bincount(owner[found], minlength=len(lengths))
    if not counts.any():
        raise AnchorError(_nothing(labels, prefix, ids))
    order = tokens.argsort()
    return AnchorPositions(
        tuple(labels),
        tuple(tokens.tolist()),
        np.flatnonzero(examples)[counts > 0],
        goals[counts > 0],
        np.cumsum(counts[counts > 0]),
        place[found],
        order[np.searchsorted(tokens[order], ids[found])],
        by,
        int(len(run) - (counts > 0).sum()),
        table,
    )


def _endings(ids: Array, place: Array, prefix: Sequence[int]) -> Array:
    """Whether the last tokens of each row's example, up to the row itself, are the prefix; bool."""
    found: Array = place >= len(prefix) - 1
    for back, token in enumerate(reversed(prefix)):
        found = found & (np.roll(ids, back) == token)
    return found


def _last(place: Array, owner: Array, chosen: Array, count: int) -> Array:
    """The last chosen place of each example, -1 where there is none; int64 [count]."""
    found = np.full(count, -1)
    np.maximum.at(found, owner[chosen], place[chosen])
    return found


def _nothing(labels: Mapping[str, int], prefix: Sequence[int], ids: Array) -> str:
    words = ", ".join(f"{word!r} ({token}: {int((ids == token).sum())} times)" for word, token in labels.items())
    behind = f" behind the tokens {list(prefix)}" if len(prefix) else ""
    return (
        f"no label word stands{behind} before the target of any example; the recorded tokens hold {words}. Words are tokens of the "
        "model's own tokenizer, often with the space before them"
    )
