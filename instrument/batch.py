"""One batch being recorded: what the taps show, until it is whole and goes to the writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from tensortape.stores import keys
from tensortape.stores.dtypes import Array, as_numpy
from tensortape.stores.names import split
from tensortape.stores.patterns import SiteName

from . import reached
from .attention.calls import AttentionCalls, size_of
from .attention.facts import Attended
from .cache_rows import CacheRows
from .calls import continued, decoder_stream, main_stream, unfinished, warn_of_positions, with_padding_mask
from .capture import Capture, Pins, capture
from .draws import Draws
from .errors import BatchError, ForwardError
from .gradients import added, split_scale
from .labels import label_columns
from .progress import Moment
from .residuals import split_residual
from .rows import Rows
from .sites import Tap
from .steps import Key, Step, merged
from .streams import MAIN, Stream, table_of
from .targets import Target
from .transfer import Transfer

DECODER = "decoder"
CONTENT = "content"  # in place of ids: a hash of each example's tokens


@dataclass(frozen=True)
class Given:
    """What the user says of a batch."""

    ids: Any
    labels: Mapping[str, Any]
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    generates: bool = False
    ends: int | Sequence[int] | None = None

    @property
    def examples(self) -> int | None:
        """Number of ids; None where the tokens themselves are to be hashed."""
        return None if isinstance(self.ids, str) or callable(self.ids) else len(self.ids)


@dataclass
class Batch:
    """Collects captures while the model runs. `recorded` is False where every example is in the run already."""

    given: Given
    model: nn.Module
    pins: Pins
    moment: Moment = field(default_factory=Moment)
    recorded: bool = True
    steps: list[Step] = field(default_factory=list)
    forwards: int = 0
    error: Exception | None = None
    target: Target = field(default_factory=Target)
    _labels: Any = None
    _gradients: dict[Key, Capture] = field(default_factory=dict)
    _graphless: set[SiteName] = field(default_factory=set)
    _attention: AttentionCalls = field(default_factory=AttentionCalls)
    _cache: CacheRows = field(default_factory=CacheRows)
    _closed: bool = False

    def ended(self) -> None:
        """The forward has ended."""
        self._cache.end()

    def label(self, name: str, values: Any) -> None:
        """Add a label while the batch runs, as `batch(labels=...)` does before."""
        self.given = replace(self.given, labels={**self.given.labels, name: values})

    def started(self, arguments: Mapping[str, Any]) -> int:
        """A forward of the model begins; gives its input rows."""
        self.forwards += 1
        if callable(self.given.ids):
            self.given = replace(self.given, ids=checked_ids(self.given.ids()))
        if self.forwards > 1 and not (self.given.generates or continued(arguments)):
            return 0
        self.steps.append(Step())
        self._cache.begin(arguments.get("past_key_values"))
        self._labels = arguments.get("labels")
        if self.forwards == 1 or arguments.get("encoder_outputs") is None:
            self._open_main(arguments)
        elif MAIN in self.steps[0].streams:
            self.steps[-1].streams[MAIN] = self.steps[0].streams[MAIN]
        return self._input_rows

    def decoder_started(self, arguments: Mapping[str, Any]) -> None:
        """The decoder of an encoder-decoder begins."""
        stream = decoder_stream(arguments, self._labels)
        if stream is not None and self._goes_on:
            self.steps[-1].streams[DECODER] = unfinished(self.model, self._earlier(DECODER), stream, self.given.ends)

    def widths(self) -> list[int]:
        """Positions of each stream of the present forward; none where the call has shown no tokens."""
        streams = self.steps[-1].streams if self.steps else {}
        main = streams.get(MAIN)
        shown = main is not None and (main.tokens is not None or main.mask is not None)
        return [stream.width for stream in streams.values()] if shown else []

    def captured(self, tap: Tap, site: SiteName, tensor: torch.Tensor) -> None:
        """A tapped tensor."""
        if self._goes_on:
            step = self.steps[-1]
            taken = capture(tap, site, tensor, self.pins, step.streams, self._input_rows, self._examples)
            step.captures[taken.key] = taken

    def attended(self, taps: Sequence[Tap], site: SiteName, attended: Attended) -> None:
        """An attention call."""
        if self._goes_on:
            streams = [step.streams for step in self.steps]
            cached = self._cache.is_there
            found = self._attention.captures(
                taps, site, attended, self.pins, streams, self._input_rows, cached=cached, segments=self._segments
            )
            self.steps[-1].captures.update({taken.key: taken for taken in found})

    def graded(self, tap: Tap, site: SiteName, gradient: torch.Tensor) -> None:
        """The gradient at a tapped tensor or an attention call, of the present target."""
        if self.error is not None or self._closed or site.target not in (None, self.target.name):
            return
        if len(self.steps) > 1:
            raise ForwardError("gradients cannot be recorded over several forwards of one batch; give the whole sequence in one")
        aimed = site.aimed(self.target.name)
        if site.is_attention:
            found = self._attention.gradients(tap, aimed, gradient)
        else:
            found = [capture(tap, aimed, gradient, self.pins, self.steps[-1].streams, self._input_rows, self._examples)]
        for taken in found:
            self._gradients[taken.key] = added(self._gradients.get(taken.key), taken, self.target, self._examples)

    def without_gradient(self, site: SiteName) -> None:
        """A gradient was asked for at a tensor that has none."""
        self._graphless.add(site)

    def failed(self, error: Exception) -> None:
        """Remember the first thing that went wrong in a hook."""
        self.error = self.error or error

    def whole(self) -> Step:
        """All forwards in one, gradients included; raises what went wrong in the batch, if anything."""
        if self.error is not None:
            raise self.error
        if self.forwards != len(self.steps) or not self.steps:
            raise ForwardError(
                f"the model ran {self.forwards} times in this batch context, but a batch is one forward of the recorded model; "
                + (
                    "call the model inside `with recorder.batch(...)`"
                    if not self.forwards
                    else "open a batch context for each forward, or say batch(forwards='generate') if they continue a cache"
                )
            )
        found = merged(self.steps)
        found.captures = {part.key: part for taken in found.captures.values() for part in split_residual(taken)}
        for taken in self._gradients.values():
            found.captures.update({part.key: part for part in split_scale(taken)})
        sizes = [size_of(taken) for taken in found.captures.values() if taken.keys is not None and not taken.site.is_gradient]
        found.captures.update({size.key: size for size in sizes})
        self._check_grid(found)
        return found

    def forget(self) -> None:
        """Let go of all captured tensors; what a later backward through the same graph shows is no longer of this batch."""
        self._closed = True
        self.steps.clear()
        self._gradients.clear()
        self._attention = AttentionCalls()

    def check(self, found: Step, taps: list[Tap], expected: set[Key] | None) -> None:
        """SiteNotFoundError unless the batch has every site it should have; `expected` are those of earlier batches."""
        reached.check(found.captures.keys(), taps, expected, self._graphless)
        if expected is None:
            self.pins.promote(found.captures, found.streams)

    def rows(self, found: Step, known: Mapping[str, Any]) -> Rows:
        """The batch for the writer. `known` tells what an absent column looks like: a row of zeros by column name."""
        ids = self._ids(found)
        said: dict[str, Any] = dict(_bookkeeping(found))
        columns = dict(said)
        lengths: dict[str, Any] = {table_of(name): stream.lengths for name, stream in found.streams.items()}
        transfer, draws = Transfer(), Draws(ids)
        for taken in map(draws.of, found.captures.values()):
            columns[taken.column] = transfer.bring(taken.column, taken.rows)
            if taken.owns_table:
                lengths[split(taken.column)[0]] = taken.lengths or [1] * len(ids)
        for column in known.keys() - columns.keys():
            columns[column], lengths[split(column)[0]] = known[column], [0] * len(ids)
        by_table = {table_of(name): stream for name, stream in found.streams.items()}
        labels = label_columns(self.given.labels, by_table, len(ids))
        columns.update({**labels, **draws.beside({**said, **labels})})
        used = {split(name)[0] for name, values in columns.items() if not isinstance(values, list)}
        return Rows(ids, columns, {name: lengths[name] for name in lengths if name in used}, transfer.arrived)

    @property
    def _goes_on(self) -> bool:
        """Whether what hooks show still belongs to a batch that can be recorded."""
        return self.error is None and self.forwards == len(self.steps)

    def _open_main(self, arguments: Mapping[str, Any]) -> None:
        given, first = self.given, self.forwards == 1
        if given.generates:
            arguments = with_padding_mask(arguments, sum(stream.width for stream in self._earlier(MAIN)))
        stream = main_stream(
            arguments,
            tokens=given.tokens if first else None,
            mask=given.mask if first else None,
            segments=given.segments if first else None,
            examples=self._expected_examples(arguments),
            continues=not first or continued(arguments),
        )
        if given.examples is None and (stream is None or stream.tokens is None):
            raise BatchError(
                "ids='content' hashes the tokens of each example, but this call shows none; give ids, or batch(tokens=...)"
            )
        if stream is None:
            return
        self.steps[-1].streams[MAIN] = unfinished(self.model, self._earlier(MAIN), stream, given.ends)
        if first:
            warn_of_positions(self.model, stream)
            self._check_examples(stream)

    def _earlier(self, name: str) -> list[Stream]:
        return [step.streams[name] for step in self.steps[:-1] if name in step.streams]

    def _segments(self, stream: Stream) -> list[torch.Tensor]:
        """The segment of each token, as the label token/segment gives it."""
        if "token/segment" not in self.given.labels:
            raise BatchError("reduce='flow' needs the segment of each token: batch(labels={'token/segment': ...}), -1 for none")
        segments = label_columns({"token/segment": self.given.labels["token/segment"]}, {MAIN: stream}, self._examples)
        return [torch.as_tensor(np.asarray(one)) for one in segments["token/segment"]]

    def _ids(self, found: Step) -> keys.Ids:
        if not isinstance(self.given.ids, str):
            return keys.normalise(self.given.ids)
        stream = found.streams.get(MAIN)
        if stream is None or stream.tokens is None:
            raise BatchError("ids='content' hashes the tokens of each example, but this batch has none; give ids")
        pieces = np.split(as_numpy(stream.pack(stream.tokens)), np.cumsum(stream.lengths)[:-1])
        return [keys.content_id(piece) for piece in pieces]

    @property
    def _input_rows(self) -> int:
        streams = self.steps[-1].streams if self.steps else {}
        stream = streams.get(MAIN) or streams.get(DECODER)
        return stream.rows // stream.group if stream is not None else self._examples

    @property
    def _examples(self) -> int:
        stream = self.steps[0].streams.get(MAIN) if self.steps else None
        return self.given.examples or (len(stream.lengths) if stream is not None else 0)

    def _expected_examples(self, arguments: Mapping[str, Any]) -> int:
        if self.given.examples is not None:
            return self.given.examples
        first = next((value for value in arguments.values() if isinstance(value, torch.Tensor) and value.ndim), None)
        return 0 if first is None else len(first)

    def _check_examples(self, stream: Stream) -> None:
        count = self.given.examples
        if count is not None and count != len(stream.lengths):
            raise BatchError(
                f"{count} ids were given for a batch of {len(stream.lengths)} examples ({stream.rows} rows of {stream.width} "
                "positions); give one id per example. Rows that hold several examples need position_ids that start anew with each, "
                "or batch(segments=...)"
            )

    def _check_grid(self, found: Step) -> None:
        """A mask or tokens that no captured tensor has the width of were meant for something else."""
        given = self.given.mask is not None or self.given.tokens is not None
        streams = {taken.layout.stream for taken in found.captures.values() if taken.layout.stream}
        if given and streams and MAIN not in streams:
            stream, other = found.streams[MAIN], found.streams[min(streams)]
            raise BatchError(
                f"the mask or tokens given are for {stream.rows} rows of {stream.width} positions, but what was captured has "
                f"{other.rows} rows of {other.width}"
            )


def checked_ids(ids: Any) -> Any:
    """Ids as the writer takes them; "content", and a function that gives them once the forward begins, as they are."""
    if callable(ids):
        return ids
    if ids is None:
        raise BatchError("ids are missing: every example needs one, text or an integer; or ids='content' to hash its tokens")
    if isinstance(ids, str):
        if ids != CONTENT:
            raise BatchError(f"ids must be one per example, or 'content'; got {ids!r}")
        return ids
    found = keys.normalise(ids)
    keys.check_unique(found)
    if not found:
        raise BatchError("a batch needs at least one example; got no ids")
    return found


def _bookkeeping(found: Step) -> dict[str, Array]:
    """Tokens and positions of every stream that has them."""
    columns = {}
    for name, stream in found.streams.items():
        if stream.tokens is not None:
            columns[f"{table_of(name)}/input_ids"] = as_numpy(stream.pack(stream.tokens))
        if stream.tokens is not None or stream.mask is not None:
            columns[f"{table_of(name)}/position"] = _positions(stream)
    return columns


def _positions(stream: Stream) -> Array:
    """The model's own position ids where it was given any, else the place of a token in its example; int64 [kept]."""
    if stream.positions is not None:
        return as_numpy(stream.pack(stream.positions.contiguous())).astype(np.int64, copy=False)
    return np.concatenate([np.arange(length) for length in stream.lengths] or [np.empty(0, np.int64)])
