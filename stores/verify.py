"""Checking everything a run holds against what was committed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from . import commits, projected, runs, strict_json, zarr_documents
from .dtypes import Array
from .errors import NotARunError, StoreError
from .part_reader import ArrayReader, PartReader
from .part_state import PartState, begun, claimed_parts, list_path, read_list, read_part
from .parts import group_folders
from .places import Place, place_at
from .schema import ColumnSchema, Json
from .shard_cache import ShardCache

OUTAGES = (ConnectionError, TimeoutError)  # of the place; they say nothing of the run


@dataclass(frozen=True)
class Damage:
    """One damaged object: its path, what is wrong, and the examples it holds values of.

    `first` and `last` are ids of examples (None where ids are damaged too, or no example is concerned), `numbers` their first and
    last number in their part.
    """

    path: str
    reason: str
    first: str | int | None = None
    last: str | int | None = None
    numbers: tuple[int, int] | None = None

    def __str__(self) -> str:
        affected = ""
        if self.first is not None:
            affected = f" (examples {self.first!r} to {self.last!r})"
        elif self.numbers is not None:
            affected = f" (examples number {self.numbers[0]} to {self.numbers[1]} of the part)"
        return f"{self.path}: {self.reason}{affected}"


@dataclass(frozen=True)
class Verification:
    """What a check found. `unfinished` is what a killed writer leaves behind: no damage, and nothing committed is in it."""

    path: str
    shards: int
    nbytes: int
    damaged: tuple[Damage, ...]
    unfinished: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything committed is there, bit for bit (after a quick check: whole in size)."""
        return not self.damaged

    def __repr__(self) -> str:
        state = "sound" if self.ok else f"{len(self.damaged)} damaged objects"
        listed = "".join(f"\n  {damage}" for damage in self.damaged[:20])
        more = "".join(f"\n  {note}" for note in self.unfinished[:20])
        return f"<Verification {self.path}: {state}; {self.shards} shards, {self.nbytes} bytes read>{listed}{more}"


def verify_run(
    path: str | os.PathLike[str], *, quick: bool = False, storage_options: Mapping[str, Any] | None = None
) -> Verification:
    """Compare every committed byte with what was committed; damage of any kind is listed, not raised.

    Args:
        quick: look at sizes only, and at everything that is not values: finds what is missing or cut, not what has changed.

    Raises:
        NotARunError, FormatVersionError. ConnectionError, TimeoutError: an object store failed, which says nothing of the run.
    """
    return verify_place(place_at(path, storage_options=storage_options), quick=quick)


def verify_place(place: Place, *, quick: bool = False) -> Verification:
    """The same for a run at a place."""
    checks = _Checks(place, quick=quick)
    uid = checks.root()
    checks.groups_above()
    for name in claimed_parts(place):
        checks.part(uid, name)
    return Verification(str(place.root), checks.shards, checks.nbytes, tuple(checks.damaged), tuple(checks.unfinished))


def _path_in(error: Exception, otherwise: str) -> str:
    """The object an error's message begins with."""
    found = re.match(r"(parts|assets)/[^\s:]+", str(error))
    return found[0] if found else otherwise


