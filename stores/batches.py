"""Batches for training: an epoch is every row once, in a seeded order that is the same whoever reads it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .chosen_rows import ChosenRows
from .columns import Column
from .errors import MissingExampleError, SchemaError
from .mixing import InOrder, Mixed
from .row_order import RowOrder
from .schema import Json

if TYPE_CHECKING:
    from .batches_torch import BatchLoader

Batch = Any  # an array [n, *feature], or a dict of them by column name
MIXED_BATCHES, MIXED_BYTES = 16, 1 << 30


class Batches:
    """Batches of rows, made by `run.batches`. Iterating yields what is left of the epoch; iterating again, the next epoch.

    `batches[k]` is batch k of the epoch. `epoch` and `position` (how many of its batches were handed out) may be set. It may be
    pickled, and goes on from where it was.
    """

    def __init__(
        self,
        run: str,
        columns: Sequence[Column],
        *,
        single: bool,
        batch_rows: int,
        shuffle: bool,
        seed: int,
        buffer_rows: int | None,
        drop_last: bool,
        examples: Any,
    ) -> None:
        _check(batch_rows, buffer_rows, seed)
        sources = _sources(columns, examples)
        widest = max(sources, key=lambda source: source.column.nbytes / len(source.column))
        self.epoch, self.position = 0, 0
        self.columns = [column.name for column in columns]
        self._order = RowOrder(widest.edges(), batch_rows, buffer_rows or _enough(batch_rows, columns), seed)
        self._reader = Mixed(sources, self._order) if shuffle else InOrder(sources, self._order)
        self._places = hashlib.sha256(self._order.edges.tobytes() + b"".join(source.places for source in sources)).hexdigest()[:16]
        self._run, self._single, self._shuffle, self._drop_last = run, single, shuffle, drop_last
        if not len(self):
            raise SchemaError(f"{self.rows} rows make no whole batch of {batch_rows}; ask for smaller ones, or keep the last")

    @property
    def rows(self) -> int:
        """Rows of an epoch, those of a last batch that is dropped included."""
        return self._order.rows

    def __len__(self) -> int:
        return self.rows // self._order.batch_rows if self._drop_last else self._order.batches

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of an epoch of {len(self)}")
        found = self._reader.batch(self.epoch, number)
        return found[0] if self._single else dict(zip(self.columns, found, strict=True))

    def __iter__(self) -> Iterator[Batch]:
        return self.counted(self[number] for number in range(self.position, len(self)))

    def counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """What is left of the epoch, wherever it is made, counted as it is handed out."""
        for batch in batches:
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> Json:
        """Where it is, and in what, as JSON. The batch that was handed out last counts as done."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: Json) -> None:
        """Go on from a state; SchemaError, which says what differs, if it was taken of other batches than these."""
        mine = self._identity()
        differences = [f"{name} was {state.get(name)!r} and is {mine[name]!r}" for name in mine if state.get(name) != mine[name]]
        if differences:
            raise SchemaError(f"the state is of other batches than these: {'; '.join(differences)}")
        self.epoch, self.position = state["epoch"], state["position"]

    def to_torch(self, **options: Any) -> BatchLoader:
        """The same batches as tensors (bfloat16 as torch.bfloat16), from a DataLoader that moves `epoch` and `position` along.

        Args:
            options: of `DataLoader`, such as `num_workers=2`, `multiprocessing_context="spawn"`, `prefetch_factor`, `pin_memory`.
        """
        from .batches_torch import BatchLoader

        return BatchLoader(self, **options)

    def __repr__(self) -> str:
        shape = f"{len(self)} batches of {self._order.batch_rows} rows"
        return f"<Batches of {', '.join(self.columns)}: {shape}; epoch {self.epoch}, {self.position} done>"

    def _identity(self) -> Json:
        """All that decides which rows come when. `places` stands for the examples chosen and where their rows lie."""
        return {
            "run": self._run,
            "columns": self.columns,
            "rows": self.rows,
            "places": self._places,
            "batch_rows": self._order.batch_rows,
            "shuffle": self._shuffle,
            "seed": self._order.seed,
            "buffer_rows": self._order.buffer_rows,
            "drop_last": self._drop_last,
        }


def _sources(columns: Sequence[Column], examples: Any) -> list[ChosenRows]:
    named = ", ".join(column.name for column in columns)
    tables = {column.table for column in columns}
    if len(tables) != 1:
        raise SchemaError(f"batches need columns of one table, but {named or 'nothing'} is of {sorted(tables)}")
    texts = [column.name for column in columns if column.dtype == object]
    if texts:
        raise SchemaError(f"batches hold numbers, but {', '.join(texts)} is text")
    chosen = np.logical_and.reduce([column.present for column in columns])
    if examples is not None:
        asked = np.zeros(len(chosen), bool)
        asked[examples] = True
        chosen &= asked
    sources = [ChosenRows(column, chosen) for column in columns]
    if not sources[0].count:
        raise MissingExampleError(f"no example, of those asked for, has rows in all of {named}")
    return sources


def _enough(batch_rows: int, columns: Sequence[Column]) -> int:
    """Rows to mix at a time where nobody said how many: several batches, unless they take a lot of memory."""
    row_bytes = sum(math.prod(column.shape[1:]) * column.dtype.itemsize for column in columns)
    return max(batch_rows, min(MIXED_BATCHES * batch_rows, MIXED_BYTES // row_bytes))


def _check(batch_rows: int, buffer_rows: int | None, seed: int) -> None:
    if batch_rows < 1 or (buffer_rows is not None and buffer_rows < 1) or seed < 0:
        raise ValueError(f"batch_rows={batch_rows} and buffer_rows={buffer_rows} must be at least 1, and seed={seed} at least 0")
