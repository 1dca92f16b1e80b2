"""Data on its way through a model, batch by batch: texts, or what a loader gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import tee
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from tensortape.stores.held import Held

from .arguments import parameters_of
from .corpus import Corpus
from .differentiation import differentiate
from .errors import BatchError
from .modules import unwrapped
from .recorder import Recorder
from .room import Room
from .streams import MAIN
from .targets import Targets
from .texts import Example, batches, labels_of, pad_id, padded


@dataclass(frozen=True)
class Turn:
    """One batch.

    Args:
        ids, labels: for `Recorder.batch`.
        entries: gives everything in the batch, on the model's device.
        withheld: names of entries that are not for the model.
        amount: how much of the data this is.
        left: gives how much more is to come, in the same unit; None where that is not known.
    """

    ids: Any
    labels: Mapping[str, Any]
    entries: Callable[[], Mapping[str, Any]]
    withheld: frozenset[str]
    amount: int
    left: Callable[[], float | None]


class Reading(Protocol):
    """What a recording reads."""

    @property
    def unit(self) -> str:
        """What it is counted in."""

    @property
    def total(self) -> int | None:
        """How many there are, where that is known."""

    def turns(self, recorded: Held) -> Iterator[Turn]:
        """All batches; `recorded` is what the run holds already."""


def read(
    reading: Reading,
    model: nn.Module,
    recorder: Recorder,
    targets: Targets,
    *,
    room: Room,
    progress: bool | None,
    most: int | None = None,
) -> None:
    """Run the model over everything, or until `most` tokens are recorded."""
    with _bar(progress, reading.unit, reading.total) as bar:
        for turn in reading.turns(recorder.writer.committed_ids):
            with recorder.batch(ids=turn.ids, labels=turn.labels, targets=targets) as batch:
                if batch.recorded:
                    entries = turn.entries()
                    inputs = {key: value for key, value in entries.items() if key not in turn.withheld}
                    if targets:
                        differentiate(recorder, batch, model, inputs, targets, entries)
                    else:
                        model(**inputs)
            if batch.recorded:
                room.check(turn.amount, turn.left)
            bar.update(turn.amount)
            if most is not None and _tokens(recorder) >= most:
                return


@dataclass
class TextReading:
    """Texts, in batches of about one size. See `record` for the arguments."""

    model: nn.Module
    corpus: Corpus
    content: bool
    batch_tokens: int
    batch_size: int | None
    keep_text: bool
    unit: str = "token"
    total: int | None = None

    def turns(self, recorded: Held) -> Iterator[Turn]:
        """All batches."""
        left = None if self.content and len(recorded) else self.corpus.left(recorded)  # which texts hashes are of is not known
        for group in batches(self.corpus.examples(), self.batch_tokens, self.batch_size):
            yield self._turn(group, left)

    def _turn(self, group: list[Example], left: list[str] | None) -> Turn:
        tokens = sum(len(example.tokens) for example in group)
        return Turn(
            ids="content" if self.content else [example.id for example in group],
            labels=labels_of(group, keep_text=self.keep_text),
            entries=lambda: padded(group, pad_id(self.corpus.tokenizer), device_of(self.model)),
            withheld=frozenset(),
            amount=tokens,
            left=lambda: None if left is None else self.corpus.expected_tokens(left, group) - tokens,
        )


@dataclass
class LoaderReading:
    """Dicts of a model's arguments. `ids` and `labels` name their keys."""

    model: nn.Module
    data: Iterable[Any]
    ids: Any
    labels: Mapping[str, str]
    unit: str = "batch"

    def __post_init__(self) -> None:
        if not isinstance(self.ids, str):
            raise BatchError(
                "ids are missing: name the key of the loader's dicts that holds them (ids='id'), or pass ids='content'"
            )

    @cached_property
    def total(self) -> int | None:
        """Number of batches where the loader knows it; one over a stream has a length only in name."""
        try:
            return len(self.data)  # type: ignore[arg-type]
        except TypeError:
            return None

    def turns(self, recorded: Held) -> Iterator[Turn]:
        """All batches."""
        number, device = 0, device_of(self.model)
        withheld = frozenset({self.ids, *self.labels.values()} - parameters_of(unwrapped(self.model)))
        for number, entries in enumerate(self.data, start=1):
            yield self._turn(entries, number, withheld, device)
        if not number:
            raise BatchError("there is nothing to record: the loader gave no batch")

    def _turn(self, entries: Any, number: int, withheld: frozenset[str], device: torch.device) -> Turn:
        if not isinstance(entries, Mapping):
            raise BatchError(f"a loader must give dicts of the model's arguments; got {type(entries).__name__}")
        return Turn(
            ids=self.ids if self.ids == "content" else _entry(entries, self.ids),
            labels={name: _entry(entries, key) for name, key in self.labels.items()},
            entries=lambda: {key: _moved(value, device) for key, value in entries.items()},
            withheld=withheld,
            amount=1,
            left=lambda: None if self.total is None else self.total - number,
        )


def twice(data: Any) -> tuple[Any, Any]:
    """Data to be read two times from the beginning; of an iterator, what only the first reading has seen is held."""
    if not isinstance(data, Iterator):
        return data, data
    first, second = tee(data)
    return first, second


def device_of(model: nn.Module) -> torch.device:
    """Where batches go: the device of the input embedding (with layers on several devices, the first)."""
    embedding = getattr(unwrapped(model), "get_input_embeddings", lambda: None)()
    source = embedding if isinstance(embedding, nn.Module) else model
    return next((parameter.device for parameter in source.parameters()), torch.device("cpu"))


def _tokens(recorder: Recorder) -> int:
    """Recorded so far, in the longest table."""
    return max((rows for table, rows in recorder.writer.rows.items() if table.startswith(MAIN)), default=0)


def _entry(entries: Mapping[str, Any], key: str) -> Any:
    if key not in entries:
        raise BatchError(f"the loader's dicts have no key {key!r}; they have {', '.join(map(str, entries))}")
    return entries[key]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _bar(progress: bool | None, unit: str, total: int | None = None) -> Any:
    """A progress bar; None lets tqdm show it on a terminal only."""
    return tqdm(total=total, unit=unit, unit_scale=unit == "token", disable=None if progress is None else not progress)
