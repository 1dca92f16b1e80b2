"""Whose tokens the queries and keys of an attention call are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tensortape.stores.patterns import SiteName

from ..capture import Pins
from ..errors import AttentionError
from ..layouts import Layout
from ..streams import MAIN, Stream, joined
from .facts import Attended
from .spans import Call, aligned

_CROSS = re.compile(r"(?i)(.*cross.*|enc_?dec.*|encoder_attn|multihead_attn)")
Streams = dict[str, Stream]


def place(
    site: SiteName, attended: Attended, pins: Pins, steps: Sequence[Streams], examples: int, *, cached: bool
) -> tuple[Call, tuple[Layout, Layout]]:
    """The call with its streams, and the layouts of queries and keys.

    Args:
        site: the call's site; its port does not matter.
        steps: streams of each forward of the batch so far; the last gains those that the call opens.
        cached: whether this forward continues, or fills, a cache of keys.
    """
    queries = _of_queries(site, attended, pins, steps[-1], examples)
    keys, cross = _of_keys(site, attended, steps[-1], queries, cached=cached)
    layouts = Layout("example token", queries), Layout("example token", keys)
    pins.layouts[_end(site, "q")], pins.layouts[_end(site, "k")] = layouts
    every = steps[-1][keys] if cross else joined([step[keys] for step in steps if keys in step])
    return aligned(attended, steps[-1][queries], every, cross=cross), layouts


def _of_queries(site: SiteName, attended: Attended, pins: Pins, streams: Streams, examples: int) -> str:
    rows, _, width, _ = attended.shape
    pinned = pins.layouts.get(_end(site, "q"))
    if pinned is not None and (pinned.stream in streams or pinned.stream != MAIN):
        return _open(pinned.stream, rows, width, streams, examples, site)
    fitting = _fitting(streams, rows, width)
    home = pins.home(site)
    if home in fitting:
        return home
    if len(fitting) > 1:
        raise AttentionError(f"attention of {site.path!r}: its queries fit several streams of tokens ({', '.join(fitting)})")
    return fitting[0] if fitting else _open(site.path or "root", rows, width, streams, examples, site)


def _of_keys(site: SiteName, attended: Attended, streams: Streams, queries: str, *, cached: bool) -> tuple[str, bool]:
    """The stream of the keys, and whether it is another than that of the queries."""
    rows, _, width, count = attended.shape
    count -= attended.extra_keys
    others = [name for name in _fitting(streams, rows, count) if name != queries]
    by_name = _CROSS.fullmatch(site.path.rpartition(".")[2]) is not None
    same = attended.cross is False or (attended.cross is None and (count == width or (cached and not others)))
    if same and not (by_name and others):
        return queries, False
    if attended.cross is None and cached and not by_name:
        return queries, False
    name = others[0] if others else f"{site.path}.keys"
    streams.setdefault(name, Stream(rows, count))
    return name, True


def _open(name: str, rows: int, width: int, streams: Streams, examples: int, site: SiteName) -> str:
    if name not in streams:
        if rows != examples and (not examples or rows % examples):
            raise AttentionError(
                f"attention of {site.path!r} has {rows} rows in a batch of {examples} examples, so which example a row belongs to "
                "cannot be told"
            )
        streams[name] = Stream(rows, width, group=max(1, rows // max(examples, 1)))
    return name


def _fitting(streams: Mapping[str, Stream], rows: int, width: int) -> list[str]:
    return [name for name, stream in streams.items() if (stream.rows, stream.width) == (rows, width)]


def _end(site: SiteName, port: str) -> SiteName:
    return SiteName(site.path, port, site.call)
