"""A part being written: claimed, filled, committed.

Order within a commit: shards, then the shapes of all columns, then `start.*` and `length.*`, then `example/id`, then the record.
A plain Zarr reader that goes by `example/id` therefore finds every example it lists complete; our readers go by the record.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from . import commits, dtypes, layout, zarr_documents
from .buffers import RowBuffer
from .commits import Record, ShardRecord
from .dtypes import Array
from .errors import LostPartError, SchemaError
from .part_state import part_names
from .places import Place
from .ragged import Cells, text_bytes
from .schema import ColumnSchema, Json, PartDocument, column_schema, stored_arrays
from .shards import encode

_THREADS = min(4, os.cpu_count() or 1)
_WIDE_BYTES = 2**20


@dataclass(frozen=True)
class Description:
    """What a writer may say of a column beyond its values."""

    axes: tuple[str, ...] | None = None
    site: Json | None = None
    attributes: Json = field(default_factory=dict)


def claim(place: Place, document: PartDocument) -> tuple[str, str]:
    """Take the next free part number: (name, digest of the part document). Several writers may try at once; each gets its own."""
    content = zarr_documents.group(document.to_attributes())
    number = max((int(name[1:]) + 1 for name in part_names(place)), default=0)
    while True:
        name = f"p{number:06d}"
        try:
            place.create(f"parts/{name}/zarr.json", [content])
        except FileExistsError:
            number += 1
        else:
            return name, commits.digest(content)


Kind = tuple[str, tuple[int, ...]]  # logical dtype and feature shape of a column


class PartWriter:
    """One part, from its first rows to its closing record."""

    def __init__(self, place: Place, document: PartDocument, budget: int, known: Mapping[str, Kind] | None = None) -> None:
        self._known = known or {}
        self._place = place
        self._document = document
        self._budget = budget
        self._schemas: dict[str, ColumnSchema] = {}
        self._buffers: dict[str, RowBuffer] = {}
        self._templates: dict[str, Json] = {}
        self._touched: dict[str, dict[int, ShardRecord]] = {}
        self._committed: dict[str, int] = {}
        self._number = 0
        self._previous = ""
        self.rows: dict[str, int] = {}
        self.written = 0
        self.name = ""
        self._digest = ""

    @property
    def held_bytes(self) -> int:
        """Bytes in buffers: what the next commit has to write as tails."""
        return sum(buffer.held_bytes for buffer in self._buffers.values())

    def prepare(self, given: Mapping[str, Cells], descriptions: Mapping[str, Description]) -> None:
        """Fix the columns by what the first append gives, and check every later one against them; writes nothing.

        Raises:
            SchemaError: other columns, dtypes or shapes than before. BudgetError: the buffers do not fit.
        """
        if not self._schemas:
            self._check_known(given)
            schemas = self._plan(given, descriptions)
            roles = [role for schema in schemas.values() for role in schema.arrays.values()]
            self._schemas, self._buffers = schemas, {role.path: RowBuffer(role) for role in roles}
            self.rows = dict.fromkeys(sorted({schema.table for schema in schemas.values()}), 0)
        layout.check(self._budget, 0, _size(given))
        self._check(given)

    def append(self, given: dict[str, Cells]) -> None:
        """Add one row group: cells of every column, consistent with one another and prepared. `given` is emptied on the way."""
        if not self.name:
            self.name, self._digest = claim(self._place, self._document)
            self._write_groups()
        added = {self._schemas[name].table: column.rows for name, column in given.items()}
        self.written += self._take_all(given)
        for table, rows in added.items():
            self.rows[table] += rows

    def commit(self, kind: str = "commit", aligned: Sequence[tuple[str, int, int]] = (), nonfinite: Mapping[str, int] = {}) -> None:
        """Make everything appended so far visible."""
        self._write_tails()
        self._place.settle()
        for wave in range(3):
            self._write_shapes(wave)
            self._place.settle()
        self._write_record(kind, tuple(aligned), nonfinite)
        self._place.settle()
        if kind == "closed":
            self._write_end()
            self._place.settle()

    def _plan(self, given: Mapping[str, Cells], descriptions: Mapping[str, Description]) -> dict[str, ColumnSchema]:
        kinds = {name: self._known.get(name, (column.dtype, column.shape)) for name, column in given.items()}
        arrays = [array for dtype, shape in kinds.values() for array in stored_arrays(dtype, shape)]
        shard_bytes = layout.shard_bytes_for(self._budget, arrays, _size(given))
        return {
            name: column_schema(name, *kind, shard_bytes=shard_bytes, **vars(descriptions.get(name, Description())))
            for name, kind in kinds.items()
        }

    def _check_known(self, given: Mapping[str, Cells]) -> None:
        """A column that the run has from earlier sessions must stay what it is."""
        for name, column in given.items():
            _check_kind(name, self._known.get(name, (column.dtype, column.shape)), column)

    def _write_end(self) -> None:
        try:
            self._place.create(commits.end_path(self.name), [commits.end(self._number, self._previous)])
        except FileExistsError:
            raise LostPartError(f"part {self.name} was closed by somebody else") from None

    def _write_groups(self) -> None:
        document = [zarr_documents.group()]
        folders = group_folders(self._schemas.values())
        self._place.each(lambda folder: self._place.replace(f"parts/{self.name}/{folder}/zarr.json", document), folders)
        for schema in self._schemas.values():
            for role in schema.arrays.values():
                self._templates[role.path] = zarr_documents.array(schema, role)

    def _check(self, given: Mapping[str, Cells]) -> None:
        if given.keys() != self._schemas.keys():
            missing, new = sorted(self._schemas.keys() - given.keys()), sorted(given.keys() - self._schemas.keys())
            raise SchemaError(f"every append needs the same columns as the first; missing: {missing}, new: {new}")
        for name, column in given.items():
            schema = self._schemas[name]
            _check_kind(name, (schema.dtype, schema.shape), column)

    def _take_all(self, given: dict[str, Cells]) -> int:
        """Columns share nothing, so several threads take the wide ones: one cannot write and checksum at a raw file's speed."""
        wide = [name for name, column in given.items() if column.nbytes >= _WIDE_BYTES]
        narrow = [name for name in given if name not in wide]
        written = sum(self._take(self._schemas[name], given.pop(name)) for name in narrow)
        if not wide:
            return written
        with ThreadPoolExecutor(_THREADS) as pool:
            return written + sum(pool.map(lambda name: self._take(self._schemas[name], given.pop(name)), wide))

    def _take(self, schema: ColumnSchema, column: Cells) -> int:
        written = 0
        for block in column.blocks:
            if schema.dtype != dtypes.TEXT:
                written += self._push(schema.arrays["values"].path, block)
                continue
            utf8, end = schema.arrays["utf8"].path, schema.arrays["end"].path
            text, ends = text_bytes(block, self._buffers[utf8].rows)
            written += self._push(utf8, text) + self._push(end, ends)
        return written

    def _push(self, path: str, block: Array) -> int:
        return sum(self._write_shard(path, number, rows) for number, rows in self._buffers[path].take(block))

    def _write_shard(self, path: str, number: int, rows: Array) -> int:
        buffer = self._buffers[path]
        encoded = encode(rows, buffer.geometry, dtypes.fill_value(buffer.schema.dtype))
        self._place.replace(shard_path(self.name, path, number, rows.ndim), encoded.buffers)
        self._touched.setdefault(path, {})[number] = ShardRecord(len(rows), encoded.crcs)
        return buffer.geometry.file_bytes(len(rows))

    def _write_tails(self) -> None:
        buffers = self._buffers.items()
        waiting = [(path, buffer) for path, buffer in buffers if buffer.held and buffer.rows != self._committed.get(path, 0)]
        self.written += sum(self._place.each(lambda one: self._write_shard(one[0], one[1].shard, one[1].tail()), waiting))

    def _write_shapes(self, wave: int) -> None:
        schemas = self._schemas.values()
        paths = [role.path for schema in schemas for role in schema.arrays.values() if _wave(schema, role.name) == wave]
        self._place.each(self._write_shape, paths)

    def _write_shape(self, path: str) -> None:
        document = zarr_documents.with_rows(self._templates[path], self._buffers[path].rows)
        self._place.replace(f"parts/{self.name}/{path}/zarr.json", [document])

    def _write_record(self, kind: str, aligned: tuple[tuple[str, int, int], ...], nonfinite: Mapping[str, int]) -> None:
        rows = {path: buffer.rows for path, buffer in self._buffers.items()}
        changed = {path: count for path, count in rows.items() if count != self._committed.get(path, -1)}
        record = Record(
            run=self._document.run,
            part=self.name,
            number=self._number + 1,
            previous=self._previous,
            kind=kind,
            document=self._digest,
            rows=self.rows,
            columns={} if self._number else self._schemas,
            array_rows=changed,
            shards=self._touched,
            aligned=aligned,
            nonfinite=nonfinite,
            written=self.written,
        ).encode()
        try:
            self._place.create(commits.path_of(self.name, self._number + 1), [record])
        except FileExistsError:
            raise LostPartError(
                f"part {self.name} was continued or sealed by somebody else; nothing of theirs was changed"
            ) from None
        self._number, self._previous = self._number + 1, commits.digest(record)
        self._committed, self._touched = rows, {}


