"""Batches as torch tensors, made by workers; imported only where torch is wanted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from . import dtypes

if TYPE_CHECKING:
    from .batches import Batches


class BatchSet(IterableDataset[Any]):
    """What is left of the epoch. Of n workers, number w makes batches w, w + n, ...; a DataLoader puts them in order again."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self._begun = False

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step, batches = (0, 1, self.batches) if worker is None else (worker.id, worker.num_workers, self._in_worker())
        for number in range(batches.position + first, len(batches), step):
            yield _tensors(batches[number])

    def _in_worker(self) -> Batches:
        """A copy that opens the run anew, as in spawned workers: a forked one shares locks and connections with its parent."""
        if self._begun:
            raise ValueError("persistent_workers=True would repeat the epoch; let workers be started anew for each one")
        self._begun = True
        return copy.deepcopy(self.batches)


class BatchLoader(DataLoader[Any]):
    """A DataLoader of batches, which counts those it hands out (not those that workers make ahead)."""

    def __init__(self, batches: Batches, **options: Any) -> None:
        super().__init__(BatchSet(batches), batch_size=None, **options)
        self._batches = batches

    def __iter__(self) -> Any:
        return self._batches.counted(super().__iter__())

    def __len__(self) -> int:
        return len(self._batches)


def _tensors(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: _tensors(values) for name, values in batch.items()}
    return dtypes.to_torch(batch, dtypes.name_of(batch))
