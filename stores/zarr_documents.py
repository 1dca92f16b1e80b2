"""`zarr.json` documents, made by zarr-python in memory and placed by us.

zarr-python decides what a valid document says; writing it ourselves gives it the same durability and atomic replacement as data.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from . import checked, codecs, dtypes, strict_json
from .errors import DamagedError
from .layout import Grid
from .schema import ArraySchema, ColumnSchema, Json

DOCUMENT = "zarr.json"


def group(attributes: Json | None = None) -> bytes:
    """The document of a group."""
    return _file({**_plain_group(), "attributes": attributes or {}})


def array(column: ColumnSchema, role: ArraySchema) -> Json:
    """The document of one array of a column, still without rows; `with_rows` makes it a file."""
    exact = {"positions": list(column.quantized.outliers)} if column.quantized is not None and role.name == "outliers" else {}
    attributes = {**column.attributes, "logical_dtype": role.dtype, "column": column.name, **exact}
    plain = _plain_array(role.dtype, role.shape, role.grid, _dimensions(column, role), role.codec)
    return {**plain, "attributes": attributes}


def with_rows(document: Json, rows: int) -> bytes:
    """The file of an array document for an array of `rows` rows."""
    return _file({**document, "shape": [rows, *document["shape"][1:]]})


def rows_of(file: bytes, document: Json) -> int | None:
    """The rows that an array's file states; None if in anything else it differs from the array's document."""
    rows = stated_rows(file)
    return rows if rows is not None and strict_json.parse(file, DOCUMENT) == json.loads(with_rows(document, rows)) else None


def stated_rows(file: bytes) -> int | None:
    """The rows that an array's file states; None if it is not the file of an array."""
    try:
        return checked.number(strict_json.parse(file, DOCUMENT)["shape"][0], "rows")
    except (DamagedError, KeyError, TypeError, IndexError):
        return None


def _dimensions(column: ColumnSchema, role: ArraySchema) -> tuple[str, ...]:
    features = column.axes if role.shape == column.shape else ("feature",) * len(role.shape)
    rows = column.table if role.name != "utf8" else "byte"
    return (rows, *features)


@cache
def _plain_group() -> Json:
    kept: dict[str, Any] = {}
    zarr.create_group(MemoryStore(kept), zarr_format=3)
    return _parsed(kept)


@cache
def _plain_array(dtype: str, shape: tuple[int, ...], grid: Grid, dimensions: tuple[str, ...], codec: str) -> Json:
    kept: dict[str, Any] = {}
    stored = dtypes.stored(dtype)
    zarr.create_array(
        MemoryStore(kept),
        shape=(0, *shape),
        chunks=grid.chunk,
        shards=grid.shard,
        dtype=stored.name,
        filters=None,
        compressors=[*codecs.zarr_codecs(codec, stored.itemsize), Crc32cCodec()],
        fill_value=dtypes.fill_value(dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=dimensions,
        zarr_format=3,
    )
    return _parsed(kept)


def _parsed(kept: dict[str, Any]) -> Json:
    document: Json = json.loads(kept[DOCUMENT].to_bytes())
    return document


def _file(document: Json) -> bytes:
    return json.dumps(document).encode()
