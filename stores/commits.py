"""Commit records: what a reader may see.

A record is one JSON file, `commits/<number>.json`, numbered from 1 without gaps in its part, created once and never replaced. It
looks like `{"crc32c":"0a1b2c3d","record":{...}}`; the checksum covers the bytes of the inner object exactly as they stand in the
file, so checking needs no canonical form of JSON. Each record carries the run's uid, its part, and the SHA-256 of the record before
it; once a part is closed, `end.json` repeats the number and digest of its last record. A record states the rows of every table, and
for every shard touched since the last record its rows and one crc32c per chunk over the committed rows; of several records that
name a shard the last one counts.

Every thousandth record and the one that closes a part are checkpoints: they name everything anew, the shards in a list beside the
records, so that opening a part takes its last checkpoint and what came after.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import google_crc32c
import numpy as np

from . import checked, strict_json
from .dtypes import Array
from .errors import DamagedError, FormatVersionError, SchemaError
from .quantize import Quantization
from .schema import VERSION, ColumnSchema, Json

_HEAD = b'{"crc32c":"%08x","record":'
_HEAD_BYTES = len(_HEAD % 0)
MOST_BYTES = strict_json.MOST_OF_RECORD + _HEAD_BYTES + 1
KINDS = ("commit", "closed", "sealed", "repaired")
CHECKPOINT_EVERY = 1000
_PLAIN = ("run", "part", "number", "previous", "kind", "document", "rows", "nonfinite", "written")
_OPTIONAL = ("copies", "assets")
_MEMBERS = {
    **dict.fromkeys(("run", "part", "previous", "kind", "document"), checked.TEXT),
    **dict.fromkeys(("number", "written"), checked.COUNT),
    **dict.fromkeys(("rows", "columns", "arrays", "nonfinite"), checked.OBJECT),
    "aligned": checked.LIST,
}
_MORE = {**dict.fromkeys(("copies", "assets", "checkpoint", "quantization"), checked.OBJECT), "withdrawn": checked.LIST}
_END = {"number": checked.COUNT, "digest": checked.TEXT}
_ARRAY = {"rows", "shards"}
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_LIST_FILE = re.compile(r"\d{12,18}\.[0-9a-f]{16}\.shards")


@dataclass(frozen=True)
class ShardRecord:
    """Rows of one shard, the crc32c of the committed rows of each of its chunks, and if it is compressed the size of its file."""

    rows: int
    crcs: Array
    nbytes: int | None = None

    def to_json(self) -> list[int | str]:
        """Rows, the checksums as hexadecimal digits (little-endian, 8 per chunk), and bytes if they do not follow from the rows."""
        size = [] if self.nbytes is None else [self.nbytes]
        return [self.rows, self.crcs.astype("<u4").tobytes().hex(), *size]

    @classmethod
    def from_json(cls, document: Any) -> ShardRecord:
        """The reverse of `to_json`; DamagedError for anything else."""
        if type(document) is not list or not 2 <= len(document) <= 3 or type(document[1]) is not str:
            raise checked.unexpected("a shard", document, "[rows, checksums] or [rows, checksums, bytes]")
        rows, digits, *size = document
        counted = checked.numbers([rows, *size], "rows and bytes of a shard")
        try:
            return cls(rows, np.frombuffer(bytes.fromhex(digits), "<u4"), *counted[1:])
        except ValueError:
            raise checked.unexpected("the checksums of a shard", digits, "8 hexadecimal digits for each chunk") from None


@dataclass(frozen=True)
class Listed:
    """Where the checkpoint list of a part holds the shards of one array: their number, bytes [start, start + size) and crc32c."""

    rows: int
    shards: int
    start: int
    size: int
    crc: int

    def to_json(self) -> list[int]:
        """The five numbers."""
        return [self.rows, self.shards, self.start, self.size, self.crc]


@dataclass(frozen=True)
class Record:
    """One commit of one part.

    `copies` are texts of the run's and the part's documents by path, `assets` SHA-256 digests of files beside the tables. In a
    checkpoint `listed` says by path where `list_file`, beside the record, has the shards of each array. `withdrawn` are spans
    [first, count] of the part's examples that a repair gave up.
    """

    run: str
    part: str
    number: int
    previous: str
    kind: str = "commit"
    document: str = ""
    rows: Mapping[str, int] = field(default_factory=dict)
    columns: Mapping[str, ColumnSchema] = field(default_factory=dict)
    array_rows: Mapping[str, int] = field(default_factory=dict)
    shards: Mapping[str, Mapping[int, ShardRecord]] = field(default_factory=dict)
    aligned: tuple[tuple[str, int, int], ...] = ()
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    written: int = 0
    quantization: Mapping[str, Quantization] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    assets: Mapping[str, str] = field(default_factory=dict)
    listed: Mapping[str, Listed] = field(default_factory=dict)
    list_file: str = ""
    withdrawn: tuple[tuple[int, int], ...] = ()

    @property
    def closes(self) -> bool:
        """Whether the part ends with this record."""
        return self.kind != "commit"

    def encode(self) -> bytes:
        """The file's bytes."""
        body = json.dumps(self._to_json(), separators=(",", ":"), allow_nan=False).encode()
        if len(body) > strict_json.MOST_OF_RECORD:
            raise SchemaError(
                f"a commit record of {len(body)} bytes, where one has at most {strict_json.MOST_OF_RECORD}: commit more often"
            )
        return _framed(body)

    def _to_json(self) -> Json:
        return {
            "version": VERSION,
            "run": self.run,
            "part": self.part,
            "number": self.number,
            "previous": self.previous,
            "kind": self.kind,
            "document": self.document,
            "rows": dict(self.rows),
            "columns": {name: schema.to_json() for name, schema in self.columns.items()},
            "arrays": {path: self._array_json(path) for path in self.array_rows},
            "aligned": [list(span) for span in self.aligned],
            "nonfinite": dict(self.nonfinite),
            "written": self.written,
            **{name: dict(getattr(self, name)) for name in _OPTIONAL if getattr(self, name)},
            **({"checkpoint": self._checkpoint_json()} if self.listed else {}),
            **({"withdrawn": [list(span) for span in self.withdrawn]} if self.withdrawn else {}),
            **({"quantization": {name: astuple(cost) for name, cost in self.quantization.items()}} if self.quantization else {}),
        }

    def _checkpoint_json(self) -> Json:
        return {"file": self.list_file, "arrays": {path: listed.to_json() for path, listed in self.listed.items()}}

    def _array_json(self, path: str) -> Json:
        shards = self.shards.get(path, {})
        return {"rows": self.array_rows[path], "shards": {str(number): shard.to_json() for number, shard in shards.items()}}

    @classmethod
    def decode(cls, data: bytes, where: str) -> Record:
        """The record in a file; DamagedError if it is not what was written, FormatVersionError if it is of a later version."""
        body = _body(data, where)
        document = checked.of_kind(strict_json.parse(body, where, most=strict_json.MOST_OF_RECORD), where, checked.OBJECT)
        version, kind = document.get("version"), document.get("kind")
        if type(version) is not int or version != VERSION or kind not in KINDS:
            raise FormatVersionError(
                f"{where} is a record of kind {checked.shown(kind)} and format version {checked.shown(version)}; this tensortape "
                f"reads {' and '.join(KINDS)} records of version {VERSION}: update tensortape"
            )
        with checked.named(where):
            return cls._from_json(checked.members(document, "the record", _MEMBERS, _MORE))

    @classmethod
    def _from_json(cls, document: Json) -> Record:
        arrays = document["arrays"]
        for path, array in arrays.items():
            if type(array) is not dict or not array.keys() >= _ARRAY or type(array["shards"]) is not dict:
                raise checked.unexpected(f"array {checked.shown(path)}", array, "an object with 'rows' and 'shards'")
        for key in ("rows", "nonfinite"):
            checked.counts(document[key], f"{key!r}")
        return cls(
            **{key: document[key] for key in _PLAIN},
            copies=checked.texts(document.get("copies", {}), "'copies'"),
            assets=checked.texts(document.get("assets", {}), "'assets'"),
            columns={name: _column(name, schema) for name, schema in document["columns"].items()},
            array_rows=checked.counts({path: array["rows"] for path, array in arrays.items()}, "the rows of arrays"),
            shards={path: _shards(array["shards"]) for path, array in arrays.items()},
            aligned=tuple(_aligned(span) for span in checked.rows_of(document["aligned"], "'aligned'", 3)),
            **_checkpoint(document.get("checkpoint", {"file": "", "arrays": {}})),
            withdrawn=tuple(_span(*span) for span in checked.rows_of(document.get("withdrawn", []), "'withdrawn'", 2)),
            quantization={name: _cost(name, cost) for name, cost in document.get("quantization", {}).items()},
        )


