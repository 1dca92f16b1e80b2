"""One batch being recorded: what the taps show, until it is whole and goes to the writer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from tensortape.stores import keys
from tensortape.stores.dtypes import Array, as_numpy
from tensortape.stores.names import is_ragged, split
from tensortape.stores.patterns import SiteName
from tensortape.stores.ragged import Lengths

from .calls import decoder_stream, main_stream, warn_of_positions
from .capture import Capture, Pins, capture, nonfinite_rows
from .errors import BatchError, ForwardError, SiteNotFoundError
from .labels import label_columns
from .sites import Tap
from .streams import MAIN, Stream, table_of

DECODER = "decoder"
Key = tuple[SiteName, str | None]  # a site, and how it is reduced


@dataclass(frozen=True)
class Given:
    """What the user says of a batch."""

    ids: Any
    labels: Mapping[str, Any]
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    @property
    def examples(self) -> int | None:
        """Number of ids; None where the tokens themselves are to be hashed."""
        return None if isinstance(self.ids, str) else len(self.ids)


@dataclass(frozen=True)
class Rows:
    """A whole batch, as the writer takes it."""

    ids: keys.Ids
    columns: dict[str, Any]
    lengths: Lengths
    nonfinite: dict[str, int]


@dataclass
class Batch:
    """Collects captures while the model runs. `recorded` is False where every example is in the run already."""

    given: Given
    model: nn.Module
    pins: Pins
    recorded: bool = True
    captures: dict[Key, Capture] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    forwards: int = 0
    error: Exception | None = None
    _labels: Any = None

    def started(self, arguments: Mapping[str, Any]) -> None:
        """A forward of the model begins."""
        self.forwards += 1
        if self.forwards > 1:
            return
        self._labels = arguments.get("labels")
        given = self.given
        stream = main_stream(
            arguments, tokens=given.tokens, mask=given.mask, segments=given.segments, examples=self._expected_examples(arguments)
        )
        if given.examples is None and (stream is None or stream.tokens is None):
            raise BatchError(
                "ids='content' hashes the tokens of each example, but this call shows none; give ids, or batch(tokens=...)"
            )
        if stream is not None:
            self.streams[MAIN] = stream
            warn_of_positions(self.model, stream)
        self._check_examples(stream)

    def decoder_started(self, arguments: Mapping[str, Any]) -> None:
        """The decoder of an encoder-decoder begins."""
        stream = decoder_stream(arguments, self._labels)
        if stream is not None and self.forwards == 1:
            self.streams[DECODER] = stream

    def captured(self, tap: Tap, site: SiteName, tensor: torch.Tensor) -> None:
        """A tapped tensor."""
        if self.forwards == 1 and self.error is None:
            taken = capture(tap, site, tensor, self.pins, self.streams, self._input_rows, self._examples)
            self.captures[site, tap.options.reduce] = taken

    def failed(self, error: Exception) -> None:
        """Remember the first thing that went wrong in a hook."""
        self.error = self.error or error

    def check(self, taps: list[Tap], expected: set[Key] | None) -> None:
        """Raise what went wrong in the batch, if anything; `expected` are the sites of earlier batches."""
        if self.error is not None:
            raise self.error
        if self.forwards != 1:
            raise ForwardError(
                f"the model ran {self.forwards} times in this batch context, but a batch is one forward of the recorded model; "
                + (
                    "call the model inside `with recorder.batch(...)`"
                    if not self.forwards
                    else "open a batch context for each forward"
                )
            )
        self._check_grid()
        if expected is None:
            self._check_first(taps)
            self.pins.promote(self.captures, self.streams)
        else:
            self._check_same(taps, expected)

    def rows(self, known: Mapping[str, Any]) -> Rows:
        """The batch for the writer. `known` tells what an absent column looks like: a row of zeros by column name."""
        ids = self._ids()
        columns: dict[str, Any] = dict(self._bookkeeping())
        lengths: dict[str, Any] = {table_of(name): stream.lengths for name, stream in self.streams.items()}
        nonfinite = {}
        for taken in self.captures.values():
            columns[taken.column] = as_numpy(taken.rows)
            nonfinite[taken.column] = nonfinite_rows(taken.rows)
            if taken.tap.options.missing == "absent":
                lengths[split(taken.column)[0]] = taken.lengths or [1] * len(ids)
        for column in known.keys() - columns.keys():
            columns[column], lengths[split(column)[0]] = known[column], [0] * len(ids)
        by_table = {table_of(name): stream for name, stream in self.streams.items()}
        columns.update(label_columns(self.given.labels, by_table, len(ids)))
        used = {split(name)[0] for name, values in columns.items() if not isinstance(values, list)}
        return Rows(ids, columns, {name: lengths[name] for name in lengths if name in used}, nonfinite)

    def _ids(self) -> keys.Ids:
        if not isinstance(self.given.ids, str):
            return keys.normalise(self.given.ids)
        stream = self.streams.get(MAIN)
        if stream is None or stream.tokens is None:
            raise BatchError("ids='content' hashes the tokens of each example, but this batch has none; give ids")
        pieces = np.split(as_numpy(stream.pack(stream.tokens)), np.cumsum(stream.lengths)[:-1])
        return [keys.content_id(piece) for piece in pieces]

    def _bookkeeping(self) -> dict[str, Array]:
        """Tokens and positions of every stream that has them."""
        found = {}
        for name, stream in self.streams.items():
            if stream.tokens is not None:
                found[f"{table_of(name)}/input_ids"] = as_numpy(stream.pack(stream.tokens))
            if stream.tokens is not None or stream.mask is not None:
                found[f"{table_of(name)}/position"] = _positions(stream)
        return found

    @property
    def _input_rows(self) -> int:
        stream = self.streams.get(MAIN) or self.streams.get(DECODER)
        return stream.rows if stream is not None else self._examples

    @property
    def _examples(self) -> int:
        stream = self.streams.get(MAIN)
        return self.given.examples or (len(stream.lengths) if stream is not None else 0)

    def _expected_examples(self, arguments: Mapping[str, Any]) -> int:
        if self.given.examples is not None:
            return self.given.examples
        first = next((value for value in arguments.values() if isinstance(value, torch.Tensor) and value.ndim), None)
        return 0 if first is None else len(first)

    def _check_examples(self, stream: Stream | None) -> None:
        count = self.given.examples
        if stream is not None and count is not None and count != len(stream.lengths):
            raise BatchError(
                f"{count} ids were given for a batch of {len(stream.lengths)} examples ({stream.rows} rows of {stream.width} "
                "positions); give one id per example. Rows that hold several examples need position_ids that start anew with each, "
                "or batch(segments=...)"
            )

    def _check_grid(self) -> None:
        """A mask or tokens that no captured tensor has the width of were meant for something else."""
        given = self.given.mask is not None or self.given.tokens is not None
        streams = {taken.layout.stream for taken in self.captures.values() if taken.layout.stream}
        if given and streams and MAIN not in streams:
            stream, other = self.streams[MAIN], self.streams[min(streams)]
            raise BatchError(
                f"the mask or tokens given are for {stream.rows} rows of {stream.width} positions, but what was captured has "
                f"{other.rows} rows of {other.width}"
            )

    def _check_first(self, taps: list[Tap]) -> None:
        reached = {(site.path, site.port) for site, _ in self.captures}
        calls = {(site.path, site.port, site.call) for site, _ in self.captures}
        for tap in taps:
            if (tap.path, tap.port) not in reached if tap.call is None else (tap.path, tap.port, tap.call) not in calls:
                raise SiteNotFoundError(
                    f"site {tap.name(tap.call or 1)} was never reached by the forward: the module was not called"
                    + (f" {tap.call} times" if tap.call else "")
                    + " (some modules only hold weights that their parent uses); choose another site"
                )

    def _check_same(self, taps: list[Tap], expected: set[Key]) -> None:
        optional = {(tap.path, tap.port) for tap in taps if tap.options.missing == "absent"}
        missing = sorted(str(site) for site, _ in expected - self.captures.keys() if (site.path, site.port) not in optional)
        new = sorted(str(site) for site, _ in self.captures.keys() - expected)
        if missing or new:
            what = f"did not run: {', '.join(missing)}" if missing else f"ran for the first time: {', '.join(new)}"
            raise SiteNotFoundError(
                f"unlike in the first batch, some sites {what}; Site(..., missing='absent') records sites that do not always run"
            )


def keep(rows: Rows, wanted: Array) -> Rows:
    """Only some examples of a batch; `wanted` is a mask over its examples."""
    chosen = np.flatnonzero(wanted)
    tokens = {table: np.repeat(wanted, lengths) for table, lengths in rows.lengths.items()}
    columns = {}
    for name, values in rows.columns.items():
        table = split(name)[0]
        packed = is_ragged(table) and not isinstance(values, list)
        columns[name] = values[tokens[table]] if packed else [values[number] for number in chosen]
    lengths = {table: np.asarray(counts)[chosen] for table, counts in rows.lengths.items()}
    nonfinite = {name: _nonfinite(columns[name]) if count else 0 for name, count in rows.nonfinite.items()}
    return Rows([rows.ids[number] for number in chosen], columns, lengths, nonfinite)  # type: ignore[arg-type]


def _nonfinite(rows: Any) -> int:
    found = np.asarray(rows)
    return int((~np.isfinite(found.reshape(len(found), -1).astype(np.float64))).any(1).sum())


def _positions(stream: Stream) -> Array:
    """The model's own position ids where it was given any, else the place of a token in its example; int64 [kept]."""
    if stream.positions is not None:
        return as_numpy(stream.pack(stream.positions.contiguous())).astype(np.int64, copy=False)
    return np.concatenate([np.arange(length) for length in stream.lengths] or [np.empty(0, np.int64)])
