"""Captures: one site's tensor for one batch, reduced to the rows that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tensortape.stores.patterns import Alias, SiteName, is_companion

from .anatomy import Stack
from .errors import BatchError, LayoutError
from .layouts import Layout, infer
from .reduce import at_positions, reduced
from .sampling import Sample
from .sites import Tap
from .streams import MAIN, Stream, table_of


@dataclass(frozen=True)
class Capture:
    """Rows [n, *feature] of a site in one batch, on the device they were computed on, and the table they belong to.

    Args:
        lengths: rows per example; None for exactly one.
        suffix: how the rows were reduced, or what else they are of the site.
        keys: the layout of the keys, where a row is a (query, key) pair.
        about: what else the run says of the column.
    """

    tap: Tap
    site: SiteName
    layout: Layout
    rows: torch.Tensor
    lengths: list[int] | None
    suffix: str | None = None
    keys: Layout | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[SiteName, str | None]:
        """What tells captures of one batch apart."""
        return self.site, self.suffix

    @property
    def column(self) -> str:
        """The column the rows go to."""
        name = f"{self.site}|{self.suffix}" if self.suffix else str(self.site)
        if self.tap.options.missing == "absent":
            return f"token.{self.site.path}/{name}"
        return f"{self._table}/{name}"

    @property
    def sample(self) -> Sample | None:
        """Which of the rows are stored, where not all are."""
        return self.tap.options.sample

    @property
    def owns_table(self) -> bool:
        """Whether the table is of rows that no stream of tokens has."""
        sampled = self.sample is not None and self.lengths is not None
        return self.tap.options.missing == "absent" or self.keys is not None or sampled

    @property
    def is_companion(self) -> bool:
        """Whether the rows only go with others of the site (a scale, which keys a query sees) rather than being its values."""
        return is_companion(self.site.port, self.suffix)

    @property
    def _table(self) -> str:
        if self.lengths is None:
            return "example"
        if self.keys is None:
            whole = table_of(self.layout.stream)
            return whole if self.sample is None else self.sample.table(whole)
        streams = self.layout.stream, self.keys.stream
        return "pair" if streams == (MAIN, MAIN) else f"pair.{streams[0]}.{streams[1]}"


@dataclass
class Pins:
    """What a recording has learnt of its sites: layouts, once known, hold for all later batches."""

    aliases: Mapping[SiteName, list[Alias]]
    stacks: Sequence[Stack] = ()
    layouts: dict[SiteName, Layout] = field(default_factory=dict)
    stored: dict[SiteName, str] = field(default_factory=dict)
    facts: dict[SiteName, dict[str, Any]] = field(default_factory=dict)

    def layout(self, tap: Tap, site: SiteName, tensor: torch.Tensor, streams: Mapping[str, Stream], rows: int) -> Layout:
        """The layout of a site's tensors."""
        if site not in self.layouts:
            asked = tap.options.pinned_layout
            self.layouts[site] = asked or infer(tuple(tensor.shape), rows, streams, str(site), **self._hints(site, streams))
        return self.layouts[site]

    def aliases_of(self, site: SiteName, *, cross: bool = False) -> list[Alias]:
        """What a site is in every architecture; attention by the block it is in."""
        if not site.is_attention:
            return self.aliases.get(site.value, [])
        found = [alias for stack in self.stacks for alias in _attention_of(stack, site, cross=cross)]
        return found[:1]

    def inside_block(self, site: SiteName) -> str:
        """The part of a site's path below its block; all of it outside of any."""
        paths = (block.path for stack in self.stacks for block in stack.blocks)
        return next((site.path.removeprefix(f"{path}.") for path in paths if site.path.startswith(f"{path}.")), site.path)

    def home(self, site: SiteName) -> str | None:
        """The stream of the stack that a site belongs to; None for a site of no stack."""
        stack = next((alias.stack for alias in self.aliases_of(site)), None)
        if stack is None:
            return None
        sides = [part for part in stack.split(".") if part in ("encoder", "decoder")]  # `decoder.bert.encoder` is a decoder's
        return "decoder" if sides[:1] == ["decoder"] else MAIN

    def check_targets(self, captures: Iterable[Capture]) -> None:
        """BatchError where a gradient's target is declared in another way than in the first batch: a column says it once."""
        for taken in captures:
            target = taken.about.get("target")
            if target is not None and self.facts.setdefault(taken.site, target) != target:
                was = self.facts[taken.site]["reduction"]
                raise BatchError(
                    f"the gradient at {taken.site} was recorded with reduction={was!r} first, and now with "
                    f"{target['reduction']!r}; declare the reduction in the same way for every batch"
                )

    def _hints(self, site: SiteName, streams: Mapping[str, Stream]) -> dict[str, str | None]:
        opens = site.path or "root"
        return {"home": self.home(site), "opens": None if opens in streams else opens}

    def stack(self, site: SiteName) -> str | None:
        """The stack whose residual stream the site is in; None for any other site."""
        return next((alias.stack for alias in self.aliases_of(site) if alias.layer is not None), None)

    def promote(self, captures: dict[tuple[SiteName, str | None], Capture], streams: dict[str, Stream]) -> None:
        """Where the call showed no tokens (images, features), make the first stack's stream, or else the first, the main one."""
        opened = [(key, taken.layout.stream) for key, taken in captures.items() if taken.layout.stream]
        opened = [(key, stream) for key, stream in opened if streams[stream].group == 1]  # windows are no sequence
        if MAIN in streams or not opened:
            return
        main = next((stream for key, stream in opened if self.stack(key[0]) is not None), opened[0][1])
        streams[MAIN] = streams.pop(main)
        self.layouts.update({site: _renamed(layout, main) for site, layout in self.layouts.items()})
        for key, taken in captures.items():
            keys = None if taken.keys is None else _renamed(taken.keys, main)
            captures[key] = replace(taken, layout=_renamed(taken.layout, main), keys=keys)


