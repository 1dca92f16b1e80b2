"""What a recording will take, before anything runs: bytes, objects, memory, time and money.

The model is built from its config without weights and rehearsed: columns, shapes and files are those that recording itself makes of
a few tokens. The rest is multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tensortape.instrument.errors import UnsupportedModelError
from tensortape.instrument.recording import BATCH_TOKENS
from tensortape.instrument.rehearsal import call
from tensortape.instrument.sites import Selection
from tensortape.stores import layout

from .costs import Costs, Rates
from .planned import PlannedArray, inputs, planned

LONGEST = 2048
Json = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a recording of so many tokens takes.

    Args:
        model: the class of the model.
        parameters, parameter_bytes: of the model.
        tokens: in all, in `examples` examples of `max_length` tokens.
        arrays: everything that is stored.
        documents: files that are no shards; of commit records, the first and the closing one.
        budget: bytes of host memory for buffers, at least `least_budget`.
        least_budget: the smallest memory budget that such a recording is not refused with.
        costs: time and money.
    """

    model: str
    parameters: int
    parameter_bytes: int
    tokens: int
    examples: int
    max_length: int
    arrays: tuple[PlannedArray, ...]
    documents: int
    budget: int
    least_budget: int
    costs: Costs

    @property
    def nbytes(self) -> int:
        """Of all values; checksums add a few bytes per half MiB."""
        return self.costs.nbytes

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """By column."""
        found: dict[str, float] = {}
        for array in self.arrays:
            found[array.column] = found.get(array.column, 0) + array.nbytes / self.tokens
        return found

    @property
    def shards(self) -> int:
        """Files that hold values, if one writer writes all."""
        share = layout.shard_bytes_for(self.budget, _kinds(self.arrays))
        most = (layout.plan(array.shape, array.itemsize, share).shard[0] for array in self.arrays)
        return sum(-(-array.rows // rows) for array, rows in zip(self.arrays, most, strict=True))

    @property
    def objects(self) -> int:
        """Files in all."""
        return self.shards + self.documents

    def to_json(self) -> Json:
        """Everything, for programs."""
        own = ("model", "parameters", "parameter_bytes", "tokens", "examples", "max_length", "bytes_per_token", "shards")
        of_costs = ("flops_per_token", "tokens_per_second", "forward_seconds", "disk_seconds", "seconds", "bottleneck", "gpu_hours")
        money = ("usd_per_month", "usd_to_recompute", "reads_per_month", "verdict")
        return {
            "bytes": self.nbytes,
            **{name: getattr(self, name) for name in (*own, "documents", "objects", "budget", "least_budget")},
            **{name: getattr(self.costs, name) for name in (*of_costs, *money)},
            "rates": asdict(self.costs.rates),
        }


def plan(
    model: nn.Module,
    sites: Selection,
    tokens: int,
    *,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    budget: int = layout.DEFAULT_BUDGET,
    rates: Rates | None = None,
) -> Plan:
    """What recording these sites over so many tokens of text takes.

    Args:
        model: a model of text on the meta device, as `models.without_weights` makes it.
        sites: as for `record`.
        tokens: in all.
        max_length: tokens of each example; by default what the model can take, at most 2,048.
        batch_tokens: of one batch, as for `record`.
        budget: bytes of host memory for buffers, as for `record`; raised to what is needed.

    Raises:
        SiteNotFoundError, LayoutError. UnsupportedModelError: the model takes no text, or its forward needs values.
    """
    if getattr(model, "main_input_name", "") != "input_ids":
        raise UnsupportedModelError(f"plans are for recordings of text, and {type(model).__name__} takes none (no input_ids)")
    length = _longest(model) if max_length is None else max_length
    if tokens < 1 or length < 1:
        raise ValueError(f"tokens and max_length are at least 1; got {tokens} and {length}")
    arrays, documents = planned(model, sites, tokens, length)
    examples = -(-tokens // length)
    nbytes = sum(array.nbytes for array in arrays)
    least = layout.least_budget(_kinds(arrays), nbytes * max(1, batch_tokens // length) // examples)
    parameters = list(model.parameters())
    return Plan(
        model=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.nbytes for parameter in parameters),
        tokens=tokens,
        examples=examples,
        max_length=length,
        arrays=arrays,
        documents=documents,
        budget=max(budget, least),
        least_budget=least,
        costs=Costs(tokens, nbytes, _flops_per_token(model, length) * _passes(arrays), rates or Rates()),
    )


def _kinds(arrays: tuple[PlannedArray, ...]) -> list[tuple[tuple[int, ...], int]]:
    return [(array.shape, array.itemsize) for array in arrays]


def _longest(model: nn.Module) -> int:
    config: Any = model.config
    return min(getattr(config.get_text_config(), "max_position_embeddings", LONGEST), LONGEST)


def _passes(arrays: tuple[PlannedArray, ...]) -> int:
    """A backward that stops at activations costs about what a forward does."""
    return 2 if any(".grad@" in array.column for array in arrays) else 1


def _flops_per_token(model: nn.Module, length: int) -> float:
    """Of the forward of an example of so many tokens, its attention included."""
    known = (getattr(torch.ops.aten, "_grouped_mm", None), getattr(torch.ops.transformers, "grouped_mm_fallback", None))
    with FlopCounterMode(display=False, custom_mapping={op: _of_experts for op in known if op is not None}) as counter:
        call(model, inputs(1, length))
    return float(counter.get_total_flops() / length)


def _of_experts(rows: Sequence[int], weights: Sequence[int], *_: Any, **__: Any) -> int:
    """Of rows [n, d], each with one of several matrices [experts, d, features]; torch's counter does not know this operation."""
    return 2 * rows[0] * rows[1] * weights[-1]
