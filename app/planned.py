"""The arrays that a recording of texts would hold: rehearsed on a few tokens, and scaled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from tensortape.instrument.rehearsal import rehearse
from tensortape.instrument.rows import Rows
from tensortape.instrument.sites import Selection, resolve
from tensortape.instrument.texts import Example, labels_of
from tensortape.stores import RunWriter, dtypes, open_run
from tensortape.stores.part_state import PartState

EXAMPLES, WIDTH = 2, 5  # of the rehearsal; numbers that no two axes of a batch share
TEXT_BYTES = 4  # per token, about what English takes


@dataclass(frozen=True)
class PlannedArray:
    """One Zarr array of a column: its role, dtype, feature shape, and rows in all."""

    column: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    rows: int

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return dtypes.stored(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return self.rows * math.prod(self.shape) * self.itemsize

    @property
    def is_of_site(self) -> bool:
        """Whether it holds what a site gave, and not what the run says of its examples and tokens."""
        return ":" in self.column


def planned(model: nn.Module, sites: Selection, tokens: int, length: int) -> tuple[tuple[PlannedArray, ...], int]:
    """The arrays of a recording of so many tokens in examples of one length, and how many files describe them."""
    rows = _rehearsed(model, sites)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rehearsed.zarr"
        with RunWriter(path, durability="rename", memory_budget=_ample(rows)) as writer:
            writer.append(ids=rows.ids, columns=rows.columns, lengths=rows.lengths)
        part = open_run(path).parts[0]
        documents = sum(file.is_file() and not file.name.startswith("c.") for file in path.rglob("*"))
    taps = resolve(model, sites)
    samples = {tap.options.sample for tap in taps}
    shares = {sample.table("token"): sample.fraction for sample in samples if sample is not None}
    bases = {(tap.site, tap.options.project.k) for tap in taps if tap.options.project is not None}  # each in a file
    return tuple(_scaled(part, tokens, length, shares)), documents + len(bases)


def inputs(count: int, width: int) -> dict[str, torch.Tensor]:
    """What a model of text is called with, on the meta device."""
    return {"input_ids": torch.zeros(count, width, dtype=torch.long, device="meta")}


def _rehearsed(model: nn.Module, sites: Selection) -> Rows:
    texts = [Example(f"{n}:0", "", [0] * WIDTH, [(0, 0)] * WIDTH, {"example/document": f"{n}"}) for n in range(EXAMPLES)]
    labels = labels_of(texts, keep_text=True)
    return rehearse(model, sites, inputs(EXAMPLES, WIDTH), ids=[text.id for text in texts], labels=labels)


def _ample(rows: Rows) -> int:
    """A budget that no rehearsal is refused with; memory is taken only as rows fill it."""
    values = sum(getattr(values, "nbytes", 0) for values in rows.columns.values())
    return 2 * values + (len(rows.columns) + 32 << 22)


def _scaled(part: PartState, tokens: int, length: int, shares: Mapping[str, float]) -> Iterator[PlannedArray]:
    """The arrays of a rehearsal with the rows that so many tokens will have; of a sample's table, its share of them."""
    growth = {"example": -(-tokens // length), "token": tokens / WIDTH, "pair": tokens / WIDTH * length / WIDTH}
    for column in part.columns.values():
        for role in column.arrays.values():
            rows = math.ceil(growth[column.table.partition(".")[0]] * part.arrays[role.path].rows / EXAMPLES)
            if column.table in shares:
                rows = round(shares[column.table] * tokens)
            elif column.name == "example/text" and role.name == "utf8":
                rows = TEXT_BYTES * tokens
            yield PlannedArray(column.name, role.name, role.dtype, role.shape, rows)