def capture(
    tap: Tap, site: SiteName, tensor: torch.Tensor, pins: Pins, streams: dict[str, Stream], rows: int, examples: int
) -> Capture:
    """Take the kept rows of a tensor; `streams` gains the stream that the tensor opens, if it does."""
    tensor = tensor.detach()
    layout = pins.layout(tap, site.value, tensor, streams, rows)
    if tensor.ndim < layout.least_axes:
        raise LayoutError(f"site {site} has the layout {str(layout)!r}, but gave a tensor of shape {list(tensor.shape)}")
    stream = _stream(layout, tensor, streams, str(site))
    if stream is None and len(tensor) != examples:
        raise LayoutError(f"site {site} has one row per example, but gave {len(tensor)} rows for {examples} examples")
    kept = layout.rows(tensor, stream)
    if tap.options.dtype is not None and not site.is_gradient and tap.options.project is None:
        # Gradients are added up first and scaled, and coordinates are computed from whole rows.
        kept = kept.to(getattr(torch, tap.options.dtype))
    lengths = None if stream is None else stream.lengths
    suffix: str | None = tap.options.reduce
    if tap.options.reduce is not None and lengths is not None:
        kept, lengths = reduced(kept, lengths, tap.options.reduce), None
    if tap.options.positions is not None and lengths is not None:
        suffix = f"positions={','.join(map(str, tap.options.positions))}"
        kept, lengths = at_positions(kept, lengths, tap.options.positions), None
    if tap.options.sample is not None and lengths is None:
        raise LayoutError(f"site {site} has one row per example, so sample_tokens= has no tokens to draw from")
    about, named = {}, [suffix]
    if tap.options.project is not None:
        about = {"projection": tap.options.project.said(str(site)), "computed": kept.dtype}
        kept, named = tap.options.project.coordinates(str(site), kept), [tap.options.project.name]
    if tap.options.sample is not None:
        about, named = {**about, "sample": tap.options.sample.to_json()}, [*named, tap.options.sample.name]
    return Capture(tap, site, layout, kept, lengths, "|".join(filter(None, named)) or None, about=about)


def _attention_of(stack: Stack, site: SiteName, *, cross: bool) -> Iterator[Alias]:
    """The alias of an attention call, by the block of the stack that it is in."""
    shared = len({block.path for block in stack.blocks}) < len(stack.blocks)
    for layer, block in enumerate(stack.blocks):
        inside = site.path == block.path or site.path.startswith(f"{block.path}.")
        if inside and (not shared or block.call == site.call):
            yield Alias(stack.name, "cross_attention" if cross else "attention", layer, len(stack.blocks))


def _renamed(layout: Layout, stream: str) -> Layout:
    """A layout on the stream that has become the main one."""
    return replace(layout, stream=MAIN) if layout.stream == stream else layout


def _stream(layout: Layout, tensor: torch.Tensor, streams: dict[str, Stream], site: str) -> Stream | None:
    if layout.kind == "example":
        return None
    rows, width = layout.axes(tensor)
    stream = streams.get(layout.stream)
    if stream is None:
        if width is None:
            raise LayoutError(f"site {site} has the layout {str(layout)!r}, but the width of stream {layout.stream!r} is not known")
        stream = streams[layout.stream] = Stream(rows, width)
    fits = (
        tensor.shape[0] in (stream.rows * stream.width, stream.kept)
        if width is None
        else (rows, width) == (stream.rows, stream.width)
    )
    if not fits:
        raise LayoutError(
            f"site {site} has the layout {str(layout)!r}, but gave a tensor of shape {list(tensor.shape)} in a batch of "
            f"{stream.rows} rows of {stream.width} positions"
        )
    return stream


def nonfinite_rows(rows: torch.Tensor) -> int:
    """How many rows hold NaN or infinity. One sum tells in the usual case that none does."""
    if (
        not rows.is_floating_point()
        or not rows.numel()
        or bool(torch.isfinite(rows.float().sum() if rows.itemsize == 1 else rows.sum()))
    ):
        return 0
    flat = rows.reshape(len(rows), -1)
    return int((~torch.isfinite(flat.float() if rows.itemsize == 1 else flat)).any(1).sum())
