"""Removing what killed writers left behind: unfinished files, and rows that no commit record names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from . import runs
from .part_reader import PartReader
from .part_state import PartState, claimed_parts, read_part
from .places import Place, place_at
from .shapes import stated
from .shard_cache import ShardCache

_SHARD = re.compile(r"c\.\d+(\.0)*")


def remove_leftovers(path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Remove what no record names from parts that are closed or sealed, and unfinished files; the paths removed.

    A part that is open may have a writer, so nothing in it is touched, nor are unfinished files above the parts while any part is
    open: resume the run, or `repair` it, first. Files that are not ours stay.
    """
    place = place_at(path, storage_options=storage_options)
    uid = runs.read_document(place, place.root).uid
    parts = [read_part(place, uid, name) for name in claimed_parts(place)]
    found = [leftover for part in parts if part.ended for leftover in _of_part(place, part)]
    if all(part.ended for part in parts):
        found += [f"{folder}{name}" for folder in ("", "parts/", "assets/", "derived/") for name in place.unfinished(folder)]
    for leftover in found:
        place.remove(leftover)
    place.settle()
    return found


def _of_part(place: Place, part: PartState) -> list[str]:
    folder = f"parts/{part.name}"
    inside = [f"{folder}/{name}/" for name in _folders(place, folder)]
    unfinished = [f"{where}{name}" for where in (f"{folder}/", *inside) for name in place.unfinished(where)]
    uncommitted = _uncommitted(place, part) if part.columns else _shards(place, inside)
    if uncommitted:
        _take_back(place, part)
    return unfinished + uncommitted


def _folders(place: Place, folder: str) -> list[str]:
    """Tables, columns and roles below a part, and its commits."""
    tables = place.names(folder)
    columns = [f"{table}/{column}" for table in tables for column in place.names(f"{folder}/{table}")]
    roles = [f"{column}/{role}" for column in columns for role in place.names(f"{folder}/{column}")]
    return [*tables, *columns, *roles]


def _uncommitted(place: Place, part: PartState) -> list[str]:
    """Shards that no record of a part names."""
    reader = PartReader(part, ShardCache(place, part.document.run, verify=False))
    roles = [role for column in part.columns.values() for role in column.arrays.values()]
    named = {path for role in roles for _, path, _ in reader.array(role).shards()}
    return [path for path in _shards(place, [f"parts/{part.name}/{role.path}/" for role in roles]) if path not in named]


def _shards(place: Place, folders: list[str]) -> list[str]:
    """Everything in some folders that is named like a shard."""
    return [f"{folder}{name}" for folder in folders for name in place.names(folder) if _SHARD.fullmatch(name)]


def _take_back(place: Place, part: PartState) -> None:
    """Let array documents state committed rows only: readers of plain Zarr must not look for rows that are about to go."""
    for found in stated(place, part):
        if found.stated is not None and found.stated > found.rows:
            place.replace(found.path, [found.content])
            place.settle()
