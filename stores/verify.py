"""Checking everything a run holds against what was committed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import projected, runs, zarr_documents
from .errors import StoreError
from .part_reader import ArrayReader, PartReader
from .part_state import PartState, claimed_parts, read_part
from .parts import group_folders
from .places import LocalPlace, Place
from .schema import ColumnSchema, Json
from .shard_cache import ShardCache


@dataclass(frozen=True)
class Damage:
    """One damaged object: its path, what is wrong, and the first and last id of the examples it holds (None: not known)."""

    path: str
    reason: str
    first: str | int | None = None
    last: str | int | None = None

    def __str__(self) -> str:
        affected = f" (examples {self.first!r} to {self.last!r})" if self.first is not None else ""
        return f"{self.path}: {self.reason}{affected}"


@dataclass(frozen=True)
class Verification:
    """What a check found."""

    path: str
    shards: int
    nbytes: int
    damaged: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Whether everything committed is there, bit for bit."""
        return not self.damaged

    def __repr__(self) -> str:
        state = "sound" if self.ok else f"{len(self.damaged)} damaged objects"
        listed = "".join(f"\n  {damage}" for damage in self.damaged[:20])
        return f"<Verification {self.path}: {state}; {self.shards} shards, {self.nbytes} bytes read>{listed}"


def verify_run(path: Path) -> Verification:
    """Read every committed byte of a run and compare; damage of any kind is listed, not raised."""
    place = LocalPlace(path)
    uid = runs.read_document(place, path).uid
    checks = _Checks(place)
    checks.groups_above()
    for name in claimed_parts(place):
        checks.part(uid, name)
    return Verification(str(path), checks.shards, checks.nbytes, tuple(checks.damaged))


def _path_in(error: Exception, otherwise: str) -> str:
    """The object an error's message begins with."""
    path, colon, _ = str(error).partition(":")
    return path if colon and path.startswith(("parts/", "assets/")) else otherwise


class _Checks:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._cache = ShardCache(place, verify=True)
        self.shards = 0
        self.nbytes = 0
        self.damaged: list[Damage] = []

    def groups_above(self) -> None:
        if self._content("parts/zarr.json") != zarr_documents.group():
            self.damaged.append(Damage("parts/zarr.json", "the group document is missing or damaged"))

    def part(self, run: str, name: str) -> None:
        try:
            state = read_part(self._place, run, name)
        except (StoreError, OSError) as error:
            self.damaged.append(Damage(_path_in(error, f"parts/{name}"), str(error)))
            return
        reader = PartReader(state, self._cache)
        self._groups(name, state)
        for column in state.columns.values():
            self._basis(reader, column)
            for role in column.arrays.values():
                document = zarr_documents.array(column, role)
                self._document(f"parts/{name}/{role.path}/zarr.json", document, reader.array(role).rows)
                self._array(reader, role.path, reader.array(role))

    def _basis(self, reader: PartReader, column: ColumnSchema) -> None:
        """A column of coordinates is as good as its basis."""
        if not (column.site or {}).get(projected.SITE):
            return
        try:
            projected.read(self._place, *projected.said_of(column))
        except (StoreError, OSError) as error:
            path, array = _path_in(error, "assets"), column.arrays["values"]
            ids = _ids(reader, array.path, 0, reader.array(array).rows)
            self.damaged.append(Damage(path, str(error).removeprefix(f"{path}: "), *ids))

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

    def _content(self, path: str) -> bytes:
        try:
            return self._place.read(path)
        except OSError:
            return b""

    def _array(self, reader: PartReader, array_path: str, array: ArrayReader) -> None:
        for number, path, sealed in array.shards():
            self.shards += 1
            for reason, start, stop in self._shard(array, number, path, sealed=sealed):
                self.damaged.append(Damage(path, reason, *_ids(reader, array_path, start, stop)))

    def _shard(self, array: ArrayReader, number: int, path: str, *, sealed: bool) -> Iterator[tuple[str, int, int]]:
        first, last = array.rows_in(number)
        try:
            shard = array.open(number)
        except (StoreError, OSError) as error:
            yield str(error).removeprefix(f"{path}: "), first, last
            return
        self.nbytes += self._place.size(path)
        bad = shard.damaged()
        for chunk in bad:
            start, stop = shard.rows_of(chunk)
            yield f"chunk {chunk} does not hold the bytes that were committed", first + start, first + stop
        if not bad and sealed and not shard.structure_is_right():
            yield "a checksum in the file or its index is damaged (values are right)", first, last


def _ids(reader: PartReader, array_path: str, start: int, stop: int) -> tuple[str | int | None, str | int | None]:
    try:
        found = reader.examples_of(array_path, start, stop)
        if found is None:
            return None, None
        ids = reader.slice(reader.state.columns["example/id"], found[0], found[1] + 1)
    except StoreError:
        return None, None
    return _plain(ids[0]), _plain(ids[-1])


def _plain(id_: Any) -> str | int:
    return id_ if isinstance(id_, str) else int(id_)
