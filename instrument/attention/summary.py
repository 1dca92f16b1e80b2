"""Attention of a batch in two numbers per site, for a tracker: of a few of its queries, so that it costs little."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from tensortape.stores.dtypes import Array
from tensortape.stores.weights_torch import weights

from ..capture import Capture

EXAMPLES, QUERIES = 8, 64  # of a batch that are looked at, most
Ports = Mapping[str, Capture]  # of one call: `q k keys bias sinks`, `weights`, or reductions such as `weights|entropy`


def summaries(captures: Iterable[Capture]) -> Iterator[tuple[str, dict[str, float]]]:
    """(module path, numbers) of every attention call whose weights were recorded, or what they are made of.

    `entropy` is the mean entropy of a query's weights, in nats, and `sink` the mean mass on the first key of its example: over all
    heads, and over all queries but the first of each example, which often has no choice (of cross-attention, over all). They are
    those of up to 64 queries in up to 8 examples, evenly spread; where the entropies, or the masses on the first key, were computed
    for the run anyway, of all. Windows have no first key. Numbers of which nothing is known are left out.
    """
    by_call: dict[str, dict[str, Capture]] = {}
    for taken in captures:
        if taken.site.is_attention and not taken.site.is_gradient:
            port = taken.site.port if taken.suffix is None else f"{taken.site.port}|{taken.suffix.partition('=')[0]}"
            by_call.setdefault(str(taken.site).rpartition(":")[0], {})[port] = taken
    for call, ports in by_call.items():
        means = {name: float(values.nanmean()) for name, values in _values(ports).items()}
        yield call, {name: mean for name, mean in means.items() if not np.isnan(mean)}


def _values(ports: Ports) -> dict[str, torch.Tensor]:
    """Entropies, and masses on the first key, of queries and heads; NaN of queries that see nothing."""
    known = {}
    if "weights|entropy" in ports:
        known["entropy"] = ports["weights|entropy"].rows[_later_rows(ports["weights|entropy"])]
    to_keys = ports.get("weights|keys")
    if to_keys is not None and 0 in (to_keys.tap.options.keys or ()):
        known["sink"] = to_keys.rows[_later_rows(to_keys), list(to_keys.tap.options.keys or ()).index(0)]
    tiles = [] if len(known) == 2 else [tile.float() for tile in _tiles(ports)]
    if tiles:
        known.setdefault("entropy", torch.cat([torch.special.entr(tile).sum(-1).flatten() for tile in tiles]))
        if _window(ports) is None:
            known.setdefault("sink", torch.cat([tile[..., 0].flatten() for tile in tiles]))
    return known


def _tiles(ports: Ports) -> Iterator[torch.Tensor]:
    """Weights [H, R, K] of some queries of some examples."""
    if "weights" in ports:
        taken = ports["weights"]
        keys = [_window(ports) or count for count in taken.about["keys"]]
        counts = [pairs // max(count, 1) for pairs, count in zip(taken.lengths or [], keys, strict=True)]
        for example, queries in _sampled(counts, _first(taken)):
            start = sum((taken.lengths or [])[:example])
            rows = taken.rows[start : start + counts[example] * keys[example]].reshape(counts[example], keys[example], -1)
            yield rows[torch.from_numpy(queries).to(rows.device)].permute(2, 0, 1)
    elif ports.keys() >= {"q", "k", "keys"}:
        for example, queries in _sampled(ports["q"].lengths or [], _first(ports["q"])):
            yield _rebuilt(ports, example, queries)
    elif "weights|queries" in ports:
        taken = ports["weights|queries"]
        asked = np.array(taken.tap.options.queries)
        for example, _ in _sampled(taken.lengths or [], _first(taken)):
            rows = _rows(taken, example)
            yield rows[:, np.flatnonzero(asked % len(rows) >= _first(taken))].permute(2, 1, 0)


def _rebuilt(ports: Ports, example: int, queries: Array) -> torch.Tensor:
    """As `tensortape.stores.attention` rebuilds weights from what is recorded, [H, R, K]."""
    q, k, seen = (_rows(ports[name], example) for name in ("q", "k", "keys"))
    facts, at = ports["q"].about["attention"], torch.from_numpy(queries)
    keys = torch.arange(len(k))
    distance = keys - at[:, None]
    first, last = seen[at][:, :1], seen[at][:, 1:]
    bias = _rows(ports["bias"], example)[distance.abs(), (distance > 0).long()].permute(2, 0, 1) if "bias" in ports else None
    return weights(
        q[at.to(q.device)].transpose(0, 1),
        k.transpose(0, 1),
        scale=facts["scale"],
        softcap=facts["softcap"],
        bias=None if bias is None else bias.to(q.device),
        keep=((keys >= first) & (keys < last)).to(q.device),
        sinks=ports["sinks"].rows[example] if "sinks" in ports else None,
    )


def _rows(taken: Capture, example: int) -> torch.Tensor:
    """The rows of one example."""
    lengths = taken.lengths or []
    start = sum(lengths[:example])
    return taken.rows[start : start + lengths[example]]


def _sampled(counts: list[int], first: int) -> Iterator[tuple[int, Array]]:
    """Some examples, and some of their queries from the first that counts on; all where there are few."""
    there = np.flatnonzero(np.array(counts) > first)
    examples = there[_spread(len(there), EXAMPLES)].tolist()
    for example in examples:
        yield example, first + _spread(counts[example] - first, QUERIES // len(examples))


def _spread(count: int, most: int) -> Array:
    """Up to so many numbers below a count, evenly spread; int64."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


def _later_rows(taken: Capture) -> torch.Tensor:
    """Which rows, one per query, count; bool."""
    places = torch.cat([torch.arange(count) for count in taken.lengths or []] or [torch.empty(0)])
    return (places >= _first(taken)).to(taken.rows.device)


def _first(taken: Capture) -> int:
    """The first query of an example that counts."""
    return 0 if taken.about.get("cross") or taken.about["attention"]["window"] is not None else 1


def _window(ports: Ports) -> int | None:
    """Tokens of a window, where examples are cut into windows."""
    found: int | None = next(taken.about["attention"]["window"] for taken in ports.values() if "attention" in taken.about)
    return found
