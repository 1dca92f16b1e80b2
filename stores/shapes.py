"""Array documents of a part, which readers of plain Zarr go by, beside what is committed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import zarr_documents
from .part_state import ArrayState, PartState
from .parts import wave
from .places import Place


@dataclass(frozen=True)
class Stated:
    """The rows that a document states (None: it is missing or damaged), those committed, and what it should be for just those."""

    path: str
    stated: int | None
    rows: int
    content: bytes

    @property
    def is_wrong(self) -> bool:
        """Whether a reader would miss committed rows; a document may be ahead of the commit, never behind."""
        return self.stated is None or self.stated < self.rows


def stated(place: Place, part: PartState) -> Iterator[Stated]:
    """The document of every array of a part.

    In the order in which rows may be taken back: ids first, so that nobody finds an example listed whose rows are gone.
    """
    roles = [(column, role) for column in part.columns.values() for role in column.arrays.values()]
    for column, role in sorted(roles, key=lambda pair: -wave(pair[0], pair[1].name)):
        path = f"parts/{part.name}/{role.path}/{zarr_documents.DOCUMENT}"
        document, rows = zarr_documents.array(column, role), part.arrays.get(role.path, ArrayState()).rows
        found = zarr_documents.rows_of(place.read(path) if place.exists(path) else b"", document)
        yield Stated(path, found, rows, zarr_documents.with_rows(document, rows))
