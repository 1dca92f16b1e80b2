"""Which classes a model will confuse, from how near the keys of their label words are (Wang et al., EMNLP 2023, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array
from tensortape.stores.weights_numpy import of_each_head

from .anchor_positions import AnchorPositions
from .anchor_source import check_table, layer_of
from .errors import AnchorError
from .gram import ClassSums, ClassTotals, Gram, Sums, shift_of
from .results import Result
from .rows import Rows
from .sweep import Accumulator, Job, sweep

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_CLASS = "class"


@dataclass(frozen=True, eq=False, repr=False)
class AnchorDistance(Result):
    """Confusion of classes as the keys of their label words foretell it, beside that which is there.

    Args:
        site: an attention module. layer: None where not known.
        classes: their names.
        distance: of the mean keys of two classes' label words (heads side by side, along the principal components of the queries
            at q, each times its singular value), over the largest; [class, class], 1 on the diagonal. Small foretells confusion
        auc: area under the ROC curve of P(a) / P(b) over prompts of the two classes, small where they are confused; 1 on the
            diagonal, NaN where a class does not occur; None without gold labels and scores.
        spearman: rank correlation of the two over pairs of classes; NaN for fewer than three pairs, and where all are alike.
        singular_values: of the centred queries, largest first; [components].
        prompts: number of queries.
    """

    site: str
    layer: int | None
    classes: tuple[str, ...]
    distance: Array
    auc: Array | None
    spearman: float | None
    singular_values: Array
    prompts: int

    def to_pandas(self) -> pd.DataFrame:
        """One row per pair of classes."""
        import pandas as pd

        return pd.DataFrame([self._row(a, b) for a, b in combinations(range(len(self.classes)), 2)])

    def plot(self) -> Figure:
        """Predicted confusion, and real confusion where it is known. Needs the extra `plots`."""
        from .figures.anchors import distance_figure

        return distance_figure(self)

    def __repr__(self) -> str:
        pairs = self.to_pandas().sort_values("distance")
        nearest = f"{pairs['first'].iloc[0]!r} and {pairs['second'].iloc[0]!r}"
        beside = "" if self.spearman is None else f"; rank correlation with real confusion {self.spearman:.2f}"
        return f"<AnchorDistance at {self.site}: {nearest} are nearest of {len(self.classes)} classes{beside}>"

    def _row(self, a: int, b: int) -> dict[str, object]:
        found = {"first": self.classes[a], "second": self.classes[b], "distance": float(self.distance[a, b])}
        return found if self.auc is None else {**found, "auc": float(self.auc[a, b])}


def anchor_distances(
    run: Run,
    positions: AnchorPositions,
    site: str | int,
    *,
    components: int = 10,
    gold: str | Sequence[Any] | Array | None = None,
    scores: str | Array | None = None,
    executor: Executor | None = None,
) -> AnchorDistance:
    """How far apart the keys of label words are for the queries that look for them.

    Args:
        run: with `attention` (or `q` and `k`) at the site.
        positions: see `anchor_positions`; at least two classes.
        site: an attention site as `run.attention` takes it.
        components: most principal components of the queries.
        gold: the right label words: a column, or one entry per example of the run.
        scores: logits or log-probabilities of the classes, [examples, class]: a column of the example table, or an array.
        executor: as for `sweep`.

    Raises:
        AttentionNotRecordedError. AnchorError: fewer than two classes or prompts, or scores that do not fit.
    """
    attention = run.attention(site)
    q, k = attention.recorded.need("q"), attention.recorded.need("k")
    names = positions.class_names
    if len(names) < 2 or len(positions) < 2:
        raise AnchorError(f"distances need two classes and two prompts; got {len(names)} classes and {len(positions)} prompts")
    check_table(attention, positions)
    queries, keys = _sources(run, positions, q, k)
    [[queried], [keyed]] = sweep(
        [Job(queries, (_gram(queries),)), Job(keys, (_totals(keys, len(names)),))], executor, title="anchors"
    )
    projected, singular = project(queried, _wide(keyed, k.shape[1:], q.shape[1]), components)
    distance = distances(projected)
    auc = None if gold is None or scores is None else confusion(positions.classify(run, gold), _scores(run, positions, scores))
    return AnchorDistance(
        attention.site,
        layer_of(run, attention),
        names,
        distance,
        auc,
        None if auc is None else _rank_correlation(distance, auc),
        singular,
        queried.count,
    )


def project(queries: Sums, keys: Array, components: int) -> tuple[Array, Array]:
    """Keys [class, d] along the principal components of queries, each times its singular value; and those values."""
    variance, axes = np.linalg.eigh(queries.covariance)
    kept = slice(None, -min(components, queries.count, len(variance)) - 1, -1)
    singular = np.sqrt(np.maximum(variance[kept], 0) * queries.count)
    return keys @ axes[:, kept] * singular, singular


def distances(keys: Array) -> Array:
    """Euclidean distances [class, class] of keys over the largest, 1 on the diagonal; NaN for a class without keys."""
    found: Array = np.linalg.norm(keys[:, None] - keys[None], axis=-1)
    np.fill_diagonal(found, 0)
    found = found / np.nanmax(found)
    np.fill_diagonal(found, 1)
    return found


def confusion(gold: Array, scores: Array) -> Array:
    """Area under the ROC curve of P(a) / P(b) over prompts whose gold class is a or b; [class, class], 1 on the diagonal."""
    from sklearn.metrics import roc_auc_score

    found = np.eye(scores.shape[1])
    for a, b in combinations(range(scores.shape[1]), 2):
        here = np.isin(gold, (a, b))
        both = (gold == a).any() and (gold == b).any()
        ratio = scores[here, a] - scores[here, b]
        found[a, b] = found[b, a] = roc_auc_score(gold[here] == a, ratio) if both else np.nan
    return found


def _sources(run: Run, positions: AnchorPositions, q: Column, k: Column) -> tuple[Rows, Rows]:
    """Queries at targets, and keys at label words with their classes."""
    examples = np.zeros(len(run), bool)
    examples[positions.examples] = True
    lengths = q.lengths[positions.examples]
    begins = np.cumsum(lengths) - lengths
    targets, labels = np.zeros(lengths.sum(), bool), np.full(lengths.sum(), -1)
    targets[begins + positions.targets] = True
    labels[begins[positions.owner] + positions.positions] = positions.classes
    return Rows((q,), examples, {}, targets), Rows((k,), examples, {_CLASS: labels}, labels >= 0)


def _gram(rows: Rows) -> Accumulator:
    return Gram(shift_of(rows.first_block()))


def _totals(rows: Rows, classes: int) -> Accumulator:
    return ClassSums(shift_of(rows.first_block()), _CLASS, classes)


def _wide(keys: ClassTotals, shape: tuple[int, ...], heads: int) -> Array:
    """Mean keys of classes, less one shift, with a key for each head of the queries; [class, head * d], NaN for no keys."""
    means = np.where(keys.counts[:, None] > 0, keys.offsets, np.nan).reshape(-1, *shape).swapaxes(0, 1)
    return of_each_head(means, heads).swapaxes(0, 1).reshape(len(keys.counts), -1)


def _scores(run: Run, positions: AnchorPositions, given: str | Array) -> Array:
    """Scores of the prompts, [n, class]; float64."""
    values = np.asarray(run[given].rows() if isinstance(given, str) else given, np.float64)
    wanted = (len(run), len(positions.class_names))
    if values.shape != wanted:
        raise AnchorError(f"scores have the shape {values.shape}; one row per example and one column per class is {wanted}")
    found: Array = values[positions.examples]
    return found


def _rank_correlation(distance: Array, auc: Array) -> float:
    from scipy.stats import spearmanr

    upper = np.triu_indices(len(distance), 1)
    known = np.isfinite(auc[upper]) & np.isfinite(distance[upper])
    pairs = distance[upper][known], auc[upper][known]
    differ = known.sum() > 2 and all(np.ptp(one) > 0 for one in pairs)
    return float(spearmanr(*pairs).statistic) if differ else float("nan")