def path_of(part: str, number: int) -> str:
    """Where a record lies."""
    return f"parts/{part}/commits/{number:012d}.json"


def end_path(part: str) -> str:
    """Where a closed part states which record is its last, so that a missing one is noticed."""
    return f"parts/{part}/end.json"


@dataclass(frozen=True)
class End:
    """What `end.json` states: number and digest of a part's last record, and where the records that count begin."""

    number: int
    digest: str
    first: int = 1

    def encode(self) -> bytes:
        """The file's bytes."""
        first = {"first": self.first} if self.first != 1 else {}
        return json.dumps({"number": self.number, "digest": self.digest, **first}).encode()

    @classmethod
    def decode(cls, data: bytes, where: str) -> End:
        """The reverse; DamagedError for anything that `encode` does not write."""
        try:
            said = checked.members(strict_json.parse(data, where), where, _END, {"first": checked.COUNT})
            found = cls(**said)
            if found.encode() == data and checked.MOST >= found.number >= found.first >= 1:
                return found
        except (DamagedError, TypeError):
            pass
        raise DamagedError(f"{where}: what closed the part is damaged")


def encode_lists(arrays: Mapping[str, tuple[int, Mapping[int, ShardRecord]]]) -> tuple[bytes, dict[str, Listed]]:
    """The list of a checkpoint, and where each array is in it, out of rows and shards (numbered without gaps) of every array."""
    pieces: list[bytes] = []
    listed: dict[str, Listed] = {}
    start = 0
    for path, (rows, shards) in arrays.items():
        found = [shards[number] for number in sorted(shards)]
        head = np.array([(shard.rows, len(shard.crcs), -1 if shard.nbytes is None else shard.nbytes) for shard in found], "<i8")
        piece = head.tobytes() + b"".join(shard.crcs.astype("<u4").tobytes() for shard in found)
        listed[path] = Listed(rows, len(found), start, len(piece), google_crc32c.value(piece))
        pieces.append(piece)
        start += len(piece)
    return b"".join(pieces), listed


