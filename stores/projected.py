"""Columns of coordinates in a basis that the run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from . import names
from .basis import Basis
from .columns import Column
from .dtypes import Array
from .errors import DamagedError, SchemaError, UnknownColumnError
from .places import Place
from .schema import ColumnSchema

SITE = "projection"  # what a column's site says of it


class ProjectedColumn(Column):
    """Coordinates [rows, k] of what a site gave. None is read without the basis: a run that has lost it says so."""

    place: Place
    beside: Mapping[str, Column]  # the columns of its table

    @cached_property
    def basis(self) -> Basis:
        """The components; DamagedError if they are missing or not those committed, SchemaError if parts differ in them."""
        stated = {said_of(part.state.columns[self.name]) for part in self._holders}
        if len(stated) > 1:
            raise SchemaError(
                f"column {self.name!r} has coordinates in {len(stated)} bases, each of other parts, and is no one column"
            )
        ((asset, digest),) = stated
        found = read(self.place, asset, digest)
        if (len(found.components), *found.components.shape[1:]) != (*self._schema.shape, *found.mean.shape):
            raise DamagedError(
                f"{path_of(asset)}: the basis has the shape {found.components.shape}, which column {self.name!r} does not fit"
            )
        return found

    @property
    def residual(self) -> Column:
        """The norm of what the components leave out, one number per row."""
        name = f"{names.split(self.name)[1]}|residual"
        if name not in self.beside:
            raise UnknownColumnError(f"column {self.name!r} has no {name!r} beside it")
        return self.beside[name]

    def reconstructed(self, example: int) -> Array:
        """What the site gave for an example, as far as the components have it: [T_i, *feature] float32."""
        return self.basis.reconstructed(self[example])

    def _slice(self, part: int, start: int, stop: int) -> Array:
        self.basis  # noqa: B018 - refuses a run that has lost it
        return super()._slice(part, start, stop)

    def _gather(self, rows: Array) -> Array:
        self.basis  # noqa: B018 - refuses a run that has lost it
        return super()._gather(rows)


def said_of(schema: ColumnSchema) -> tuple[str, str]:
    """(asset, digest) of the basis that a column's coordinates are in."""
    said: Any = (schema.site or {}).get(SITE)
    try:
        return str(said["asset"]), str(said["digest"])
    except (KeyError, TypeError):
        raise DamagedError(f"column {schema.name!r} is a projection, but names no basis: {said!r}") from None


def path_of(asset: str) -> str:
    """Where a basis lies."""
    return f"assets/{names.to_disk(asset)}"


def read(place: Place, asset: str, digest: str) -> Basis:
    """The basis of that digest; DamagedError if it is not there."""
    path = path_of(asset)
    try:
        content = place.read(path)
    except FileNotFoundError:
        raise DamagedError(f"{path}: the basis is missing, without which coordinates mean nothing") from None
    return Basis.from_content(content, digest, path)
