"""Whose tokens the queries and keys of an attention call are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tensortape.stores.patterns import SiteName

from ..capture import Pins
from ..errors import AttentionError
from ..layouts import Layout
from ..streams import Stream, joined
from .facts import Attended
from .spans import Call, aligned

_CROSS = re.compile(r"(?i).*(cross|enc_?dec).*|encoder_attn|multihead_attn")
_KEYS = ".keys"
Streams = dict[str, Stream]


def place(
    site: SiteName, attended: Attended, pins: Pins, steps: Sequence[Streams], examples: int, *, cached: bool
) -> tuple[Call, tuple[Layout, Layout]]:
    """The call with its streams, and the layouts of queries and keys.

    Args:
        site: the call's site; its port does not matter.
        steps: streams of each forward of the batch so far; the last gains those that the call opens.
        examples: input rows.
        cached: whether the forward was given a cache of keys.
    """
    queries = _of_queries(site, attended, pins, steps[-1], examples)
    keys = _of_keys(site, attended, pins, steps, queries, cached=cached)
    layouts = Layout("example token", queries), Layout("example token", keys)
    pins.layouts[_end(site, "q")], pins.layouts[_end(site, "k")] = layouts
    every = steps[-1][keys] if keys != queries else joined([step[keys] for step in steps if keys in step])
    return aligned(attended, steps[-1][queries], every, cross=keys != queries), layouts


def _of_queries(site: SiteName, attended: Attended, pins: Pins, streams: Streams, examples: int) -> str:
    rows, _, width, _ = attended.shape
    pinned = pins.layouts.get(_end(site, "q"))
    if pinned is not None:
        return _open(pinned.stream, rows, width, streams, examples, site)
    fitting = [name for name in _fitting(streams, rows, width) if not name.endswith(_KEYS)]
    home = pins.home(site)
    if home in fitting:
        return str(home)
    if len(fitting) > 1:
        raise AttentionError(f"attention of {site.path!r}: its queries fit several streams of tokens ({', '.join(fitting)})")
    return fitting[0] if fitting else _open(site.path or "root", rows, width, streams, examples, site)


def _of_keys(site: SiteName, attended: Attended, pins: Pins, steps: Sequence[Streams], queries: str, *, cached: bool) -> str:
    """The stream of the keys: that of the queries unless this is cross-attention."""
    rows, count = attended.shape[0], attended.shape[3] - attended.extra_keys
    streams = steps[-1]
    pinned = pins.layouts.get(_end(site, "k"))
    name = pinned.stream if pinned is not None else _found(site, attended, pins, streams, queries, cached=cached)
    if name != queries:
        stream = streams.setdefault(name, Stream(rows, count))
        if (stream.rows, stream.width) != (rows, count):
            raise AttentionError(
                f"the keys of {site.path!r} are {rows} rows of {count}, but their stream {name!r} has {stream.rows} rows of "
                f"{stream.width}"
            )
    return name


def _found(site: SiteName, attended: Attended, pins: Pins, streams: Streams, queries: str, *, cached: bool) -> str:
    rows, _, width, count = attended.shape
    count -= attended.extra_keys
    others = [name for name in _fitting(streams, rows, count) if name != queries]
    named = any(_CROSS.fullmatch(part) for part in pins.inside_block(site).split("."))
    cross = attended.cross if attended.cross is not None else named
    if not cross and (attended.cross is False or count == width):
        return queries
    if others:
        return others[0]
    is_cache = attended.cross is None and cached and count > width and not named
    return queries if is_cache else f"{site.path}{_KEYS}"


def _open(name: str, rows: int, width: int, streams: Streams, examples: int, site: SiteName) -> str:
    if name not in streams:
        if rows != examples and (not examples or rows % examples):
            raise AttentionError(
                f"attention of {site.path!r} has {rows} rows in a batch of {examples} examples, so which example a row belongs to "
                "cannot be told"
            )
        streams[name] = Stream(rows, width, group=max(1, rows // max(examples, 1)))
    if (streams[name].rows, streams[name].width) != (rows, width):
        raise AttentionError(
            f"the queries of {site.path!r} are {rows} rows of {width}, but their stream {name!r} has {streams[name].rows} rows of "
            f"{streams[name].width}"
        )
    return name


def _fitting(streams: Mapping[str, Stream], rows: int, width: int) -> list[str]:
    return [name for name, stream in streams.items() if (stream.rows, stream.width) == (rows, width)]


def _end(site: SiteName, port: str) -> SiteName:
    return SiteName(site.path, port, site.call)
