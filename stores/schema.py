"""What a run says of itself: format version, documents of run and part, columns and their arrays.

Everything here is a frozen value with a strict way to and from JSON. The schema of a column is written once, in the first commit
record of each part; there is no second copy that could disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import codecs, dtypes, names
from .errors import DamagedError, FormatVersionError, SchemaError
from .layout import Grid, plan
from .quantize import Int8

FORMAT = "tensortape"
VERSION = 1

Json = dict[str, Any]


@dataclass(frozen=True)
class ArraySchema:
    """One Zarr array of a column: its role in the column, path in the part, logical dtype, feature shape and grid."""

    name: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    grid: Grid
    codec: str = codecs.NONE

    def __post_init__(self) -> None:
        # A compressed chunk is expanded as a whole, however few bytes of a run claim to be one.
        size = math.prod(self.grid.chunk) * dtypes.stored(self.dtype).itemsize
        if self.codec != codecs.NONE and size > codecs.LARGEST_CHUNK:
            raise SchemaError(
                f"array {self.path!r} has chunks of {size} bytes, but at most {codecs.LARGEST_CHUNK} can be compressed; use 'none'"
            )

    def to_json(self) -> Json:
        """As stored in a commit record."""
        return {
            "path": self.path,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "chunk": list(self.grid.chunk),
            "shard": list(self.grid.shard),
            "codec": self.codec,
        }

    @classmethod
    def from_json(cls, name: str, document: Json) -> ArraySchema:
        """The reverse of `to_json`; FormatVersionError for a codec of a later version."""
        if document["codec"] not in codecs.NAMES:
            raise FormatVersionError(
                f"array {document['path']!r} uses the codec {document['codec']!r}; update tensortape to read it"
            )
        grid = Grid(tuple(document["chunk"]), tuple(document["shard"]))
        return cls(name, document["path"], document["dtype"], tuple(document["shape"]), grid, document["codec"])


@dataclass(frozen=True)
class ColumnSchema:
    """A column of one part. `arrays` maps roles to arrays: `values`, or for text `utf8` and `end`, or if it is `quantized` `codes`,
    `scale` and perhaps `outliers`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    arrays: Mapping[str, ArraySchema]
    site: Json | None = None
    attributes: Json = field(default_factory=dict)
    quantized: Int8 | None = None

    @property
    def table(self) -> str:
        """The table whose rows this column has values on."""
        return names.split(self.name)[0]

    @property
    def itemsize(self) -> int:
        """Bytes per value on disk; 0 for text."""
        return 0 if self.dtype == dtypes.TEXT else dtypes.stored(self.dtype).itemsize

    def to_json(self) -> Json:
        """As stored in a commit record."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "axes": list(self.axes),
            "arrays": {role: array.to_json() for role, array in self.arrays.items()},
            "site": self.site,
            "attributes": self.attributes,
            **({} if self.quantized is None else {"quantized": self.quantized.to_json()}),
        }

    @classmethod
    def from_json(cls, name: str, document: Json) -> ColumnSchema:
        """The reverse of `to_json`."""
        arrays = {role: ArraySchema.from_json(role, array) for role, array in document["arrays"].items()}
        shape, axes = tuple(document["shape"]), tuple(document["axes"])
        quantized = Int8.from_json(document["quantized"]) if "quantized" in document else None
        return cls(name, document["dtype"], shape, axes, arrays, document["site"], document["attributes"], quantized)


def column_schema(
    name: str,
    dtype: str,
    shape: tuple[int, ...] = (),
    *,
    shard_bytes: int,
    axes: tuple[str, ...] | None = None,
    site: Json | None = None,
    attributes: Json | None = None,
    codec: str = codecs.NONE,
    quantized: Int8 | None = None,
) -> ColumnSchema:
    """The schema of a new column: where its arrays lie, how they are cut and coded."""
    if 0 in shape:
        raise SchemaError(f"column {name!r} has the feature shape {shape}; every axis needs at least one value")
    if axes is not None and len(axes) != len(shape):
        raise SchemaError(f"column {name!r} has the feature shape {shape}, but the axes {axes}; name each feature axis")
    table, column = names.split(name)
    path = f"{names.to_disk(table)}/{names.to_disk(column)}"
    arrays = {}
    for role, (kind, of) in _roles(dtype, shape, quantized).items():
        where = path if role == "values" else f"{path}/{role}"
        grid = plan(of, dtypes.stored(kind).itemsize, shard_bytes)
        arrays[role] = ArraySchema(role, where, kind, of, grid, _codec_of(role, codec))
    return ColumnSchema(name, dtype, shape, axes or _axes(len(shape)), arrays, site, attributes or {}, quantized)


def stored_arrays(
    dtype: str, shape: tuple[int, ...], *, codec: str = codecs.NONE, quantized: Int8 | None = None
) -> list[tuple[tuple[int, ...], int]]:
    """(feature shape, itemsize) of the arrays that a column is kept in; SchemaError for an empty axis.

    Compressed arrays stand there twice: while a shard is written, its frames take memory beside its rows.
    """
    if 0 in shape:
        raise SchemaError(f"a column has the feature shape {shape}; every axis needs at least one value")
    roles = _roles(dtype, shape, quantized)
    times = {role: 1 if _codec_of(role, codec) == codecs.NONE else 2 for role in roles}
    return [(of, dtypes.stored(kind).itemsize) for role, (kind, of) in roles.items() for _ in range(times[role])]


def _roles(dtype: str, shape: tuple[int, ...], quantized: Int8 | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Logical dtype and feature shape of every array of a column."""
    if dtype == dtypes.TEXT:
        return {"utf8": ("uint8", ()), "end": ("int64", ())}
    return {"values": (dtype, shape)} if quantized is None else quantized.roles(dtype, shape)


