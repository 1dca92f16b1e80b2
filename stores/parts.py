"""A part being written: claimed, filled, committed.

Order within a commit: shards, then the shapes of all columns, then `start.*` and `length.*`, then `example/id`, then the record.
A plain Zarr reader that goes by `example/id` therefore finds every example it lists complete; our readers go by the record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from . import chain, codecs, commits, dtypes, layout, zarr_documents
from .buffers import RowBuffer
from .commits import ShardRecord
from .descriptions import Description, Kind
from .dtypes import Array
from .errors import SchemaError
from .part_state import PartState, part_names
from .places import Place
from .quantize import Quantization
from .ragged import Cells, text_bytes
from .schema import ColumnSchema, Json, PartDocument, column_schema, stored_arrays
from .shards import encode

_THREADS = min(4, os.cpu_count() or 1)
_WIDE_BYTES = 2**20


def claim(place: Place, document: PartDocument) -> PartState:
    """Take the next free part number. Several writers may try at once; each gets its own."""
    content = zarr_documents.group(document.to_attributes())
    number = max((int(name[1:]) + 1 for name in part_names(place)), default=0)
    while True:
        name = f"p{number:06d}"
        try:
            place.create(f"parts/{name}/zarr.json", [content])
        except FileExistsError:
            number += 1
        else:
            return PartState(name, document, commits.digest(content), copies=chain.copies(place, name))


class PartWriter:
    """One part, from its first rows to its closing record."""

    def __init__(
        self,
        place: Place,
        document: Callable[[], PartDocument],
        budget: int,
        known: Mapping[str, ColumnSchema] | None = None,
        compress: str = codecs.NONE,
    ) -> None:
        self._known = known or {}
        self._compress = compress
        self._quantization: dict[str, Quantization] = {}
        self._place = place
        self._document = document
        self._budget = budget
        self._schemas: dict[str, ColumnSchema] = {}
        self._buffers: dict[str, RowBuffer] = {}
        self._templates: dict[str, Json] = {}
        self._touched: dict[str, dict[int, ShardRecord]] = {}
        self._committed: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self._written = 0
        self._nonfinite: dict[str, int] = {}
        self.state: PartState | None = None  # once there is something on disk

    @property
    def columns(self) -> Iterable[str]:
        """Names of its columns, once prepared."""
        return self._schemas.keys()

    @property
    def buffer_bytes(self) -> int:
        """Bytes that its buffers may come to take."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

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
            self._rows = dict.fromkeys(sorted({schema.table for schema in schemas.values()}), 0)
        layout.check(self._budget, 0, _size(given))
        self._check(given)

    def append(self, given: dict[str, Cells], nonfinite: Mapping[str, int] = {}) -> None:
        """Add one row group: cells of every column, consistent with one another and prepared. `given` is emptied on the way.

        Its `start` columns count from its own first rows. `nonfinite` are rows per column that are known to hold NaN or infinity.
        """
        if self.state is None:
            self.state = claim(self._place, self._document())
            self._write_groups(self.state.name)
        else:
            chain.check_open(self._place, self.state)
        added = {self._schemas[name].table: column.rows for name, column in given.items()}
        given.update(self._moved(given))
        self._written += self._take_all(self.state.name, given)
        for table, rows in added.items():
            self._rows[table] += rows
        for name, count in nonfinite.items():
            self._nonfinite[name] = self._nonfinite.get(name, 0) + int(count)

    def commit(self, kind: str = "commit", aligned: Sequence[tuple[str, int, int]] = (), assets: Mapping[str, str] = {}) -> None:
        """Make everything appended so far visible; nothing, where there is nothing, or the part is closed.

        Args:
            kind: `closed` for the last commit of the part.
            aligned: which other parts' examples, [part, first, count] in order, these are.
            assets: SHA-256 digests of the files beside the tables.
        """
        if self.state is None or self.state.ended or (kind == "commit" and self._rows == self.state.rows):
            return
        chain.check_open(self._place, self.state)
        self._write_tails(self.state.name)
        self._place.settle()
        for number in range(3):
            self._write_shapes(self.state.name, number)
            self._place.settle()
        new = {name: digest for name, digest in assets.items() if self.state.assets.get(name) != digest}
        self._add_record(self.state, kind, aligned=tuple(aligned), nonfinite=dict(self._nonfinite), assets=new)
        self._place.settle()
        if kind == "closed":
            chain.finish(self._place, self.state)
            self._place.settle()

    def _plan(self, given: Mapping[str, Cells], descriptions: Mapping[str, Description]) -> dict[str, ColumnSchema]:
        kinds = {name: self._kind(name, column) for name, column in given.items()}
        said = {name: descriptions.get(name, Description()) for name in kinds}
        coding = {name: said[name].coding(name, kind, given[name].blocks, self._compress) for name, kind in kinds.items()}
        arrays = [array for name, kind in kinds.items() for array in stored_arrays(*kind, **coding[name])]
        share = layout.shard_bytes_for(self._budget, arrays, _size(given))
        return {
            name: column_schema(
                name,
                *kind,
                shard_bytes=share,
                axes=said[name].axes,
                site=said[name].site,
                attributes=said[name].attributes,
                **coding[name],
            )
            for name, kind in kinds.items()
        }

    def _check_known(self, given: Mapping[str, Cells]) -> None:
        """A column that the run has from earlier sessions must stay what it is."""
        for name, column in given.items():
            _check_kind(name, self._kind(name, column), column)

    def _kind(self, name: str, column: Cells) -> Kind:
        known = self._known.get(name)
        return (known.dtype, known.shape) if known else (column.dtype, column.shape)

    def _write_groups(self, part: str) -> None:
        document = [zarr_documents.group()]
        folders = group_folders(self._schemas.values())
        self._place.each(lambda folder: self._place.replace(f"parts/{part}/{folder}/zarr.json", document), folders)
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

    def _moved(self, given: Mapping[str, Cells]) -> dict[str, Cells]:
        """The `start` columns, counted from the part's first rows."""
        own = {name: self._rows[table] for name in given if (table := name.removeprefix("example/start.")) != name}
        return {name: replace(given[name], blocks=[block + rows for block in given[name].blocks]) for name, rows in own.items()}

    def _take_all(self, part: str, given: dict[str, Cells]) -> int:
        """Columns share nothing, so several threads take the wide ones: one cannot write and checksum at a raw file's speed."""
        wide = [name for name, column in given.items() if column.nbytes >= _WIDE_BYTES]
        narrow = [name for name in given if name not in wide]

        def take(name: str) -> int:
            return self._take(part, self._schemas[name], given.pop(name))

        return sum(map(take, narrow)) + (_in_threads(take, wide) if wide else 0)

    def _take(self, part: str, schema: ColumnSchema, column: Cells) -> int:
        pieces = (piece for block in column.blocks for piece in self._by_role(schema, block))
        return sum(self._push(part, schema.arrays[role].path, rows) for role, rows in pieces)

    def _by_role(self, schema: ColumnSchema, block: Array) -> Iterator[tuple[str, Array]]:
        """Rows for each array of a column."""
        if schema.dtype == dtypes.TEXT:
            yield from zip(("utf8", "end"), text_bytes(block, self._buffers[schema.arrays["utf8"].path].rows), strict=True)
        elif schema.quantized is None:
            yield "values", block
        else:
            for arrays, cost in schema.quantized.encode(block, schema.dtype):
                self._quantization[schema.name] = self._quantization.get(schema.name, Quantization()) + cost
                yield from arrays.items()

    def _push(self, part: str, path: str, block: Array) -> int:
        return sum(self._write_shard(part, path, number, rows) for number, rows in self._buffers[path].take(block))

    def _write_shard(self, part: str, path: str, number: int, rows: Array) -> int:
        buffer = self._buffers[path]
        encoded = encode(rows, buffer.geometry, dtypes.fill_value(buffer.schema.dtype))
        self._place.replace(shard_path(part, path, number, rows.ndim), encoded.buffers)
        size = None if buffer.geometry.codec == codecs.NONE else encoded.nbytes
        self._touched.setdefault(path, {})[number] = ShardRecord(len(rows), encoded.crcs, size)
        return encoded.nbytes

    def _write_tails(self, part: str) -> None:
        buffers = self._buffers.items()
        waiting = [(path, buffer) for path, buffer in buffers if buffer.held and buffer.rows != self._committed.get(path, 0)]
        self._written += sum(self._place.each(lambda one: self._write_shard(part, one[0], one[1].shard, one[1].tail()), waiting))

    def _write_shapes(self, part: str, number: int) -> None:
        schemas = self._schemas.values()
        paths = [role.path for schema in schemas for role in schema.arrays.values() if wave(schema, role.name) == number]
        self._place.each(lambda path: self._write_shape(part, path), paths)

    def _write_shape(self, part: str, path: str) -> None:
        document = zarr_documents.with_rows(self._templates[path], self._buffers[path].rows)
        self._place.replace(f"parts/{part}/{path}/zarr.json", [document])

    def _add_record(self, part: PartState, kind: str, **said: Any) -> None:
        rows = {path: buffer.rows for path, buffer in self._buffers.items()}
        chain.add_record(
            self._place,
            part,
            kind,
            rows=dict(self._rows),
            columns={} if part.commits else self._schemas,
            copies={} if part.commits else part.copies,
            array_rows={path: count for path, count in rows.items() if count != self._committed.get(path, -1)},
            shards=self._touched,
            written=self._written,
            quantization=dict(self._quantization),
            **said,
        )
        self._committed, self._touched = rows, {}


