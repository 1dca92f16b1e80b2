"""What a run says of itself: format version, documents of run and part, columns and their arrays.

Everything here is a frozen value with a strict way to and from JSON. The schema of a column is written once, in the first commit
record of each part; there is no second copy that could disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import checked, codecs, dtypes, layout, names, strict_json
from .errors import DamagedError, FormatVersionError, SchemaError
from .layout import NO_GRID, Grid, plan
from .quantize import DTYPES as QUANTIZED
from .quantize import Int8

FORMAT = "tensortape"
VERSION = 1

Json = dict[str, Any]

MOST_AXES = 16
_ARRAY = {
    **dict.fromkeys(("path", "dtype", "codec"), checked.TEXT),
    **dict.fromkeys(("shape", "chunk", "shard"), checked.LIST),
}
_COLUMN = {
    "dtype": checked.TEXT,
    "shape": checked.LIST,
    "axes": checked.LIST,
    "arrays": checked.OBJECT,
    "site": checked.OPTIONAL_OBJECT,
    "attributes": checked.OBJECT,
}
_RUN = {"uid": checked.TEXT, **dict.fromkeys(("model", "provenance", "fingerprint", "policy"), checked.OBJECT)}
_PART = {
    **dict.fromkeys(("run", "session", "kind", "writer", "nonce"), checked.TEXT),
    **dict.fromkeys(("rank", "world_size"), checked.COUNT),
    "from_step": checked.OPTIONAL_COUNT,
}


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
    def from_json(cls, due: ArraySchema, document: Any) -> ArraySchema:
        """The reverse of `to_json`, of which all but grid and codec follow from the column: it must be what is `due`.

        Raises:
            DamagedError; FormatVersionError for a codec or dtype of a later version.
        """
        what = f"array {due.path!r}"
        checked.members(document, what, _ARRAY)
        if document["codec"] not in codecs.NAMES or document["dtype"] not in dtypes.KNOWN:
            raise FormatVersionError(
                f"{what} has the dtype {checked.shown(document['dtype'])} and uses the codec {checked.shown(document['codec'])}; "
                "update tensortape to read it"
            )
        if (document["path"], document["dtype"], document["shape"]) != (due.path, due.dtype, list(due.shape)):
            said = f"{checked.shown(document['path'])}, {document['dtype']}, {checked.shown(document['shape'])}"
            raise DamagedError(f"{what} is said to be {said}; its column makes it {due.path!r}, {due.dtype}, {list(due.shape)}")
        grid = Grid(*(checked.numbers(document[key], f"{key!r} of {what}", 1) for key in ("chunk", "shard")))
        layout.check_grid(grid, due.shape, dtypes.stored(due.dtype).itemsize, what)
        return replace(due, grid=grid, codec=document["codec"])


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
        """The reverse of `to_json`; DamagedError for what no writer says, FormatVersionError for what a later version may say."""
        try:
            key = name, repr(document)
        except RecursionError:
            raise DamagedError(f"column {checked.shown(name)} is nested too deeply") from None
        if key not in _CHECKED:
            found = cls._from_json(name, document)
            if len(_CHECKED) >= _MOST_CHECKED:
                _CHECKED.clear()
            if len(key[1]) > _LONGEST_CHECKED:
                return found
            _CHECKED[key] = found
        return _CHECKED[key]

    @classmethod
    def _from_json(cls, name: str, document: Any) -> ColumnSchema:
        what = f"column {checked.shown(name)}"
        checked.members(document, what, _COLUMN, {"quantized": checked.OBJECT})
        dtype, shape = _checked_dtype(document["dtype"], what), _checked_shape(document["shape"], what)
        axes = tuple(checked.of_kind(axis, f"an axis of {what}", checked.TEXT) for axis in document["axes"])
        if len(axes) != len(shape):
            raise DamagedError(f"{what} has {len(axes)} axes, but the feature shape {shape}")
        quantized = Int8.from_json(document["quantized"], math.prod(shape)) if "quantized" in document else None
        if (quantized and dtype not in QUANTIZED) or (dtype == dtypes.TEXT and shape):
            raise DamagedError(f"{what} of {dtype} cannot have the feature shape {shape}, or be quantised")
        arrays = _checked_arrays(document["arrays"], _due(name, dtype, shape, quantized), what)
        for key in ("site", "attributes"):
            if document[key]:
                strict_json.check_shallow(document[key], f"{key!r} of {what}")
        return cls(name, dtype, shape, axes, arrays, document["site"], document["attributes"], quantized)


_CHECKED: dict[tuple[str, str], ColumnSchema] = {}  # parts of a run repeat their columns: each is checked once
_MOST_CHECKED, _LONGEST_CHECKED = 4096, 4096


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
    arrays = {}
    for role, due in _due(name, dtype, shape, quantized).items():
        grid = plan(due.shape, dtypes.stored(due.dtype).itemsize, shard_bytes)
        arrays[role] = replace(due, grid=grid, codec=_codec_of(role, codec))
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


def _due(name: str, dtype: str, shape: tuple[int, ...], quantized: Int8 | None) -> dict[str, ArraySchema]:
    """The arrays of a column, still without grid and codec. Where they lie follows from its name."""
    table, column = names.split(name)
    path = f"{names.to_disk(table)}/{names.to_disk(column)}"
    return {
        role: ArraySchema(role, path if role == "values" else f"{path}/{role}", kind, of, NO_GRID)
        for role, (kind, of) in _roles(dtype, shape, quantized).items()
    }


def _checked_dtype(dtype: str, what: str) -> str:
    if dtype not in dtypes.KNOWN and dtype != dtypes.TEXT:
        raise FormatVersionError(f"{what} has the dtype {checked.shown(dtype)}; update tensortape to read it")
    return dtype


def _checked_shape(shape: list[Any], what: str) -> tuple[int, ...]:
    found = checked.numbers(shape, f"the feature shape of {what}", 1)
    if len(found) > MOST_AXES or math.prod(found) > checked.MOST:
        raise DamagedError(f"{what} has a feature shape of {len(found)} axes and {math.prod(found)} values, more than any run has")
    return found


def _checked_arrays(document: Json, due: dict[str, ArraySchema], what: str) -> dict[str, ArraySchema]:
    if document.keys() != due.keys():
        raise DamagedError(f"{what} has the roles {checked.shown(sorted(document))}, where {sorted(due)} were expected")
    return {role: ArraySchema.from_json(array, document[role]) for role, array in due.items()}


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
        with checked.named(where):
            checked.members(document, "the run document", _RUN, {"session": checked.TEXT})
            strict_json.check_shallow(document, "the run document")
        return cls(**{key: document[key] for key in _RUN}, session=document.get("session", ""))


@dataclass(frozen=True)
class PartDocument:
    """What one writer said of itself when it claimed a part. `kind` is `base` or `extension`; `nonce` is the writer's alone.

    `from_step` supersedes what earlier sessions recorded at that training step or later.
    """

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
        """The reverse; FormatVersionError for a newer format."""
        document = _ours(attributes, where)
        _check_version(document, where)
        with checked.named(where):
            said = checked.members(document.get("part"), "the part document", {"run": checked.TEXT, "session": checked.TEXT}, _PART)
        if unknown := said.keys() - _PART.keys():
            raise DamagedError(f"{where}: not a part document (it has {checked.shown(sorted(unknown))})")
        return cls(**said)


def _check_version(document: Json, where: str) -> None:
    if type(document["version"]) is not int or document["version"] != VERSION:
        raise FormatVersionError(
            f"{where} is a tensortape run of format version {checked.shown(document['version'])}, but this "
            f"tensortape reads version {VERSION}; update tensortape"
        )


def _ours(attributes: Json, where: str) -> Json:
    document = attributes.get(FORMAT)
    if not isinstance(document, dict) or "version" not in document:
        raise SchemaError(f"{where} is a Zarr group, but not one of tensortape's")
    return document
