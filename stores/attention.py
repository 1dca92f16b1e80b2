"""Attention of a recorded run: probabilities and saliency, rebuilt from what was recorded, a few queries at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .columns import Column
from .dtypes import Array
from .errors import AttentionNotRecordedError, GradientError
from .schema import Json
from .weights_numpy import of_each_head
from .weights_numpy import weights as weights_in_numpy

TILE_BYTES = 16 << 20
Chosen = int | slice | Sequence[int] | Array | None


@dataclass(frozen=True)
class Recorded:
    """The columns of one attention site, by port: `q k keys bias sinks`, or `weights weights|size`; `v z z.grad@loss dropout`."""

    path: str
    call: int
    columns: Mapping[str, Column]

    @property
    def name(self) -> str:
        """The module path, with the call if it is not the first."""
        return self.path if self.call == 1 else f"{self.path}#{self.call}"

    @property
    def facts(self) -> Json:
        """Scale, softcap and what else holds for all examples."""
        site = self.columns["q" if "q" in self.columns else "weights"].site or {}
        found: Json = site["attention"]
        return found

    @property
    def tables(self) -> tuple[str, str]:
        """The tables whose rows queries and keys are."""
        if "q" in self.columns:
            return self.need("q").name.partition("/")[0], self.need("k").name.partition("/")[0]
        pair = self.need("weights").name.partition("/")[0].removeprefix("pair").removeprefix(".")
        queries = _stream(self.need("weights"))
        keys = pair.removeprefix(f"{queries}.") or queries
        return _table(queries), _table(keys)

    def need(self, port: str) -> Column:
        """A column, or AttentionNotRecordedError saying which site to ask for."""
        if port not in self.columns:
            wanted = "attention.grad" if port.startswith(("v", "z", "dropout", "weights.grad")) else "attention"
            raise AttentionNotRecordedError(
                f"{self.name}:{port} was not recorded; record sites=['{self.name}:{wanted}']. Recorded: {', '.join(self.columns)}"
            )
        return self.columns[port]


def _stream(column: Column) -> str:
    """The stream that a site's layout names: `token.decoder` in `example token.decoder ...` is the stream `decoder`."""
    named = next(part for part in str((column.site or {})["layout"]).split() if part.startswith("token"))
    return named.partition(".")[2] or "token"


def _table(stream: str) -> str:
    return "token" if stream == "token" else f"token.{stream}"


@dataclass(frozen=True)
class Part:
    """Which heads, queries and keys of a matrix are wanted; a single number keeps its axis."""

    heads: Chosen = None
    queries: Chosen = None
    keys: Chosen = None


@dataclass(frozen=True)
class Attention:
    """Probabilities of one attention site. `attention[i]` is example i: [head, query, key], float32, real tokens only.

    Rows of queries that may attend to nothing are NaN.
    """

    recorded: Recorded
    part: Part = field(default_factory=Part)

    @property
    def site(self) -> str:
        """The module path, with the call if it is not the first."""
        return self.recorded.name

    @property
    def facts(self) -> Json:
        """What was recorded of the attention function: scale, softcap, implementation, and whether weights were stored."""
        return self.recorded.facts

    @property
    def tables(self) -> tuple[str, str]:
        """The tables whose rows queries and keys are."""
        return self.recorded.tables

    def __getitem__(self, example: int) -> Array:
        tiles = [tile for _, tile in self.tiles(example)]
        if len(tiles) == 1:
            return tiles[0]
        return np.concatenate(tiles, 1) if tiles else self._empty(example)

    def __len__(self) -> int:
        return len(self.recorded.columns["q" if "q" in self.recorded.columns else "weights"].present)

    def tiles(self, example: int, tile_bytes: int = TILE_BYTES) -> Iterator[tuple[Array, Array]]:
        """(query numbers [R], probabilities [head, R, key]) of an example; never the whole matrix."""
        matrix = self._matrix(example)
        heads, queries, keys = matrix.chosen(self.part)
        count = max(1, tile_bytes // max(1, 4 * len(heads) * matrix.shape[2]))
        for start in range(0, len(queries), count):
            rows = queries[start : start + count]
            tile = matrix.rows(heads, rows).astype(np.float32, copy=False)
            yield rows, tile if self.part.keys is None else tile[:, :, keys]

    def _matrix(self, example: int) -> _Matrix:
        return _matrix(self.recorded, example)

    def _empty(self, example: int) -> Array:
        heads, queries, keys = self._matrix(example).chosen(self.part)
        return np.empty((len(heads), len(queries), len(keys)), np.float32)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.site}: {len(self)} examples>"


