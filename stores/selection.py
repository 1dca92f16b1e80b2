"""Selecting recorded sites by pattern, offline."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from . import patterns as grammar
from .columns import Column, Table
from .errors import UnknownColumnError
from .patterns import Alias, Pattern, SiteName

SITE_NAME = frozenset(("path", "port", "call"))  # what a site is selected by


def select(columns: Sequence[Column], patterns: Sequence[str]) -> list[Column]:
    """Columns that any pattern selects, in their own order; UnknownColumnError for a pattern that selects none."""
    chosen: set[str] = set()
    for text in patterns:
        found = [column.name for column in columns if _fits(Pattern(text), column)]
        if not found:
            raise UnknownColumnError(_nothing(text, columns))
        chosen.update(found)
    return [column for column in columns if column.name in chosen]


def no_such_column(name: str, tables: Mapping[str, Table]) -> str:
    """The message for a column that there is not."""
    known = [f"{table.name}/{column}" for table in tables.values() for column in table]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    closest = f"; the closest are {', '.join(map(repr, near))}" if near else ""
    return f"the run has no column {name!r}{closest}"


def site_name(column: Column) -> SiteName:
    """The name of the site a column was recorded at."""
    site = column.site or {}
    return SiteName(site["path"], site["port"], site["call"])


def aliases_of(column: Column) -> list[Alias]:
    """What a recorded site is in every architecture."""
    return [Alias(*alias) for alias in (column.site or {}).get("aliases", [])]


def is_companion(column: Column) -> bool:
    """Whether a column only goes with another of its site: a scale, a size, a check, a residual's norm, which keys a query sees."""
    site = column.site or {}
    return grammar.is_companion(site.get("port"), site.get("reduce"))


def is_attention(column: Column) -> bool:
    """Whether a column was recorded of an attention call."""
    return site_name(column).is_attention


def _fits(pattern: Pattern, column: Column) -> bool:
    name = site_name(column)
    if is_companion(column):
        return False
    if pattern.port is not None and pattern.port not in (name.port, name.port.partition("@")[0]):
        # An alias already decides on a port of its own (`resid_pre` is a block's input).
        return False
    if pattern.port is None and name.is_gradient and not pattern.text.startswith("re:"):
        return False  # gradients are asked for by name
    by_alias = any(map(pattern.matches_alias, aliases_of(column)))
    return by_alias or (pattern.matches_path(name) and (pattern.port is not None or _plain(pattern, name)))


def _plain(pattern: Pattern, name: SiteName) -> bool:
    """Whether a path without a port means this site: a module's input or output, not what is inside its attention."""
    return not name.is_attention or pattern.text.startswith("re:")


def _nothing(text: str, columns: Sequence[Column]) -> str:
    known = [str(site_name(column)) for column in columns]
    known += [f"{alias.name}[{alias.layer}]" if alias.layer is not None else alias.name for c in columns for alias in aliases_of(c)]
    near = difflib.get_close_matches(text, dict.fromkeys(known), n=3, cutoff=0.0)
    return (
        f"{text!r} selects nothing that was recorded; the closest are {', '.join(map(repr, near))}"
        if near
        else "no site was recorded"
    )
