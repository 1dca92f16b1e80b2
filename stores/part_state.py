"""What the commit records of one part add up to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import commits
from .commits import Record, ShardRecord
from .errors import DamagedError
from .places import Place
from .schema import ColumnSchema, Json, PartDocument

_PART = re.compile(r"p\d{6,}")
_RECORD = re.compile(r"\d{12,}\.json")


@dataclass
class ArrayState:
    """Committed rows of an array, and what the records say of its shards."""

    rows: int = 0
    shards: dict[int, ShardRecord] = field(default_factory=dict)


@dataclass
class PartState:
    """One part as of its last record read."""

    name: str
    document: PartDocument
    rows: dict[str, int] = field(default_factory=dict)
    columns: dict[str, ColumnSchema] = field(default_factory=dict)
    arrays: dict[str, ArrayState] = field(default_factory=dict)
    aligned: tuple[tuple[str, int, int], ...] = ()
    nonfinite: dict[str, int] = field(default_factory=dict)
    closed: bool = False
    last: str = ""  # digest of the last record
    commits: int = 0
    written: int = 0

    def apply(self, record: Record) -> None:
        """Take one more record into account."""
        self.rows = dict(record.rows)
        self.columns.update(record.columns)
        for path, rows in record.array_rows.items():
            array = self.arrays.setdefault(path, ArrayState())
            array.rows = rows
            array.shards.update(record.shards.get(path, {}))
        self.aligned, self.nonfinite = record.aligned or self.aligned, dict(record.nonfinite)
        self.closed, self.commits, self.written = record.kind == "closed", record.number, record.written

    @property
    def examples(self) -> int:
        """Committed examples."""
        return self.rows.get("example", 0)


def read_parts(place: Place, run: str) -> list[PartState]:
    """Every part that has committed something, in order of name."""
    return [part for part in place.each(lambda name: read_part(place, run, name), claimed_parts(place)) if part.commits]


def part_names(place: Place) -> list[str]:
    """The names of parts that are taken, in order."""
    return [name for name in place.names("parts") if _PART.fullmatch(name)]


def claimed_parts(place: Place) -> list[str]:
    """The parts that somebody writes or wrote: not the empty folder of a writer that was killed while claiming it."""
    found = part_names(place)
    return [name for name, held in zip(found, place.each(lambda name: place.names(f"parts/{name}"), found), strict=True) if held]


def read_part(place: Place, run: str, name: str) -> PartState:
    """One part; DamagedError where a record is missing or not the one that was written."""
    where = f"parts/{name}/zarr.json"
    try:
        content = place.read(where)
    except FileNotFoundError:
        raise DamagedError(f"{where}: the part document is missing") from None
    stated = commits.digest(content)
    part = PartState(name, PartDocument.from_attributes(attributes(content, where), where))
    end = _end(place, name)  # read first: a writer may close the part while its records are being read
    for record, digest in _records(place, run, name):
        if record.document != stated:
            raise DamagedError(f"{where}: the part document is not the one that its commit records name")
        part.apply(record)
        part.last = digest
    if end is not None and end != commits.end(part.commits, part.last):
        raise DamagedError(f"{commits.end_path(name)}: the part was closed by another commit record than the ones that are there")
    return part


def _end(place: Place, part: str) -> bytes | None:
    try:
        return place.read(commits.end_path(part))
    except FileNotFoundError:
        return None


def attributes(content: bytes, path: str) -> Json:
    """The attributes in a group document; DamagedError if it is not one."""
    try:
        document = json.loads(content)
    except ValueError as error:
        raise DamagedError(f"{path}: not a Zarr group document ({error})") from None
    found = document.get("attributes", {}) if isinstance(document, dict) else None
    if not isinstance(found, dict):
        raise DamagedError(f"{path}: not a Zarr group document")
    return found


def _records(place: Place, run: str, part: str) -> Iterator[tuple[Record, str]]:
    previous = ""
    found = [name for name in place.names(f"parts/{part}/commits") if _RECORD.fullmatch(name)]
    contents = place.each(lambda name: place.read(f"parts/{part}/commits/{name}"), found)
    for number, (name, data) in enumerate(zip(found, contents, strict=True), start=1):
        path = commits.path_of(part, number)
        if not path.endswith(f"/{name}"):
            raise DamagedError(f"{path}: the commit record is missing, but {name} is there")
        record = Record.decode(data, path)
        if (record.run, record.part, record.number, record.previous) != (run, part, number, previous):
            raise DamagedError(f"{path}: this commit record belongs to another run, part or place in the sequence")
        previous = commits.digest(data)
        yield record, previous
