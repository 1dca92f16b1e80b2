"""`zarr.json` documents, made by zarr-python in memory and placed by us.

zarr-python decides what a valid document says; writing it ourselves gives it the same durability and atomic replacement as data.
"""

from __future__ import annotations

import json
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from . import dtypes
from .schema import ArraySchema, ColumnSchema, Json

DOCUMENT = "zarr.json"


def group(attributes: dict[str, Any] | None = None) -> bytes:
    """The document of a group."""
    kept: dict[str, Any] = {}
    zarr.create_group(MemoryStore(kept), attributes=attributes, zarr_format=3)
    return bytes(kept[DOCUMENT].to_bytes())


def array(column: ColumnSchema, role: ArraySchema) -> Json:
    """The document of one array of a column, still without rows; `with_rows` makes it a file."""
    kept: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(kept),
        shape=(0, *role.shape),
        chunks=role.grid.chunk,
        shards=role.grid.shard,
        dtype=dtypes.stored(role.dtype).name,
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=dtypes.fill_value(role.dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=_dimensions(column, role),
        attributes={"logical_dtype": role.dtype, "column": column.name, **column.attributes},
        zarr_format=3,
    )
    document: Json = json.loads(kept[DOCUMENT].to_bytes())
    return document


def with_rows(document: Json, rows: int) -> bytes:
    """The file of an array document for an array of `rows` rows."""
    return json.dumps({**document, "shape": [rows, *document["shape"][1:]]}, indent=2).encode()


def shape_of(document: bytes) -> tuple[int, ...]:
    """The shape an array document states."""
    return tuple(json.loads(document)["shape"])


def _dimensions(column: ColumnSchema, role: ArraySchema) -> list[str]:
    features = column.axes if role.shape == column.shape else ("feature",) * len(role.shape)
    rows = column.table if role.name != "utf8" else "byte"
    return [rows, *features]
