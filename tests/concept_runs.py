"""Runs of random numbers in which a concept moves the states, and gradients point along it or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tensortape.stores import Run, RunWriter, open_run

FEATURES = 7
SHIFT = np.array([3000.0, -800.0, 0, 0, 0, 0, 0])
TOPICS = np.array(["net", "mail", "gui"])


def site(layer: int, **more: Any) -> dict[str, Any]:
    """What a run says of the output of a layer."""
    said = {"path": f"layers.{layer}", "port": "out", "call": 1, "aliases": [["", "resid_post", layer, 2]]}
    return {**said, "layout": "example token ...", **more}


def gradient(layer: int, reduction: str | None = "sum", **more: Any) -> dict[str, Any]:
    """What a run says of the gradient there."""
    return site(layer, port="out.grad@logit", target={"name": "logit", "reduction": reduction}, **more)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the angle between two vectors."""
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def pooled(run: Run, name: str = "layers.1:out") -> np.ndarray:
    """Mean over the tokens of each example, float64."""
    return np.stack([rows.astype(np.float64).mean(0) for rows in run[name][:]])


def topics(run: Run) -> np.ndarray:
    """The topic of each example."""
    return np.array(run["example/topic"].rows())


def write_topics(path: Path, seed: int, reduction: str | None = "sum", examples: int = 101) -> Run:
    """Two sites of correlated features, two of which lie far from 0; topics move the states; documents of three examples each."""
    random = np.random.default_rng(seed)
    mixing = [np.random.default_rng(layer).normal(size=(FEATURES, FEATURES)) for layer in range(2)]
    lengths, topic = random.integers(2, 9, examples), random.integers(0, 3, examples)
    pairs = list(zip(lengths, np.eye(FEATURES)[:3][topic] * 2, strict=True))
    states = [
        [((random.normal(size=(n, FEATURES)) + moved) @ mix + SHIFT).astype(np.float32) for n, moved in pairs] for mix in mixing
    ]
    slopes = [[random.normal(size=(n, FEATURES)).astype(np.float32) for n in lengths] for _ in mixing]
    with RunWriter(path, durability="rename") as writer:
        for layer in range(2):
            writer.describe(f"token/layers.{layer}:out", site=site(layer))
            writer.describe(f"token/layers.{layer}:out.grad@logit", site=gradient(layer, reduction))
        writer.append(
            ids=[f"e{number}" for number in range(examples)],
            columns={
                **{f"token/layers.{layer}:out": states[layer] for layer in range(2)},
                **{f"token/layers.{layer}:out.grad@logit": slopes[layer] for layer in range(2)},
                "token/early": [(np.arange(n) < 2).astype(np.int64) for n in lengths],
                "example/topic": TOPICS[topic].tolist(),
                "example/is_net": topic == 0,
                "example/document": [f"d{number // 3}" for number in range(examples)],
            },
        )
    return open_run(path)


def write_rows(path: Path, states: np.ndarray, slopes: np.ndarray | None = None, **labels: Any) -> Run:
    """One site with a row per example, and gradients there."""
    columns = {"example/layers.0:out": states, "example/layers.0:out.grad@logit": slopes}
    with RunWriter(path, durability="rename") as writer:
        writer.describe("example/layers.0:out", site=site(0))
        if slopes is not None:
            writer.describe("example/layers.0:out.grad@logit", site=gradient(0))
        given = {name: values for name, values in columns.items() if values is not None}
        writer.append(ids=range(len(states)), columns=given | {f"example/{name}": values for name, values in labels.items()})
    return open_run(path)
