"""Small runs like those of large models: two features are far from zero, some are sparse, coarse or constant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from strategies import small_chunks

from tensortape.stores import Run, RunWriter, open_run

WIDTH = 13
LENGTHS = (23, 5, 41, 17, 1, 37, 29, 19, 3, 31, 11)
SPARSE, COARSE, FAR, LOW, CONSTANT = 2, 5, 3, 7, 11


def site(layer: int, port: str = "out", **more: Any) -> dict[str, Any]:
    """What a run says of a block's output."""
    aliases = [["", "resid_post", layer, 3]]
    return {"path": f"layers.{layer}", "port": port, "call": 1, "aliases": aliases, "layout": "example token ...", **more}


def states(rng: np.random.Generator, lengths: Sequence[int] = LENGTHS, width: int = WIDTH) -> list[np.ndarray]:
    """Rows of each example, [T_i, width], float32."""
    found = rng.normal(size=(sum(lengths), width)) @ rng.normal(size=(width, width)) / 3
    found[:, SPARSE] = np.maximum(found[:, SPARSE], 0)
    found[:, COARSE] = np.round(found[:, COARSE])
    found[:, FAR] += 3000
    found[:, LOW] -= 800
    found[:, CONSTANT] = 7.25
    return np.split(found.astype(np.float32), np.cumsum(lengths)[:-1])


def write(path: Path, columns: dict[str, Any], sites: dict[str, dict[str, Any]], ids: Sequence[Any] | None = None) -> Run:
    """A run in chunks of a few rows, in two appends."""
    every = list(ids) if ids is not None else [f"e{number}" for number in range(len(LENGTHS))]
    half = len(every) // 2
    with small_chunks(), RunWriter(path, durability="rename") as writer:
        for name, said in sites.items():
            writer.describe(name, site=said)
        for part in (slice(0, half), slice(half, None)):
            writer.append(ids=every[part], columns={name: values[part] for name, values in columns.items()})
    return open_run(path)


def rows_of(values: Sequence[np.ndarray]) -> np.ndarray:
    """All rows of all examples, float64."""
    return np.concatenate(values).astype(np.float64)
