"""What a writer may say of a column beyond its values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import codecs, dtypes, layout, quantize
from .dtypes import Array
from .errors import SchemaError
from .schema import ColumnSchema, Json

Kind = tuple[str, tuple[int, ...]]  # logical dtype and feature shape of a column

# What must be the same for values of one column to be comparable.
_SITE = ("path", "port", "call", "layout", "reduce", "target", "scaled", "sample", "projection")


@dataclass(frozen=True)
class Description:
    """Names of feature axes, the recorded site, attributes, codec (None: the writer's choice for all columns), quantisation."""

    axes: tuple[str, ...] | None = None
    site: Json | None = None
    attributes: Json = field(default_factory=dict)
    compress: str | None = None
    quantize: str | None = None

    def check(self, column: str, known: Mapping[str, ColumnSchema]) -> None:
        """SchemaError for what cannot be kept, or where the run has the column recorded in another way."""
        for said in (self.site, self.attributes):
            _check_json(column, said)
        codecs.check(self.compress)
        quantize.check(self.quantize)
        _check_same_site(column, self.site, known)

    def coding(self, name: str, kind: Kind, blocks: list[Array], compress: str) -> dict[str, Any]:
        """The arguments `codec` and `quantized` of a column's schema; SchemaError for a dtype that cannot be quantised.

        Args:
            blocks: the column's first rows.
            compress: the codec of columns with rows of at least 64 bytes of which nothing is said.
        """
        dtype, shape = kind
        wide = dtype != dtypes.TEXT and math.prod(shape) * dtypes.stored(dtype).itemsize >= layout.SMALL_ROW_BYTES
        return {
            "codec": self.compress or (compress if wide else codecs.NONE),
            "quantized": None if self.quantize is None else quantize.plan(name, dtype, blocks),
        }


def _check_same_site(column: str, site: Json | None, known: Mapping[str, ColumnSchema]) -> None:
    if column not in known or known[column].site is None or site is None:
        return
    before, now = known[column].site or {}, json.loads(json.dumps(site))
    differing = [f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in _SITE if before.get(key) != now.get(key)]
    if differing:
        raise SchemaError(f"column {column!r} was recorded in another way before: {'; '.join(differing)}")


def _check_json(column: str, said: Json | None) -> None:
    try:
        json.dumps(said, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SchemaError(f"what is said of column {column!r} is not JSON: {error}") from None