def group_folders(schemas: Iterable[ColumnSchema]) -> list[str]:
    """The folders of a part that are Zarr groups: tables, and columns of several arrays."""
    paths = [role.path for schema in schemas for role in schema.arrays.values()]
    return sorted({path.rpartition("/")[0] for path in paths} | {path.partition("/")[0] for path in paths})


def _size(given: Mapping[str, Cells]) -> int:
    return sum(column.nbytes for column in given.values())


def _check_kind(name: str, kind: Kind, column: Cells) -> None:
    if column.rows and (column.dtype, column.shape) != kind:
        dtype, shape = kind
        raise SchemaError(
            f"column {name!r} holds {dtype} rows of shape {shape}, but got {column.dtype} rows of shape {column.shape}"
        )


def shard_path(part: str, array: str, number: int, ndim: int) -> str:
    """Where a shard lies: Zarr's default chunk key with dots."""
    return f"parts/{part}/{array}/c.{number}{'.0' * (ndim - 1)}"


def _wave(schema: ColumnSchema, role: str) -> int:
    """Columns first, then the example table's own bookkeeping, then what lists the examples."""
    if schema.name == "example/id":
        return 1 if role == "utf8" else 2
    return 1 if schema.name.startswith(("example/start.", "example/length.")) else 0


def key_columns(ids: Array, phases: Array, steps: Array) -> dict[str, Cells]:
    """`id`, `phase` and `step` of the examples of one append; ids are int64 or an object array of text."""
    return {
        "example/id": Cells(dtypes.TEXT if ids.dtype == object else "int64", (), [ids], None),
        "example/phase": Cells(dtypes.TEXT, (), [phases], None),
        "example/step": Cells("int64", (), [steps], None),
    }


def start_columns(lengths: Mapping[str, Array], rows: Mapping[str, int]) -> dict[str, Cells]:
    """`start.<table>` and `length.<table>` of the examples of one append, given the rows the part already has."""
    found = {}
    for table, length in lengths.items():
        start = rows.get(table, 0) + np.cumsum(length) - length
        found[f"example/start.{table}"] = Cells("int64", (), [start], None)
        found[f"example/length.{table}"] = Cells("int64", (), [length], None)
    return found
