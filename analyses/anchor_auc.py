"""How well attention from the target to label words tells what the model predicts (Wang et al., EMNLP 2023, section 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tensortape.stores import Run
from tensortape.stores.attention import Attention, Part
from tensortape.stores.dtypes import Array

from .anchor_positions import AnchorPositions
from .anchor_source import Prompt, layer_of, measured
from .errors import AnchorError
from .results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class AnchorAUC(Result):
    """AUCROC_l, how well A(q, p_i) at layer l tells the predicted label, and R_l, the layers' running share of what is above 0.5.

    Args:
        sites: attention modules. layers: their layers, None where not known.
        auc: area under the ROC curve of the classes' scores, the mean over pairs of classes; float64 [site].
        share: R_l = sum over layers up to l of (auc - 0.5), over that of all layers; [site]. It can leave [0, 1] where layers are
            below 0.5, and means little where all are near it.
        counts: prompts by predicted class, of those that count; int64 [class].
        classes: their names; classes that are never predicted are left out.
        left_out: prompts whose prediction is no label word of theirs.
    """

    sites: tuple[str, ...]
    layers: tuple[int | None, ...]
    auc: Array
    share: Array
    counts: Array
    classes: tuple[str, ...]
    left_out: int

    def to_pandas(self) -> pd.DataFrame:
        """One row per site."""
        import pandas as pd

        columns = {"site": self.sites, "layer": self.layers, "AUCROC_l": self.auc, "R_l": self.share}
        return pd.DataFrame(columns).assign(prompts=int(self.counts.sum()))

    def plot(self) -> Figure:
        """Both by layer. Needs the extra `plots`."""
        from .figures.anchors import anchors_figure

        return anchors_figure(None, self)

    def __repr__(self) -> str:
        best = int(np.argmax(self.auc))
        where = f"{self.sites[best]}, the best of {len(self.sites)} sites"
        return f"<AnchorAUC: {self.auc[best]:.3f} at {where}, on {self.counts.sum()} prompts>"


def anchor_auc(
    run: Run,
    positions: AnchorPositions,
    predictions: str | Sequence[Any] | Array,
    *,
    sites: Sequence[str | int] | None = None,
    executor: Executor | None = None,
) -> AnchorAUC:
    """Whether attention from the target to the label words of each class foretells the model's answer, by layer.

    Args:
        run: with `attention`.
        positions: see `anchor_positions`.
        predictions: what the model predicts (not the right answer): a column of the run, or one entry per example of it; token ids
            or names of label words.
        sites: attention sites as `run.attention` takes them; all by default.
        executor: as for `sweep`.

    Raises:
        AttentionNotRecordedError. AnchorError: all predictions are of one class.
    """
    chosen = [run.attention(site) for site in (run.attention_sites if sites is None else sites)]
    predicted = positions.classify(run, predictions)
    kept = predicted >= 0
    names = np.unique(predicted[kept])
    if len(names) < 2:
        raise AnchorError(
            f"AUCROC_l compares prompts of different predicted labels, but those of {len(positions)} prompts are all of "
            f"{[positions.class_names[name] for name in names]}"
        )
    scores = measured(chosen, positions, partial(attended, classes=len(positions.class_names)), executor)
    auc = np.array([area(rows[kept][:, names], np.searchsorted(names, predicted[kept])) for rows in scores])
    return AnchorAUC(
        tuple(site.site for site in chosen),
        tuple(layer_of(run, site) for site in chosen),
        auc,
        share(auc),
        np.bincount(predicted[kept])[names],
        tuple(positions.class_names[name] for name in names),
        int((~kept).sum()),
    )


def attended(attention: Attention, prompt: Prompt, *, classes: int) -> Array:
    """A(q, p_i) of one prompt summed over heads and over the label words of each class; float64 [classes]."""
    example, labels, of_label, target = prompt
    weights = replace(attention, part=Part(None, [target], labels))[example]
    return np.bincount(of_label, weights.sum((0, 1), dtype=np.float64), classes)


def area(scores: Array, classes: Array) -> float:
    """Area under the ROC curve of scores [n, K] for classes 0 to K - 1 [n], all of which occur; rows are normalised first."""
    from sklearn.metrics import roc_auc_score

    total = scores.sum(1, keepdims=True)
    shares = np.divide(scores, total, out=np.full_like(scores, 1 / scores.shape[1]), where=total > 0)
    return float(roc_auc_score(classes, shares[:, 1] if shares.shape[1] == 2 else shares, multi_class="ovo"))


def share(auc: Array) -> Array:
    """R_l of AUCROC_l; NaN where the layers add up to nothing."""
    above = np.cumsum(auc - 0.5)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = above / above[-1]
    return found