class _Checks:
    def __init__(self, place: Place, *, quick: bool) -> None:
        self._place = place
        self._quick = quick
        self.shards = 0
        self.nbytes = 0
        self.damaged: list[Damage] = []
        self.unfinished: list[str] = []

    def root(self) -> str:
        """Check the run document; the run's uid, as far as anything tells it."""
        there = claimed_parts(self._place)
        told = [*self._told(there), *(found.run for found in runs.statements(self._place))]
        try:
            uid = runs.read_document(self._place, self._place.root).uid
            if not told or uid in told:
                return uid
            reason = "the document is not the one that was written"
        except NotARunError:
            if not there:
                raise
            reason = "the run document is missing, or not one"
        except StoreError as error:
            reason = str(error).removeprefix(f"{runs.ROOT}: ")
        self._add(runs.ROOT, reason)
        return next(iter(told), "")

    def _told(self, parts: list[str]) -> Iterator[str]:
        """The run that parts say they belong to."""
        for name in parts:
            with suppress(StoreError):
                yield begun(self._place, name).document.run

    def groups_above(self) -> None:
        if self._content("parts/zarr.json") != zarr_documents.group():
            self._add("parts/zarr.json", "the group document is missing or damaged")

    def part(self, run: str, name: str) -> None:
        try:
            state = read_part(self._place, run, name, whole=True)
        except OUTAGES:
            raise
        except (StoreError, OSError) as error:
            path = _path_in(error, f"parts/{name}")
            self._add(path, str(error).removeprefix(f"{path}: "))
            return
        if state.closed and not state.ended:
            self.unfinished.append(f"{commits.end_path(name)}: missing, though the part was closed; a resumed recording writes it")
        self._statements(state)
        self._lists(state)
        reader = PartReader(state, ShardCache(self._place, run, verify=True))
        self._groups(name, state)
        for column in state.columns.values():
            self._basis(reader, column)
            for role in column.arrays.values():
                document = zarr_documents.array(column, role)
                self._document(f"parts/{name}/{role.path}/zarr.json", document, reader.array(role).rows)
                self._array(reader, role.path, reader.array(role))

    def _add(self, path: str, reason: str) -> None:
        if not any(damage.path == path and damage.reason == reason for damage in self.damaged):
            self.damaged.append(Damage(path, reason))

    def _statements(self, state: PartState) -> None:
        """What the part's records say of documents and files that are not its own."""
        for path, text in state.copies.items():
            if self._content(path) != text.encode():
                self._add(path, "the document is not the one that was written")
        for name, digest in state.assets.items():
            if hashlib.sha256(self._content(f"assets/{name}", None)).hexdigest() != digest:
                self._add(f"assets/{name}", "the file is missing, or not the one that was written")

    def _lists(self, state: PartState) -> None:
        for file, arrays in state.lists.items():
            for listed in arrays.values():
                path = list_path(state.name, file)
                try:
                    read_list(self._place, path, listed)
                except StoreError as error:
                    self._add(path, str(error).removeprefix(f"{path}: "))

    def _basis(self, reader: PartReader, column: ColumnSchema) -> None:
        """A column of coordinates is as good as its basis."""
        if not (column.site or {}).get(projected.SITE):
            return
        try:
            projected.read(self._place, *projected.said_of(column))
        except (StoreError, OSError) as error:
            path, array = _path_in(error, "assets"), column.arrays["values"]
            examples = reader.examples_of(array.path, 0, reader.array(array).rows)
            reason = str(error).removeprefix(f"{path}: ")
            self.damaged = [damage for damage in self.damaged if damage.path != path or damage.numbers]  # examples say more
            self.damaged.append(Damage(path, reason, *_ids(reader, examples), numbers=_ends(examples)))

    def _groups(self, name: str, state: PartState) -> None:
        """The groups that a foreign reader needs to find the arrays below."""
        expected = zarr_documents.group()
        for folder in group_folders(state.columns.values()):
            path = f"parts/{name}/{folder}/zarr.json"
            if self._content(path) != expected:
                self.damaged.append(Damage(path, "the group document is missing or damaged"))

    def _document(self, path: str, document: Json, rows: int) -> None:
        """Foreign readers go by it: it must say what the schema says; its rows may be ahead of the commit, never behind."""
        stated = zarr_documents.rows_of(self._content(path), document)
        if stated is None:
            self.damaged.append(Damage(path, "the array document is missing or damaged"))
        elif stated < rows:
            self.damaged.append(Damage(path, f"states {stated} rows, but {rows} are committed"))

    def _content(self, path: str, most: int | None = strict_json.MOST) -> bytes:
        try:
            return self._place.read(path, most)
        except OUTAGES:
            raise
        except OSError:
            return b""

    def _array(self, reader: PartReader, array_path: str, array: ArrayReader) -> None:
        try:
            shards = list(array.shards())
        except StoreError as error:
            where = _path_in(error, f"parts/{reader.state.name}/{array_path}")
            self._add(where, str(error).removeprefix(f"{where}: "))
            return
        for number, path, _ in shards:
            self.shards += 1
            for reason, start, stop in self._shard(array, number, path):
                examples = reader.examples_of(array_path, start, stop)
                self.damaged.append(Damage(path, reason, *_ids(reader, examples), numbers=_ends(examples)))

    def _shard(self, array: ArrayReader, number: int, path: str) -> Iterator[tuple[str, int, int]]:
        first, last = array.rows_in(number)
        try:
            array.check_size(number)
            if self._quick:
                return
            shard = array.open(number)
        except OUTAGES:
            raise
        except (StoreError, OSError) as error:
            yield str(error).removeprefix(f"{path}: "), first, last
            return
        size = shard.nbytes
        self.nbytes += size
        bad = shard.damaged()
        for chunk in bad:
            start, stop = shard.rows_of(chunk)
            yield f"chunk {chunk} does not hold the bytes that were committed", first + start, first + stop
        if not bad and size == array.file_bytes(number) and not shard.structure_is_right():
            yield "a checksum in the file or its index is damaged (values are right)", first, last


def _ids(reader: PartReader, examples: Array) -> tuple[Any, Any]:
    return (reader.ids_of(examples) if len(examples) else None) or (None, None)


def _ends(examples: Array) -> tuple[int, int] | None:
    return (int(examples[0]), int(examples[-1])) if len(examples) else None