def group_folders(schemas: Iterable[ColumnSchema]) -> list[str]:
    """The folders of a part that are Zarr groups: tables, and columns of several arrays."""
    paths = [role.path for schema in schemas for role in schema.arrays.values()]
    return sorted({path.rpartition("/")[0] for path in paths} | {path.partition("/")[0] for path in paths})


def _in_threads(take: Callable[[str], int], names: Sequence[str]) -> int:
    """The sum of `take` over names, several at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return sum(taken() for taken in [_begun(pool, take, name) for name in names])


def _begun(pool: ThreadPoolExecutor, take: Callable[[str], int], name: str) -> Callable[[], int]:
    try:
        return pool.submit(take, name).result
    except RuntimeError:  # at exit, where a forgotten writer is closed, no pool takes anything any more
        return partial(take, name)


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


def wave(schema: ColumnSchema, role: str) -> int:
    """When in a commit an array states its rows: columns first, then bookkeeping of the example table, then what lists examples."""
    if schema.name == "example/id":
        return 1 if role == "utf8" else 2
    if schema.name == "step/step":
        return 2
    return 1 if schema.name.startswith(("example/start.", "example/length.")) else 0


def key_columns(ids: Array, phases: Array, steps: Array) -> dict[str, Cells]:
    """`id`, `phase` and `step` of the examples of one append; ids are int64 or an object array of text."""
    return {
        "example/id": Cells(dtypes.TEXT if ids.dtype == object else "int64", (), [ids], None),
        "example/phase": Cells(dtypes.TEXT, (), [phases], None),
        "example/step": Cells("int64", (), [steps], None),
    }


def start_columns(lengths: Mapping[str, Array]) -> dict[str, Cells]:
    """`start.<table>` and `length.<table>` of the examples of one append, counted from its own first rows."""
    found = {}
    for table, length in lengths.items():
        start = np.cumsum(length) - length
        found[f"example/start.{table}"] = Cells("int64", (), [start], None)
        found[f"example/length.{table}"] = Cells("int64", (), [length], None)
    return found
