"""Masks: which keys each query may attend to, and what is added to its scores.

Implementations mean different things by their masks: a boolean mask is True where a key counts, a floating one is added to the
scores, and no mask at all means causal attention to some and none to others. A `Mask` says what was meant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

MASKED = -1e4  # scores lowered by this much or more are masked: no weight of any float dtype survives it


@dataclass(frozen=True)
class Mask:
    """Of an attention call with queries [B, H, Tq] and keys [B, Hkv, Tk].

    Args:
        keep: [B or 1, H or 1, Tq or 1, Tk] bool, True where a key counts; None if all do.
        bias: the same shape or any that broadcasts to it, added to the scores where a key counts; None for nothing.
        causal: query i sees no key after i + align.
        window: query i sees only keys less than `window` away from i + align; None for all.
        align: the key that the first query stands at.
    """

    keep: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    causal: bool = False
    window: int | None = None
    align: int = 0

    def block(self, row: int, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What holds between some queries [R] and keys [K] of one input row: (keep, bias), each [H or 1, R, K] or None."""
        keep = _picked(self.keep, row, queries, keys)
        if self.has_rule:
            first, last = self.interval(queries)
            seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
            keep = seen[None] if keep is None else keep & seen
        return keep, _picked(self.bias, row, queries, keys)

    @property
    def has_rule(self) -> bool:
        """Whether anything but `keep` decides which keys count."""
        return self.causal or self.window is not None

    def interval(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First key and one past the last key that the rule lets each of some queries see, unbounded where it does not limit."""
        at = queries + self.align
        none = torch.full_like(at, torch.iinfo(torch.int64).max)
        reach = at + self.window if self.window is not None else none
        first = at - self.window + 1 if self.window is not None else torch.zeros_like(at)
        return first, at + 1 if self.causal else reach

    def first_keys(self, count: int) -> Mask:
        """The mask of the first `count` keys alone."""
        return replace(self, keep=_first(self.keep, count), bias=_first(self.bias, count))

    def sees_beyond(self, count: int) -> bool:
        """Whether any query may attend to a key after the first `count`."""
        if self.causal and self.align == 0:
            return False
        return self.keep is None or bool(self.keep[..., count:].any())


def read(mask: torch.Tensor) -> Mask:
    """A mask tensor of two to four axes: boolean (True where a key counts) or added to the scores."""
    mask = mask.detach()
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.dtype == torch.bool:
        return Mask(keep=None if bool(mask.all()) else mask)
    keep = mask > MASKED
    bias = torch.where(keep, mask, 0)
    return Mask(keep=None if bool(keep.all()) else keep, bias=bias if bool(bias.any()) else None)


class Readings:
    """Masks read in one forward: layers share their mask tensors, which are large, so each is read once."""

    def __init__(self) -> None:
        self._read: dict[tuple[int, int], tuple[torch.Tensor, Mask]] = {}

    def read(self, mask: torch.Tensor) -> Mask:
        """As `read`, from memory where the same tensor was read before."""
        key = (id(mask), 0 if mask.is_inference() else mask._version)
        if key not in self._read:
            self._read[key] = mask, read(mask)  # the tensor is held, so that its id stays its own
        return self._read[key][1]


def seen(mask: Mask, rows: int, queries: int, keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First key, one past the last key, and number of keys that each query sees; [B, Tq] int64 each.

    A mask that differs between heads has no such numbers: ValueError.
    """
    if mask.keep is None:
        return _seen_by_rule(mask, rows, queries, keys, device)
    keep = mask.keep
    if keep.shape[1] > 1 and not bool((keep == keep[:, :1]).all()):
        raise ValueError("the mask differs between heads")
    seen = keep[:, 0].expand(-1, queries, keys)
    if mask.has_rule:
        at = torch.arange(queries, device=seen.device), torch.arange(keys, device=seen.device)
        rule = replace(mask, keep=None, bias=None).block(0, *at)[0]
        seen = seen & rule if rule is not None else seen
    count = seen.sum(-1)
    first = seen.byte().argmax(-1)
    last = keys - seen.flip(-1).byte().argmax(-1)
    last = torch.where(count > 0, last, first)
    return first.expand(rows, -1), last.expand(rows, -1), count.expand(rows, -1)


def by_distance(mask: Mask, heads: int, queries: int, total: int) -> torch.Tensor | None:
    """The bias of a mask that depends on the distance between query and key alone, as [total, 2, H]; None for any other.

    Entry [n, 0] is the bias of the key n before a query, entry [n, 1] of the key n after it; 0 where that never counts.

    Args:
        mask: of the last `queries` of `total` positions, with all of them as keys.
    """
    if mask.bias is None or mask.bias.shape[-1] != total:
        return None
    bias = mask.bias.expand(-1, heads, queries, total)
    keep = None if mask.keep is None else mask.keep.expand(-1, -1, queries, total)
    if len(bias) == 1 and bool((bias[:, :, 1:, 1:] == bias[:, :, :-1, :-1]).all()):
        lines = torch.cat([bias[0, :, -1].flip(-1), bias[0, :, 0, total - queries + 1 :]], 1)
    else:
        found = _diagonals(bias, keep)
        if found is None:
            return None
        lines = found
    before, after = lines[:, :total], torch.cat([lines[:, :1], lines[:, total:]], 1)
    return torch.stack([before, functional.pad(after, (0, total - after.shape[1]))]).permute(2, 0, 1)


def _diagonals(bias: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor | None:
    """[H, ...]: the one value of each distance, 0, -1, -2, ..., then 1, 2, ..., over kept pairs; None where one has several."""
    rows, heads, queries, total = bias.shape
    distance = torch.arange(total, device=bias.device)[None] - torch.arange(total - queries, total, device=bias.device)[:, None]
    number = torch.where(distance <= 0, -distance, total + distance - 1).reshape(1, -1)
    kept = torch.ones_like(bias, dtype=torch.bool) if keep is None else keep.expand(len(bias), heads, -1, -1)
    flat, there = (one.expand(max(len(kept), rows), -1, -1, -1).transpose(0, 1).flatten(2) for one in (bias, kept))
    index = number.expand(heads, -1).repeat(1, flat.shape[1])
    flat, there = flat.flatten(1), there.flatten(1)
    empty = bias.new_full((heads, total + queries - 1), torch.inf)
    least = empty.scatter_reduce(1, index, torch.where(there, flat, torch.inf), "amin")
    most = (-empty).scatter_reduce(1, index, torch.where(there, flat, -torch.inf), "amax")
    if bool((least < most).any()):
        return None
    return torch.where(torch.isfinite(least), least, 0)


def _seen_by_rule(
    mask: Mask, rows: int, queries: int, keys: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, last = (ends.clamp(0, keys) for ends in mask.interval(torch.arange(queries, device=device)))
    last = torch.maximum(first, last)
    return first.expand(rows, -1), last.expand(rows, -1), (last - first).expand(rows, -1)


def _picked(tensor: torch.Tensor | None, row: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """[H or 1, R, K] of a tensor that broadcasts to [B, H, Tq, Tk]."""
    if tensor is None:
        return None
    one = tensor[row if tensor.shape[0] > 1 else 0]
    one = one[:, queries] if one.shape[1] > 1 else one.expand(-1, len(queries), -1)
    return one[:, :, keys] if one.shape[2] > 1 else one.expand(-1, -1, len(keys))


def _first(tensor: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.shape[-1] == 1 else tensor[..., :count]
