"""What the commit records of one part add up to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from . import commits, strict_json
from .commits import End, Listed, Record, ShardRecord
from .errors import DamagedError
from .part_checks import check_part
from .places import Place
from .quantize import Quantization
from .schema import ColumnSchema, Json, PartDocument

_PART = re.compile(r"p\d{6,18}")
_RECORD = re.compile(r"\d{12,18}\.json")


def _none() -> dict[int, ShardRecord]:
    return {}


class ArrayState:
    """Committed rows of an array, and what the records say of its shards; a checkpoint's list of them is read on first use."""

    def __init__(self, rows: int = 0, listed: Callable[[], dict[int, ShardRecord]] = _none) -> None:
        self.rows = rows
        self._listed: Callable[[], dict[int, ShardRecord]] | None = listed
        self._shards: dict[int, ShardRecord] = {}

    @property
    def shards(self) -> dict[int, ShardRecord]:
        """Shards by number."""
        if self._listed is not None:
            self._shards, self._listed = {**self._listed(), **self._shards}, None
        return self._shards

    def apply(self, rows: int, shards: dict[int, ShardRecord]) -> None:
        """Take into account what one more record says."""
        self.rows = rows
        self._shards.update(shards)


@dataclass
class PartState:
    """One part as of its last record read."""

    name: str
    document: PartDocument
    stated: str  # digest of that document
    rows: dict[str, int] = field(default_factory=dict)
    columns: dict[str, ColumnSchema] = field(default_factory=dict)
    arrays: dict[str, ArrayState] = field(default_factory=dict)
    aligned: tuple[tuple[str, int, int], ...] = ()
    nonfinite: dict[str, int] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    assets: dict[str, str] = field(default_factory=dict)
    withdrawn: tuple[tuple[int, int], ...] = ()
    lists: dict[str, Mapping[str, Listed]] = field(default_factory=dict)  # of the checkpoints read, by file
    quantization: dict[str, Quantization] = field(default_factory=dict)
    kind: str = ""  # of the last record
    ended: bool = False  # whether end.json is there
    last: str = ""  # digest of the last record
    commits: int = 0
    written: int = 0
    hidden_from: int | None = None  # the training step from which on a later session has superseded its rows

    @property
    def key_table(self) -> str:
        """The table whose rows have keys: `example`, or `step` in a part of training steps."""
        return "step" if "step/step" in self.columns else "example"

    @property
    def closed(self) -> bool:
        """Whether nothing is added any more."""
        return self.kind not in ("", "commit")

    @property
    def examples(self) -> int:
        """Committed examples (or training steps), withdrawn and superseded ones included."""
        return self.rows.get(self.key_table, 0)

    def apply(self, record: Record) -> None:
        """Take one more record into account."""
        self.rows = dict(record.rows)
        self.columns.update(record.columns)
        for path, rows in record.array_rows.items():
            self.arrays.setdefault(path, ArrayState()).apply(rows, dict(record.shards.get(path, {})))
        self.copies.update(record.copies)
        self.assets.update(record.assets)
        self.aligned, self.nonfinite = record.aligned or self.aligned, dict(record.nonfinite)
        self.withdrawn = record.withdrawn or self.withdrawn
        if record.listed:
            self.lists[record.list_file] = record.listed
        self.quantization = dict(record.quantization)
        self.kind, self.commits, self.written = record.kind, record.number, record.written

    def start_from(self, record: Record, place: Place) -> None:
        """Take a checkpoint for all that came before it."""
        where = list_path(self.name, record.list_file)
        self.arrays = {
            path: ArrayState(listed.rows, partial(read_list, place, where, listed)) for path, listed in record.listed.items()
        }
        self.apply(record)


def read_parts(place: Place, run: str) -> list[PartState]:
    """Every part that has committed something, in order of name."""
    found = place.each(lambda name: read_part(place, run, name), claimed_parts(place))
    parts = [part for part in found if part.columns]
    hide_superseded(parts)
    return parts


def hide_superseded(parts: list[PartState]) -> None:
    """Tell each part from which step on a later part of another session has superseded it."""
    firsts: dict[str, int] = {}  # by session, of the parts that come later
    for part in reversed(parts):
        document = part.document
        hide_from(part, [step for session, step in firsts.items() if session != document.session])
        if document.from_step is not None:
            firsts[document.session] = min(document.from_step, firsts.get(document.session, document.from_step))


def hide_from(part: PartState, steps: Iterable[int]) -> None:
    """Hide a part's rows of these training steps and all later ones."""
    part.hidden_from = min([*steps, *([] if part.hidden_from is None else [part.hidden_from])], default=None)


def part_names(place: Place) -> list[str]:
    """The names of parts that are taken, in order."""
    return [name for name in place.names("parts") if _PART.fullmatch(name)]


def claimed_parts(place: Place) -> list[str]:
    """The parts that somebody writes or wrote: not the empty folder of a writer that was killed while claiming it."""
    found = part_names(place)
    return [name for name, held in zip(found, place.each(lambda name: place.names(f"parts/{name}"), found), strict=True) if held]


