"""What the records of one part must add up to. Each of them may be right by itself; together they must describe one part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import checked, dtypes, names
from .commits import ShardRecord
from .dtypes import Array
from .errors import DamagedError
from .geometry import Geometry
from .schema import ColumnSchema, Json

if TYPE_CHECKING:
    from .part_state import PartState

_KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "example": {"example/id": (dtypes.TEXT, "int64"), "example/phase": (dtypes.TEXT,), "example/step": ("int64",)},
    "step": {"step/step": ("int64",)},
}
_SITE = {
    **dict.fromkeys(("path", "port"), checked.TEXT),
    "call": checked.COUNT,
    "aliases": checked.LIST,
    "reduce": checked.OPTIONAL_TEXT,
    "layout": checked.OPTIONAL_TEXT,
    "attention": checked.OPTIONAL_OBJECT,
    "projection": checked.OPTIONAL_OBJECT,
}
_DOCUMENTS = ("zarr.json", "parts/{}/zarr.json")  # of which records hold copies


def check_part(part: PartState) -> None:
    """DamagedError unless rows, columns, keys and spans of a part fit one another; its name is in front."""
    with checked.named(f"parts/{part.name}"):
        _check_names(part)
        if not part.columns:
            return
        for column in part.columns.values():
            _check_rows(part, column)
            if column.site:
                _check_site(column, column.site)
        _check_tables(part)
        for name, kinds in _KEYS[part.key_table].items():
            _check_key(part, name, kinds)
        for table in filter(names.is_ragged, {*part.rows, *(column.table for column in part.columns.values())}):
            for kind in ("start", "length"):
                _check_key(part, f"example/{kind}.{table}", ("int64",))
        _check_withdrawn(part)


def check_shards(path: str, shards: Mapping[int, ShardRecord], rows: int, geometry: Geometry) -> None:
    """DamagedError unless shards are numbered without gaps, full but for the last, and have the checksums of an array's rows."""
    count = -(-rows // geometry.shard_rows)
    if len(shards) != count or (shards and (min(shards) < 0 or max(shards) != count - 1)):
        raise DamagedError(f"{path}: {rows} rows take {count} shards, but the commit records name {len(shards)} others")
    for number, shard in shards.items():
        due = min(geometry.shard_rows, rows - number * geometry.shard_rows)
        sized = (shard.nbytes is None) == (geometry.codec == "none")
        if shard.rows != due or len(shard.crcs) != geometry.chunks_for(due) or not sized:
            raise DamagedError(
                f"{path}: shard {number} is said to have {shard.rows} rows and {len(shard.crcs)} checksums, but has {due} rows and "
                f"{geometry.chunks_for(due)} chunks"
            )


def check_bounds(path: str, table: str, start: Array, length: Array, rows: int) -> None:
    """DamagedError unless examples own rows of a table, in order and none twice."""
    if not len(start):
        return
    inside = start.min() >= 0 and length.min() >= 0 and not (start > rows - length).any()
    if not inside or (start[1:] < start[:-1] + length[:-1]).any():
        raise DamagedError(f"{path}: examples are said to have rows of table {table!r} that it does not have, or another has")


def _check_names(part: PartState) -> None:
    documents = {path.format(part.name) for path in _DOCUMENTS}
    if wrong := [path for path in part.copies if path not in documents]:
        raise checked.unexpected("the path of a copy", wrong[0], "that of the run's or the part's document")
    if wrong := [name for name in part.assets if not names.is_on_disk(name)]:
        raise checked.unexpected("the name of an asset", wrong[0], "a name on disk")


def _check_tables(part: PartState) -> None:
    """A part holds training steps, or examples and what belongs to them."""
    for name, column in part.columns.items():
        if (column.table == "step") != (part.key_table == "step"):
            raise DamagedError(f"column {name!r} stands in a part that holds rows of table {part.key_table!r}")


def _check_rows(part: PartState, column: ColumnSchema) -> None:
    """Every array has a row for every row of its column's table, but for the bytes of texts."""
    due = part.rows.get(column.table, 0)
    for role, array in column.arrays.items():
        state = part.arrays.get(array.path)
        rows = 0 if state is None else state.rows
        if role != "utf8" and rows != due:
            raise DamagedError(f"array {array.path!r} has {rows} rows, but its table {column.table!r} has {due}")


def _check_key(part: PartState, name: str, kinds: tuple[str, ...]) -> None:
    column = part.columns.get(name)
    if column is None or column.dtype not in kinds or column.shape:
        said = "missing" if column is None else f"{column.dtype} {column.shape}"
        raise DamagedError(f"column {name!r} is {said}, where one value of {' or '.join(kinds)} for each example was expected")


def _check_site(column: ColumnSchema, site: Json) -> None:
    """What is said of a site is what selecting by it goes by."""
    what = f"the site of column {column.name!r}"
    checked.members(site, what, {key: kind for key, kind in _SITE.items() if key in site})
    for alias in checked.rows_of(site.get("aliases", []), f"an alias in {what}", 4):
        kinds = (checked.TEXT, checked.TEXT, checked.OPTIONAL_COUNT, checked.COUNT)
        for value, kind in zip(alias, kinds, strict=True):
            checked.of_kind(value, f"an alias in {what}", kind)


def _check_withdrawn(part: PartState) -> None:
    """Spans of examples, in order and none twice."""
    end = 0
    for first, count in part.withdrawn:
        if first < end:
            raise DamagedError(f"withdrawn examples from {first} on, after those to {end}")
        end = first + count
    if end > part.examples:
        raise DamagedError(f"withdrawn examples to {end}, of {part.examples}")
