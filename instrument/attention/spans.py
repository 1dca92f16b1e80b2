"""An attention call in the coordinates of its examples: which tokens its queries and keys are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tensortape.stores.weights_torch import weights

from ..errors import AttentionError
from ..streams import Stream
from . import masks
from .facts import Attended

TILE_BYTES = 16 << 20  # of one tile of weights, on the device


@dataclass(frozen=True)
class Call:
    """An attention call and the streams of its axes.

    Args:
        attended: what the function saw; keys beyond the stream's (an unfilled static cache) are cut off.
        queries: the stream of this forward's queries.
        keys: the stream of all keys so far; `queries` itself where there is no cache and no cross-attention.
        cross: whether keys come from another stream.
        past: positions of the key stream before the first query's; 0 for cross-attention.
        shift: positions of the key stream that have left a sliding cache: key column j is position j + shift.
    """

    attended: Attended
    queries: Stream
    keys: Stream
    cross: bool
    past: int
    shift: int

    @property
    def new_keys(self) -> int:
        """Keys at the end of k that no earlier forward has shown."""
        return self.keys.width if self.cross else self.queries.width

    def intervals(self) -> torch.Tensor | None:
        """For each kept query the first and one past the last key of its example that it sees; int32 [kept, 2] on the host.

        None where the keys that a query sees are not neighbours, or differ between heads.

        Raises:
            AttentionError: a query sees pads, or other examples of its row.
        """
        batch, _, queries, keys = self.attended.shape
        columns = keys - self.attended.extra_keys
        try:
            found = masks.seen(self.attended.mask, batch, queries, columns, _device(self.attended))
        except ValueError:
            return None
        first, last, count = (numbers.cpu().reshape(-1)[self.queries.places.cpu()] for numbers in found)
        rows = self.queries.places.cpu() // self.queries.width
        before = self.keys.kept_before
        lowest, highest = before[rows, first + self.shift], before[rows, last + self.shift]
        if not bool((highest - lowest == count).all()):
            self._refuse_pads(found[2])
            return None
        start, length = self._examples_in_rows()
        interval = torch.stack([lowest - start, highest - start], 1)
        empty = interval[:, 0] == interval[:, 1]
        if not bool(((interval[:, 0] >= 0) & (interval[:, 1] <= length) | empty).all()):
            raise AttentionError(_CROSSES)
        interval[empty] = 0
        return interval.to(torch.int32)

    def tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(example, first query, weights [H, R, K]) of all examples, over their own kept tokens; few queries at a time."""
        for example, ((row, at), (key_row, keys)) in enumerate(zip(self.queries.spans(), self.keys.spans(), strict=True)):
            columns = keys - self.shift
            columns = columns[columns >= 0]
            count = max(1, TILE_BYTES // max(1, 4 * self.attended.shape[1] * len(columns)))
            for start in range(0, len(at), count):
                tile = self.tile(row, at[start : start + count], key_row, columns)
                yield example, start, torch.nn.functional.pad(tile, (len(keys) - len(columns), 0))

    def tile(self, row: int, queries: torch.Tensor, key_row: int, columns: torch.Tensor) -> torch.Tensor:
        """Weights [H, R, K] of some queries of an input row over some key columns; extra keys take part and are dropped."""
        call, device = self.attended, _device(self.attended)
        queries, columns = queries.to(device), columns.to(device)
        if call.q is None or call.k is None:
            if call.weights is None:
                raise AttentionError("an attention call showed neither q and k nor weights")
            return call.weights.detach()[row][:, queries][:, :, columns]
        keep, bias = call.mask.block(row, queries, columns)
        k = call.k.detach()[key_row]
        found = weights(
            call.q.detach()[row][:, queries],
            torch.cat([k[:, columns], k[:, k.shape[1] - call.extra_keys :]], 1),
            scale=call.scale,
            softcap=call.softcap,
            bias=None if bias is None else torch.nn.functional.pad(bias, (0, call.extra_keys)),
            keep=None if keep is None else torch.nn.functional.pad(keep, (0, call.extra_keys), value=True),
            sinks=None if call.sinks is None else call.sinks.detach(),
        )
        return found[..., : len(columns)]

    def check_pads(self) -> None:
        """AttentionError if kept queries see pads: their weights over kept keys alone would not be theirs."""
        batch, _, queries, keys = self.attended.shape
        if self.attended.weights is None:
            try:
                found = masks.seen(self.attended.mask, batch, queries, keys - self.attended.extra_keys, _device(self.attended))
            except ValueError:
                return
            self._refuse_pads(found[2])

    def _refuse_pads(self, count: torch.Tensor) -> None:
        """Compare how many keys each kept query sees with how many of them are kept."""
        if self.keys.mask is None:
            return
        kept = self.keys.mask[:, self.shift :]
        queries = torch.arange(self.attended.shape[2], device=kept.device)
        keys = torch.arange(kept.shape[1], device=kept.device)
        for row, at in self.queries.spans():
            keep, _ = replace(self.attended.mask, bias=None).block(row, queries, keys)
            seen = kept[row][None].expand(len(queries), -1) if keep is None else keep[0] & kept[row]
            if bool((seen.sum(-1)[at] != count.to(seen.device)[row][at]).any()):
                raise AttentionError(_SEES_PADS)

    def _examples_in_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each kept query: kept keys of its row before its example, and keys of its example."""
        starts: list[int] = []
        seen_rows: dict[int, int] = {}
        for (row, _), length in zip(self.keys.spans(), self.keys.lengths, strict=True):
            starts.append(seen_rows.get(row, 0))
            seen_rows[row] = starts[-1] + length
        counts = torch.tensor(self.queries.lengths)
        return torch.tensor(starts).repeat_interleave(counts), torch.tensor(self.keys.lengths).repeat_interleave(counts)


_CROSSES = (
    "tokens of one example attend to another example of the same row, so neither has attention of its own; transformers keeps "
    "packed examples apart only with use_cache=False and position_ids that start anew"
)
_SEES_PADS = (
    "tokens attend to positions that the mask drops as pads, so their attention cannot be rebuilt from the tokens that are kept; "
    "give the model the same attention_mask, or record without the mask"
)


def aligned(attended: Attended, queries: Stream, keys: Stream, *, cross: bool) -> Call:
    """A call with its streams; keys that do not exist yet (a static cache) are cut off.

    Raises:
        AttentionError: the call sees keys that the streams do not know, because a cache was begun elsewhere.
    """
    count = attended.shape[3] - attended.extra_keys
    if count > keys.width:
        if attended.weights is not None or attended.mask.sees_beyond(keys.width):
            raise AttentionError(
                f"an attention call sees {count} keys, but only {keys.width} were recorded in this batch; begin the cache inside "
                "the batch context, or give the whole sequence at once"
            )
        attended = _cut(attended, keys.width)
        count = keys.width
    past = 0 if cross else keys.width - queries.width
    return Call(attended, queries, keys, cross, past, keys.width - count)


def _cut(attended: Attended, count: int) -> Attended:
    k, v = (None if tensor is None else tensor[:, :, :count] for tensor in (attended.k, attended.v))
    return replace(attended, k=k, v=v, mask=attended.mask.first_keys(count))


def _device(attended: Attended) -> torch.device:
    tensor = attended.q if attended.q is not None else attended.weights
    if tensor is None:
        raise AttentionError("an attention call showed neither q and k nor weights")
    return tensor.device