@dataclass(frozen=True)
class Saliency(Attention):
    """A * dL/dA of one attention site, as in Wang et al. (2023, eq. 1) before summing heads; `saliency[i]`: [head, query, key].

    dL/dA = dL/dz V^T, so neither the model nor its weights are needed; 0 where a query may not attend.
    """

    target: str = "loss"

    def _matrix(self, example: int) -> _Matrix:
        weights = _matrix(self.recorded, example)
        if "weights.grad@" + self.target in self.recorded.columns:
            return _Product(weights, _stored(self.recorded, example, f"weights.grad@{self.target}"))
        column = self.recorded.need(f"z.grad@{self.target}")
        dropped = self.recorded.columns.get("dropout")
        if dropped is not None and dropped[example] > 0:
            raise GradientError(
                f"dropout of {float(dropped[example]):g} was active in the attention of {self.site} when example {example} was "
                "recorded; which weights it dropped is not known, so A * dL/dA cannot be rebuilt. Record in eval mode, or with the "
                "attention dropout set to 0"
            )
        return _Chained(weights, _wide(self.recorded.need("v")[example]), _wide(column[example]))


def find(sites: Sequence[Column], chosen: Callable[[Column], bool]) -> list[Recorded]:
    """The attention sites of which any column is chosen, in the order of recording, each with all of its columns."""
    found: dict[tuple[str, int], dict[str, Column]] = {}
    wanted = dict.fromkeys((column.site["path"], column.site["call"]) for column in sites if column.site and chosen(column))
    for column in sites:
        site = column.site or {}
        key = site["path"], site["call"]
        if key in wanted:
            port = site["port"] if site.get("reduce") is None else f"{site['port']}|{site['reduce']}"
            found.setdefault(key, {})[port] = column
    return [Recorded(*key, found[key]) for key in wanted if {"q", "weights"} & found[key].keys()]


class _Matrix:
    """Probabilities of one example."""

    shape: tuple[int, int, int]

    def rows(self, heads: Array, queries: Array) -> Array:
        """[head, R, key] of some heads and queries."""
        raise NotImplementedError

    def chosen(self, part: Part) -> tuple[Array, Array, Array]:
        """Numbers of the wanted heads, queries and keys."""
        wanted = (part.heads, part.queries, part.keys)
        heads, queries, keys = (_numbers(one, count, name) for one, count, name in zip(wanted, self.shape, _AXES, strict=True))
        return heads, queries, keys


_AXES = ("heads", "queries", "keys")


