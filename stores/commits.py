"""Commit records: what a reader may see.

A record is one JSON file, `commits/<number>.json`, numbered from 1 without gaps in its part, created once and never replaced. It
looks like `{"crc32c":"0a1b2c3d","record":{...}}`; the checksum covers the bytes of the inner object exactly as they stand in the
file, so checking needs no canonical form of JSON. Each record carries the run's uid, its part, and the SHA-256 of the record before
it; once a part is closed, `end.json` repeats the number and digest of its last record. A record states the rows of every table, and
for every shard touched since the last record its rows and one crc32c per chunk over the committed rows; of several records that
name a shard the last one counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field

import google_crc32c
import numpy as np

from .dtypes import Array
from .errors import DamagedError, FormatVersionError
from .quantize import Quantization
from .schema import VERSION, ColumnSchema, Json

_HEAD = b'{"crc32c":"%08x","record":'
_HEAD_BYTES = len(_HEAD % 0)
KINDS = ("commit", "closed")
_PLAIN = ("run", "part", "number", "previous", "kind", "document", "rows", "nonfinite", "written")


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
    def from_json(cls, document: list[int | str]) -> ShardRecord:
        """The reverse of `to_json`."""
        rows, digits, *size = document
        return cls(int(rows), np.frombuffer(bytes.fromhex(str(digits)), "<u4"), *map(int, size))


@dataclass(frozen=True)
class Record:
    """One commit of one part."""

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

    def encode(self) -> bytes:
        """The file's bytes."""
        body = json.dumps(self._to_json(), separators=(",", ":"), allow_nan=False).encode()
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
            **({"quantization": {name: astuple(cost) for name, cost in self.quantization.items()}} if self.quantization else {}),
        }

    def _array_json(self, path: str) -> Json:
        shards = self.shards.get(path, {})
        return {"rows": self.array_rows[path], "shards": {str(number): shard.to_json() for number, shard in shards.items()}}

    @classmethod
    def decode(cls, data: bytes, where: str) -> Record:
        """The record in a file; DamagedError if it is not what was written, FormatVersionError if it is of a later version."""
        document = json.loads(_body(data, where))
        version, kind = document.get("version"), document.get("kind")
        if version != VERSION or kind not in KINDS:
            raise FormatVersionError(
                f"{where} is a record of kind {kind!r} and format version {version!r}; this tensortape reads {' and '.join(KINDS)} "
                f"records of version {VERSION}: update tensortape"
            )
        return cls._from_json(document)

    @classmethod
    def _from_json(cls, document: Json) -> Record:
        arrays = document["arrays"]
        return cls(
            **{key: document[key] for key in _PLAIN},
            columns={name: ColumnSchema.from_json(name, schema) for name, schema in document["columns"].items()},
            array_rows={path: array["rows"] for path, array in arrays.items()},
            shards={path: _shards(array["shards"]) for path, array in arrays.items()},
            aligned=tuple((part, first, count) for part, first, count in document["aligned"]),
            quantization={name: Quantization(*cost) for name, cost in document.get("quantization", {}).items()},
        )


def path_of(part: str, number: int) -> str:
    """Where a record lies."""
    return f"parts/{part}/commits/{number:012d}.json"


def end_path(part: str) -> str:
    """Where a closed part states which record is its last, so that a missing one is noticed."""
    return f"parts/{part}/end.json"


def end(number: int, last: str) -> bytes:
    """The file at `end_path`: number and digest of the last record."""
    return json.dumps({"number": number, "digest": last}).encode()


def digest(data: bytes) -> str:
    """What the next record states as `previous`."""
    return hashlib.sha256(data).hexdigest()


def _shards(document: Json) -> dict[int, ShardRecord]:
    return {int(number): ShardRecord.from_json(shard) for number, shard in document.items()}


def _framed(body: bytes) -> bytes:
    crc: int = google_crc32c.value(body)
    return _HEAD % crc + body + b"}"


def _body(data: bytes, where: str) -> bytes:
    body = data[_HEAD_BYTES:-1]
    if data != _framed(body):
        raise DamagedError(f"{where}: the commit record is damaged (its checksum does not match)")
    return body
