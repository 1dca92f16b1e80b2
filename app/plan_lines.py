"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from tensortape.stores import layout

from .costs import Rates, money
from .plan import Plan
from .planned import PlannedArray


def lines(found: Plan) -> Iterator[str]:
    """What recording will take: bytes by kind of column, files, memory, time, money, and a word of advice."""
    costs, rates = found.costs, found.costs.rates
    yield f"{found.model}, {found.parameters / 1e6:,.1f} M parameters ({size(found.parameter_bytes)})"
    yield f"{found.tokens:,} tokens in {found.examples:,} examples of {found.max_length:,}"
    yield f"  {'bytes per token':>15} {'in all':>10}"
    for number, arrays in _groups(found.arrays):
        nbytes = sum(array.nbytes for array in arrays)
        yield f"  {nbytes / found.tokens:>15,.1f} {size(nbytes):>10}  {_group_name(arrays, number)}"
    yield f"  {found.nbytes / found.tokens:>15,.1f} {size(found.nbytes):>10}  in all"
    yield f"objects: {found.shards:,} shards, {found.documents:,} documents"
    more = " (the default would be refused)" if found.least_budget > layout.DEFAULT_BUDGET else ""
    yield f"host memory: a budget of {size(found.budget)}, at least {size(found.least_budget)}{more}"
    yield (
        f"time: {duration(costs.seconds)}, which the {costs.bottleneck} decides: forward {duration(costs.forward_seconds)} on "
        f"{rates.gpus} GPU at {costs.tokens_per_second:,.0f} tokens/s{_source(rates)}, disk {duration(costs.disk_seconds)} at "
        f"{size(rates.disk_bytes_per_second)}/s"
    )
    yield (
        f"cost: {money(costs.usd_per_month)} per month at {rates.storage_price:g} USD per GB; computing it again "
        f"{money(costs.usd_to_recompute)}, {costs.gpu_hours:,.1f} GPU hours at {rates.gpu_price:g} USD"
    )
    yield costs.verdict


def size(count: float) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} PB"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:,.0f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def _groups(arrays: tuple[PlannedArray, ...]) -> Iterator[tuple[int, list[PlannedArray]]]:
    """Arrays of one kind together, whichever layer they are of; what belongs to no site last. With the number of columns."""

    def kind(array: PlannedArray) -> tuple[Any, ...]:
        table, port = array.column.partition("/")[0], array.column.rpartition(":")[2]
        return (0, table, port, array.role, array.dtype, array.shape) if array.is_of_site else (1,)

    for _, group in groupby(sorted(arrays, key=kind), key=kind):
        found = list(group)
        yield len({array.column for array in found}), found


def _group_name(arrays: list[PlannedArray], columns: int) -> str:
    first = arrays[0]
    if not first.is_of_site:
        return "tokens, text, positions, keys"
    several = f" and {columns - 1} more" if columns > 1 else ""
    return f"{first.dtype} [{', '.join(map(str, first.shape))}] {first.column}{several}"


def _source(rates: Rates) -> str:
    """Where tokens per second come from, unless they were measured."""
    return "" if rates.gpu_tokens_per_second else f" (if it achieves {rates.gpu_flops / 1e12:,.0f} TFLOP/s)"