class _Rebuilt(_Matrix):
    """From queries, keys and facts."""

    def __init__(self, recorded: Recorded, example: int) -> None:
        self._facts = recorded.facts
        self._q, self._k = _wide(recorded.need("q")[example]), _wide(recorded.need("k")[example])
        self._seen = recorded.need("keys")[example]
        self._bias = _wide(recorded.columns["bias"][example]) if "bias" in recorded.columns else None
        self._sinks = _wide(recorded.columns["sinks"][example]) if "sinks" in recorded.columns else None
        self.shape = (self._q.shape[1], len(self._q), len(self._k))

    def rows(self, heads: Array, queries: Array) -> Array:
        keys = np.arange(self.shape[2])
        group = self.shape[0] // self._k.shape[1]
        first, last = self._seen[queries, 0, None], self._seen[queries, 1, None]
        return _weights(
            self._q[queries][:, heads].swapaxes(0, 1),
            self._k[:, heads // group].swapaxes(0, 1),
            scale=self._facts["scale"],
            softcap=self._facts["softcap"],
            bias=None if self._bias is None else self._bias_of(heads, queries, keys),
            keep=((keys >= first) & (keys < last))[None],
            sinks=None if self._sinks is None else self._sinks[heads],
        )

    def _bias_of(self, heads: Array, queries: Array, keys: Array) -> Array:
        """[head, R, key]: entry [n, 0] of the bias is that of the key n before a query, [n, 1] that of the key n after it."""
        distance = keys[None, :] - queries[:, None]
        found: Array = self._bias[np.abs(distance), (distance > 0).astype(int)][:, :, heads].transpose(2, 0, 1)  # type: ignore[index]
        return found


class _Stored(_Matrix):
    """From recorded weights."""

    def __init__(self, column: Column, example: int, shape: tuple[int, int, int], window: int | None) -> None:
        self._column, self._example, self.shape, self._window = column, example, shape, window

    def rows(self, heads: Array, queries: Array) -> Array:
        keys = self.shape[2] if self._window is None else self._window
        pieces = np.split(queries, np.flatnonzero(np.diff(queries) != 1) + 1) if len(queries) else []
        read = [self._column.within(self._example, int(run[0]) * keys, int(run[-1] + 1) * keys) for run in pieces]
        rows = _wide(np.concatenate([run.reshape(-1, keys, self.shape[0]) for run in read])[:, :, heads].transpose(2, 0, 1))
        if self._window is None:
            return rows
        found = np.zeros((len(heads), len(queries), self.shape[2]), rows.dtype)
        at = queries[:, None] // keys * keys + np.arange(keys)
        found[:, np.arange(len(queries))[:, None], at] = rows
        return found


class _Product(_Matrix):
    """Of two recorded matrices; 0 where there is no weight."""

    def __init__(self, weights: _Matrix, gradient: _Matrix) -> None:
        self._weights, self._gradient, self.shape = weights, gradient, weights.shape

    def rows(self, heads: Array, queries: Array) -> Array:
        weights = self._weights.rows(heads, queries)
        return np.where(weights == 0, 0, weights * self._gradient.rows(heads, queries))


class _Chained(_Matrix):
    """Of weights, values [Tk, Hkv, dv] and dL/dz [Tq, H, dv]."""

    def __init__(self, weights: _Matrix, values: Array, gradient: Array) -> None:
        self._weights, self.shape = weights, weights.shape
        self._values, self._gradient = values.transpose(1, 2, 0), gradient.swapaxes(0, 1)

    def rows(self, heads: Array, queries: Array) -> Array:
        weights = self._weights.rows(heads, queries)
        values = of_each_head(self._values, self.shape[0])[heads]
        return np.where(weights == 0, 0, weights * np.matmul(self._gradient[heads][:, queries], values))


def _matrix(recorded: Recorded, example: int) -> _Matrix:
    return _Rebuilt(recorded, example) if "q" in recorded.columns else _stored(recorded, example, "weights")


def _stored(recorded: Recorded, example: int, port: str) -> _Stored:
    column = recorded.need(port)
    queries, keys = (int(count) for count in recorded.need("weights|size")[example])
    window = recorded.facts["window"]
    return _Stored(column, example, (column.shape[1], keys if window else queries, keys), window)


def _weights(q: Array, k: Array, *, scale: float, softcap: float | None, **arrays: Array | None) -> Array:
    """With torch where there is one, for its threads."""
    if importlib.util.find_spec("torch") is None:
        return weights_in_numpy(q, k, scale=scale, softcap=softcap, **arrays)
    import torch

    from .weights_torch import weights as weights_in_torch

    given = {name: None if array is None else torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    wide_q, wide_k = (torch.from_numpy(np.ascontiguousarray(array)) for array in (q, k))
    found: Array = weights_in_torch(wide_q, wide_k, scale=scale, softcap=softcap, **given).numpy()
    return found


def _wide(array: Array) -> Array:
    """float64 as it is, everything else as float32."""
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _numbers(wanted: Chosen, count: int, what: str) -> Array:
    """An index, a slice or a list of them as numbers from 0 on."""
    if isinstance(wanted, (int, np.integer)):
        wanted = [int(wanted)]
    try:
        return (
            np.arange(count)
            if wanted is None
            else np.arange(count)[wanted if isinstance(wanted, slice) else np.asarray(wanted, int)]
        )
    except IndexError:
        raise IndexError(f"{what}={wanted} does not fit an example with {count} {what}") from None