def _codec_of(role: str, codec: str) -> str:
    """Scales are few bytes, read with every row: not worth a frame."""
    return codecs.NONE if role == "scale" else codec


def _axes(count: int) -> tuple[str, ...]:
    return ("feature",) if count == 1 else tuple(f"feature.{number}" for number in range(count))


@dataclass(frozen=True)
class RunDocument:
    """The root document: format, identity, and what was known before the first example."""

    uid: str
    model: Json = field(default_factory=dict)
    provenance: Json = field(default_factory=dict)
    fingerprint: Json = field(default_factory=dict)
    policy: Json = field(default_factory=dict)
    session: str = ""  # the one that began it

    def to_attributes(self) -> Json:
        """Attributes of the root group."""
        body = {"uid": self.uid, "session": self.session, "model": self.model, "provenance": self.provenance}
        return {FORMAT: {"version": VERSION, **body, "fingerprint": self.fingerprint, "policy": self.policy}}

    @classmethod
    def from_attributes(cls, attributes: Json, where: str) -> RunDocument:
        """The reverse; FormatVersionError for a newer format."""
        document = _ours(attributes, where)
        _check_version(document, where)
        try:
            needed = {key: document[key] for key in ("uid", "model", "provenance", "fingerprint", "policy")}
            return cls(**needed, session=document.get("session", ""))
        except KeyError as error:
            raise DamagedError(f"{where}: the run document has no {error}") from None


@dataclass(frozen=True)
class PartDocument:
    """What one writer said of itself when it claimed a part. `kind` is `base` or `extension`; `nonce` is the writer's alone."""

    run: str
    session: str
    kind: str = "base"
    rank: int = 0
    world_size: int = 1
    from_step: int | None = None
    writer: str = ""
    nonce: str = ""

    def to_attributes(self) -> Json:
        """Attributes of the part's group."""
        return {FORMAT: {"version": VERSION, "part": {name: getattr(self, name) for name in self.__dataclass_fields__}}}

    @classmethod
    def from_attributes(cls, attributes: Json, where: str) -> PartDocument:
        """The reverse; FormatVersionError for a rewinding part, which a later version writes."""
        document = _ours(attributes, where)
        _check_version(document, where)
        try:
            part = cls(**document["part"])
        except (KeyError, TypeError) as error:
            raise DamagedError(f"{where}: not a part document ({error})") from None
        if part.from_step is not None:
            raise FormatVersionError(f"{where} rewinds to step {part.from_step}; update tensortape to read it")
        return part


def _check_version(document: Json, where: str) -> None:
    if document["version"] != VERSION:
        raise FormatVersionError(
            f"{where} is a tensortape run of format version {document['version']!r}, but this tensortape reads version {VERSION}; "
            "update tensortape"
        )


def _ours(attributes: Json, where: str) -> Json:
    document = attributes.get(FORMAT)
    if not isinstance(document, dict) or "version" not in document:
        raise SchemaError(f"{where} is a Zarr group, but not one of tensortape's")
    return document