def read_part(place: Place, run: str, name: str, *, whole: bool = False) -> PartState:
    """One part as of its last checkpoint and what came after; `whole` reads every record instead, and finds out more of damage.

    Raises:
        DamagedError: a record is missing or not the one that was written.
    """
    where = f"parts/{name}/zarr.json"
    part = begun(place, name)
    end = read_end(place, name)  # read first: a writer may close the part while its records are being read
    if end is not None and whole:
        _check_end(place, run, name, end)
    for record, digest in _records(place, run, name, end, whole=whole):
        if record.document != part.stated:
            raise DamagedError(f"{where}: the part document is not the one that its commit records name")
        begins = not part.commits and record.listed and (not whole or record.kind == "repaired")
        part.start_from(record, place) if begins else part.apply(record)
        part.last = digest
    part.ended = end is not None
    if end is not None and (end.number, end.digest) != (part.commits, part.last):
        raise DamagedError(f"{commits.end_path(name)}: the part was closed by another commit record than the ones that are there")
    check_part(part)
    return part


def begun(place: Place, name: str) -> PartState:
    """A part as its document says, without any record."""
    where = f"parts/{name}/zarr.json"
    try:
        document = place.read(where, strict_json.MOST)
    except FileNotFoundError:
        raise DamagedError(f"{where}: the part document is missing") from None
    return PartState(name, PartDocument.from_attributes(attributes(document, where), where), commits.digest(document))


def read_end(place: Place, part: str) -> End | None:
    """What closed a part; None while it is open."""
    where = commits.end_path(part)
    try:
        return End.decode(place.read(where, strict_json.MOST), where)
    except FileNotFoundError:
        return None


def attributes(document: bytes, where: str) -> Json:
    """The attributes in a group document; DamagedError if it is not one."""
    parsed = strict_json.parse(document, where)
    found = parsed.get("attributes", {}) if isinstance(parsed, dict) else None
    if not isinstance(found, dict):
        raise DamagedError(f"{where}: not a Zarr group document")
    return found


def read_record(place: Place, run: str, part: str, number: int) -> tuple[Record, str]:
    """One record and its digest; DamagedError if it is missing or belongs elsewhere."""
    path = commits.path_of(part, number)
    try:
        data = place.read(path, commits.MOST_BYTES)
    except FileNotFoundError:
        raise DamagedError(f"{path}: the commit record is missing") from None
    record = Record.decode(data, path)
    if (record.run, record.part, record.number) != (run, part, number):
        raise DamagedError(f"{path}: this commit record belongs to another run, part or place in the sequence")
    return record, commits.digest(data)


def record_numbers(place: Place, part: str) -> list[int]:
    """Numbers of the commit records that are there, damaged or not."""
    return [int(name.partition(".")[0]) for name in place.names(f"parts/{part}/commits") if _RECORD.fullmatch(name)]


def _check_end(place: Place, run: str, part: str, end: End) -> None:
    """DamagedError if what closed a part has the digest of its last record, but not its number."""
    last = max(record_numbers(place, part), default=end.number)
    if last == end.number:
        return
    try:
        _, found = read_record(place, run, part, last)
    except DamagedError:  # a record that is none of the part's says nothing of its end
        return
    if found == end.digest:
        raise DamagedError(f"{commits.end_path(part)}: names record {end.number}, but has the digest of {last}, the last one")


def _records(place: Place, run: str, part: str, end: End | None, *, whole: bool) -> Iterator[tuple[Record, str]]:
    """The records that count, from the last checkpoint on; each names the one before it."""
    first = end.first if end else 1
    last = end.number if end else max(record_numbers(place, part), default=0)
    start, previous = first, ""
    checkpoint = last if end else last - last % commits.CHECKPOINT_EVERY
    if checkpoint > first and not whole:
        record, digest = read_record(place, run, part, checkpoint)
        if record.listed:
            yield record, digest
            start, previous = checkpoint + 1, digest
    for record, digest in place.each(lambda number: read_record(place, run, part, number), range(start, last + 1)):
        number = record.number
        if record.previous != previous and not (number == first and record.kind == "repaired"):
            raise DamagedError(f"{commits.path_of(part, number)}: this commit record does not follow the one before it")
        previous = digest
        yield record, digest


def list_path(part: str, file: str) -> str:
    """Where a checkpoint's list of shards lies."""
    return f"parts/{part}/commits/{file}"


def read_list(place: Place, where: str, listed: Listed) -> dict[int, ShardRecord]:
    """The shards of one array, from a checkpoint's list; DamagedError."""
    span = listed.start, listed.start + listed.size
    try:
        view = place.view(where, expected=span[1], stays=True)
    except FileNotFoundError:
        raise DamagedError(f"{where}: the list of shards is missing") from None
    if len(view.content) < span[1]:
        raise DamagedError(f"{where}: the list of shards is cut")
    view.load([span])
    return commits.decode_list(view.content[slice(*span)].tobytes(), listed, where)
