"""Checking everything a run holds against what was committed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import runs, zarr_documents
from .errors import StoreError
from .part_reader import ArrayReader, PartReader
from .part_state import read_part
from .places import LocalPlace, Place
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
    for name in place.names("parts"):
        if name != "zarr.json":
            checks.part(uid, name)
    return Verification(str(path), checks.shards, checks.nbytes, tuple(checks.damaged))


class _Checks:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._cache = ShardCache(place, verify=True)
        self.shards = 0
        self.nbytes = 0
        self.damaged: list[Damage] = []

    def part(self, run: str, name: str) -> None:
        try:
            state = read_part(self._place, run, name)
        except (StoreError, OSError) as error:
            self.damaged.append(Damage(f"parts/{name}", str(error)))
            return
        reader = PartReader(state, self._cache)
        for column in state.columns.values():
            for role in column.arrays.values():
                self._document(f"parts/{name}/{role.path}/zarr.json", reader.array(role))
                self._array(reader, role.path, reader.array(role))

    def _document(self, path: str, array: ArrayReader) -> None:
        """A foreign reader depends on the shape in the array document; it may be ahead of the commit, never behind."""
        try:
            shape = zarr_documents.shape_of(self._place.read(path))
        except (OSError, ValueError, KeyError) as error:
            self.damaged.append(Damage(path, f"not an array document ({error})"))
            return
        if shape[0] < array.rows or shape[1:] != array.geometry.shape:
            self.damaged.append(
                Damage(path, f"states the shape {shape}, but {array.rows} rows of {array.geometry.shape} are committed")
            )

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
