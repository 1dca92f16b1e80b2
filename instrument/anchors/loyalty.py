"""What a model answers to prompts, and how far two sets of answers are the same (Wang et al., EMNLP 2023, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import BatchError


@dataclass(frozen=True)
class Answers:
    """To n prompts: which label word has the highest score, int64 [n], and the `top` words of the vocabulary, int64 [n, top]."""

    labels: torch.Tensor
    words: torch.Tensor


def answers(logits: torch.Tensor, label_tokens: Sequence[int], top: int = 5) -> Answers:
    """Answers from the logits of each prompt's next token.

    Args:
        logits: [n, vocabulary].
        label_tokens: token ids of the label words; labels are numbers in this order.
    """
    scores = logits.float().cpu()
    return Answers(scores[:, list(label_tokens)].argmax(-1), scores.topk(top, -1).indices)


def label_loyalty(found: Answers, original: Answers) -> float:
    """Share of prompts whose label is the same."""
    _check(found, original)
    return float((found.labels == original.labels).double().mean())


def word_loyalty(found: Answers, original: Answers) -> float:
    """Mean over prompts of |both| / |either| of their top words (Jaccard)."""
    _check(found, original)
    both = (found.words[:, :, None] == original.words[:, None, :]).any(-1).sum(-1).double()
    return float((both / (found.words.shape[1] + original.words.shape[1] - both)).mean())


def _check(found: Answers, original: Answers) -> None:
    if len(found.labels) != len(original.labels):
        raise BatchError(f"answers to the same prompts are compared, but these are {len(found.labels)} and {len(original.labels)}")