def decode_list(data: bytes, listed: Listed, where: str) -> dict[int, ShardRecord]:
    """The shards of one array out of its bytes in a checkpoint's list."""
    if len(data) != listed.size or google_crc32c.value(data) != listed.crc:
        raise DamagedError(f"{where}: the list of shards is damaged (its checksum does not match)")
    if len(data) < 24 * listed.shards:
        raise DamagedError(f"{where}: the list of {listed.shards} shards has {len(data)} bytes")
    head = np.frombuffer(data, "<i8", 3 * listed.shards).reshape(-1, 3)
    # Each is looked at before their sum, which could come round to the right one.
    if (head[:, :2] < 0).any() or (head[:, 1] > len(data)).any() or 4 * int(head[:, 1].sum()) != len(data) - head.nbytes:
        raise DamagedError(f"{where}: the list of shards does not have the checksums that it says it has")
    crcs = np.split(np.frombuffer(data, "<u4", offset=head.nbytes), np.cumsum(head[:, 1])[:-1]) if listed.shards else []
    shards = zip(head[:, [0, 2]].tolist(), crcs, strict=True)
    return {number: ShardRecord(rows, found, None if size < 0 else size) for number, ((rows, size), found) in enumerate(shards)}


def digest(data: bytes) -> str:
    """What the next record states as `previous`."""
    return hashlib.sha256(data).hexdigest()


def _shards(document: Json) -> dict[int, ShardRecord]:
    for number in document:
        if not _NUMBER.fullmatch(number):
            raise checked.unexpected("the number of a shard", number, "an integer")
    return {int(number): ShardRecord.from_json(shard) for number, shard in document.items()}


def _aligned(span: list[Any]) -> tuple[str, int, int]:
    checked.of_kind(span[0], "the part of an aligned span", checked.TEXT)
    return span[0], *_span(*span[1:])


def _span(first: Any, count: Any) -> tuple[int, int]:
    return checked.number(first, "the first of a span"), checked.number(count, "the length of a span")


def _cost(name: str, cost: Any) -> Quantization:
    what = f"the quantization of {checked.shown(name)}"
    return Quantization(*(checked.finite(number, what) for number in checked.rows_of([cost], what, 3)[0]))


def _checkpoint(document: Json) -> dict[str, Any]:
    """What a record says of its checkpoint: the file of lists, and what is where in it."""
    checked.members(document, "the checkpoint", {"file": checked.TEXT, "arrays": checked.OBJECT})
    file, arrays = document["file"], document["arrays"]
    if file and not _LIST_FILE.fullmatch(file):
        raise checked.unexpected("the checkpoint's file", file, "the name of a list of shards")
    for path, numbers in arrays.items():
        checked.rows_of([checked.of_kind(numbers, checked.shown(path), checked.LIST)], "the checkpoint", 5)
        checked.numbers(numbers, f"the list of {checked.shown(path)}")
    return {"list_file": file, "listed": {path: Listed(*numbers) for path, numbers in arrays.items()}}


def _column(name: str, document: Any) -> ColumnSchema:
    try:
        return ColumnSchema.from_json(name, document)
    except SchemaError as error:  # what a writer would refuse
        raise DamagedError(str(error)) from None


def _framed(body: bytes) -> bytes:
    crc: int = google_crc32c.value(body)
    return _HEAD % crc + body + b"}"


def _body(data: bytes, where: str) -> bytes:
    body = data[_HEAD_BYTES:-1]
    if data != _framed(body):
        raise DamagedError(f"{where}: the commit record is damaged (its checksum does not match)")
    return body
