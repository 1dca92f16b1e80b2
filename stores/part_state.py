"""What the commit records of one part add up to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import commits
from .commits import Record, ShardRecord
from .errors import DamagedError
from .places import Place
from .schema import ColumnSchema, Json, PartDocument


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
    found = [read_part(place, run, name) for name in place.names("parts") if name != "zarr.json"]
    return [part for part in found if part.commits]


def read_part(place: Place, run: str, name: str) -> PartState:
    """One part; DamagedError where a record is missing or not the one that was written."""
    where = f"parts/{name}/zarr.json"
    part = PartState(name, PartDocument.from_attributes(attributes(place, where), where))
    for record in _records(place, run, name):
        part.apply(record)
    return part


def attributes(place: Place, path: str) -> Json:
    """The attributes in a group document; DamagedError if it is not one."""
    try:
        document = json.loads(place.read(path))
        found: Json = document["attributes"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: not a Zarr group document ({error})") from None
    return found


def _records(place: Place, run: str, part: str) -> Iterator[Record]:
    previous = ""
    for number, name in enumerate(place.names(f"parts/{part}/commits"), start=1):
        path = commits.path_of(part, number)
        if not path.endswith(f"/{name}"):
            raise DamagedError(f"{path}: the commit record is missing, but {name} is there")
        data = place.read(path)
        record = Record.decode(data, path)
        if (record.run, record.part, record.number, record.previous) != (run, part, number, previous):
            raise DamagedError(f"{path}: this commit record belongs to another run, part or place in the sequence")
        previous = commits.digest(data)
        yield record
