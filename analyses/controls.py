"""What the accuracy of a probe is to be held against: control tasks, baselines that see no activation, description lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tensortape.stores.dtypes import Array

from .spaces import Labels


def control_labels(labels: Labels, types: Array, seed: int) -> Array:
    """A control task (Hewitt & Liang 2019, arXiv 1909.03368): each type has one random label, drawn as labels are distributed.

    Args:
        labels: the real ones; where they are missing, so are these.
        types: of each row.
        seed: the draw depends on it and on the types that are labelled.
    """
    here = labels.of_row >= 0
    shares = np.bincount(labels.of_row[here], minlength=len(labels.classes))
    every, of_row = np.unique(types[here], return_inverse=True)
    drawn = np.random.default_rng(seed).choice(len(labels.classes), len(every), p=shares / shares.sum())
    found = np.full(len(labels.of_row), -1, np.int32)
    found[here] = drawn[of_row]
    return found


def majority(known: Array, held_out: Array) -> float:
    """Accuracy of always saying the most frequent class of the training rows."""
    return float(np.mean(held_out == np.bincount(known).argmax()))


def type_lookup(known_types: Array, known: Array, types: Array, held_out: Array) -> float:
    """Accuracy of each type's most frequent class among the training rows, the majority class for types never seen."""
    counts = pd.DataFrame({"type": known_types, "label": known}).value_counts().reset_index(name="count")
    counts = counts.sort_values(["type", "count", "label"], ascending=[True, False, True]).drop_duplicates("type")
    predicted = pd.Series(types).map(counts.set_index("type")["label"]).fillna(np.bincount(known).argmax())
    return float(np.mean(predicted.to_numpy() == held_out))


def code_bits(first_rows: int, classes: int, nats: Sequence[float]) -> float:
    """Bits of an online code (Voita & Titov 2020, arXiv 2003.12298, eq. 3): the first block uniformly, each later one by a probe
    that was trained on all blocks before it."""
    return float(first_rows * np.log2(classes) + sum(nats) / np.log(2))
