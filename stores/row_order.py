"""The order in which an epoch visits rows: blocks in random order, mixed a buffer at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .dtypes import Array


@dataclass(eq=False)
class RowOrder:
    """A pure function of blocks, seed and epoch: whoever asks, in whichever order, gets the same rows.

    Blocks of neighbouring rows, [edges[i], edges[i + 1]), are put in random order; what follows is cut into groups of about
    `buffer_rows` rows, whole batches each, and the rows of each group are mixed. Batches are cut within groups.
    """

    edges: Array
    batch_rows: int
    buffer_rows: int
    seed: int
    _epoch: tuple[int, Array, Array] | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return int(self.edges[-1])

    @property
    def batches(self) -> int:
        """Batches of an epoch; the last one may be short."""
        return -(-self.rows // self.batch_rows)

    @property
    def groups(self) -> int:
        """Groups of an epoch, as equal in size as whole batches allow."""
        return -(-self.batches // max(1, self.buffer_rows // self.batch_rows))

    @property
    def most(self) -> int:
        """Rows of the largest group."""
        return min(-(-self.batches // self.groups) * self.batch_rows, self.rows)

    def places(self, batch: int) -> tuple[int, int]:
        """First and one past the last place of a batch in the epoch."""
        first = batch * self.batch_rows
        return first, min(first + self.batch_rows, self.rows)

    def group_of(self, batch: int) -> int:
        """The group that a batch is cut from."""
        return ((batch + 1) * self.groups - 1) // self.batches

    def bounds(self, group: int) -> tuple[int, int]:
        """First and one past the last place of a group in the epoch."""
        first, last = (number * self.batches // self.groups * self.batch_rows for number in (group, group + 1))
        return first, min(last, self.rows)

    def blocks(self, epoch: int, group: int) -> list[tuple[int, int]]:
        """The rows of a group, before they are mixed: first and one past the last of each block."""
        order, ends = self._blocks_of(epoch)
        first, last = self.bounds(group)
        at = np.arange(np.searchsorted(ends, first, "right"), np.searchsorted(ends, last) + 1)
        starts, stops = self.edges[order[at]], self.edges[order[at] + 1]
        stops[-1] -= ends[at[-1]] - last
        starts[0] += first - (ends[at[0]] - self.edges[order[at[0]] + 1] + self.edges[order[at[0]]])
        return list(zip(starts.tolist(), stops.tolist(), strict=True))

    def mixing(self, epoch: int, group: int) -> Array:
        """For each place of a group which of its rows comes there; int64."""
        first, last = self.bounds(group)
        return _permutation(last - first, self.seed, epoch, 1, group)

    def _blocks_of(self, epoch: int) -> tuple[Array, Array]:
        """The order of the blocks, and the place at which each of them ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = _permutation(len(self.edges) - 1, self.seed, epoch, 0)
            self._epoch = (epoch, order, np.cumsum(np.diff(self.edges)[order]))
        return self._epoch[1:]


def _permutation(count: int, *words: int) -> Array:
    """A random order of `count` numbers. numpy freezes what RandomState draws; newer generators may change with a release."""
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(words)))
    return random.permutation(count)
