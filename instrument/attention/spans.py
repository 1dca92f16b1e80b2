"""An attention call in the coordinates of its examples: which tokens its queries and keys are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from tensortape.stores.weights_torch import weights

from ..errors import AttentionError
from ..streams import Stream
from . import masks
from .facts import Attended

TILE_BYTES = 16 << 20  # of one tile of weights, on the device
_TRACE = 1e-4  # of a query's mass


@dataclass(frozen=True)
class Call:
    """An attention call and the streams of its axes.

    Args:
        attended: what the function saw; keys beyond the stream's (an unfilled static cache) are cut off.
        queries: the stream of this forward's queries.
        keys: the stream of all keys so far; `queries` itself where there is no cache and no cross-attention.
        cross: whether keys come from another stream.
        shift: positions of the key stream that have left a sliding cache: key column j is position j + shift.
    """

    attended: Attended
    queries: Stream
    keys: Stream
    cross: bool
    shift: int

    @property
    def new_keys(self) -> int:
        """Keys at the end of k that no earlier forward has shown."""
        return self.keys.width if self.cross else self.queries.width

    @cached_property
    def intervals(self) -> torch.Tensor | None:
        """For each kept query the first and one past the last key of its example that it sees; int32 [kept, 2] on the host.

        None where the keys that a query sees are not neighbours, or differ between heads.

        Raises:
            AttentionError: a query sees pads, or other examples of its row.
        """
        batch, _, queries, keys = self.attended.shape
        columns = keys - self.attended.extra_keys
        try:
            found = masks.seen(self.attended.mask, batch, queries, columns, self.attended.reference.device)
        except ValueError:
            return None
        first, last, count = (numbers.cpu().reshape(-1)[self.queries.places.cpu()] for numbers in found)
        rows = self.queries.places.cpu() // self.queries.width
        before = self.keys.kept_before
        lowest, highest = before[rows, first + self.shift], before[rows, last + self.shift]
        start, length = self._examples_in_rows()
        interval = torch.stack([lowest - start, highest - start], 1)
        empty = count == 0
        inside = (interval[:, 0] >= 0) & (interval[:, 1] <= length) & (highest - lowest == count) | empty
        if not bool(inside.all()):
            self._refuse_outside()
            return None
        interval[empty] = 0
        return interval.to(torch.int32)

    def tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(example, first query, weights [H, R, K]) of all examples, over their own kept tokens; few queries at a time."""
        for example, ((row, at), (key_row, keys)) in enumerate(zip(self.queries.spans, self.keys.spans, strict=True)):
            columns = keys - self.shift
            columns = columns[columns >= 0]
            count = max(1, TILE_BYTES // max(1, 4 * self.attended.shape[1] * len(columns)))
            for start in range(0, len(at), count):
                tile = self.tile(row, at[start : start + count], key_row, columns)
                yield example, start, torch.nn.functional.pad(tile, (len(keys) - len(columns), 0))

    def tile(self, row: int, queries: torch.Tensor, key_row: int, columns: torch.Tensor) -> torch.Tensor:
        """Weights [H, R, K] of some queries of an input row over some key columns; extra keys take part and are dropped."""
        call, device = self.attended, self.attended.reference.device
        queries, columns = queries.to(device), columns.to(device)
        if call.q is None or call.k is None:
            return call.reference.detach()[row][:, queries][:, :, columns]
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

    def check(self) -> None:
        """AttentionError if queries see pads, or other examples: their weights over their example's keys alone are not theirs."""
        if self.queries.group == 1 and (self.attended.q is None or self.intervals is None):
            self._refuse_outside()

    def _refuse_outside(self) -> None:
        """Compare what each example's queries see with what they see of their own example's keys."""
        for (row, at), (key_row, own) in zip(self.queries.spans, self.keys.spans, strict=True):
            own = own - self.shift
            seen = self._seen(row, at)
            inside = seen[..., own[own >= 0].to(seen.device)].sum(-1)
            if bool((seen.sum(-1) - inside > _TRACE).any()):
                mine = torch.zeros(seen.shape[-1], dtype=torch.bool)
                mine[own[own >= 0]] = True
                kept = self._kept_columns(key_row, seen.shape[-1])
                others = seen[..., (kept & ~mine).to(seen.device)].sum(-1)
                raise AttentionError(_CROSSES if bool((others > _TRACE).any()) else _SEES_PADS)

    def _seen(self, row: int, at: torch.Tensor) -> torch.Tensor:
        """What some queries see of every key column, [H or 1, R, Tk] float: weights, or 1 where the mask lets them see."""
        device = self.attended.reference.device
        if self.attended.weights is not None:
            return self.attended.weights.detach()[row][:, at.to(device)].float()
        columns = torch.arange(self.attended.shape[3] - self.attended.extra_keys)
        keep, _ = replace(self.attended.mask, bias=None).block(row, at.to(device), columns.to(device))
        return torch.ones(1, len(at), len(columns), device=device) if keep is None else keep.float()

    def _kept_columns(self, row: int, count: int) -> torch.Tensor:
        """Which key columns of an input row are tokens, of whichever example; bool [Tk]."""
        if self.keys.mask is None:
            return torch.ones(count, dtype=torch.bool)
        return self.keys.mask[row].cpu()[self.shift : self.shift + count]

    def _examples_in_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each kept query: kept keys of its row before its example, and keys of its example."""
        starts: list[int] = []
        seen_rows: dict[int, int] = {}
        for (row, _), length in zip(self.keys.spans, self.keys.lengths, strict=True):
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
    return Call(attended, queries, keys, cross, keys.width - count)


def _cut(attended: Attended, count: int) -> Attended:
    k, v = (None if tensor is None else tensor[:, :, :count] for tensor in (attended.k, attended.v))
    return replace(attended, k=k, v=v, mask=attended.mask.first_keys(count))
