"""What `record --attention --gradients` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tensortape.instrument import PCA, Site
from tensortape.instrument.sites import resolve

ATTENTION = ("none", "qk", "weights", "auto")


def selection(
    model: nn.Module,
    sites: Sequence[str],
    attention: str,
    *,
    gradients: bool,
    sample_tokens: float | None = None,
    project: int | None = None,
) -> list[Site]:
    """The sites asked for (`none` for none); with gradients, also the gradient at each, and what saliency is rebuilt from.

    Args:
        sample_tokens: the share of each example's tokens that is recorded at sites other than attention, if not all are.
        project: the number of principal components that sites other than attention and gradients are recorded in, if any.
    """
    plain = [site for site in sites if site != "none"]
    taps = [tap for tap in resolve(model, plain) if not tap.site.is_attention] if plain and gradients else []
    graded = [f"{tap.path}{'' if tap.call is None else f'#{tap.call}'}:{tap.port}.grad" for tap in taps if not tap.site.is_gradient]
    attended = [] if attention == "none" else [Site("attention.grad" if gradients else "attention", store=attention)]  # type: ignore[arg-type]
    components = None if project is None else PCA(project)
    values = [Site(site, sample_tokens=sample_tokens, project=components) for site in plain]
    return [*values, *(Site(site, sample_tokens=sample_tokens) for site in graded), *attended]


def check_attention(attention: str) -> None:
    """ValueError for a kind of attention that there is not."""
    if attention not in ATTENTION:
        raise ValueError(f"--attention is one of {', '.join(ATTENTION)}, not {attention!r}")


def next_token_loss(model: nn.Module) -> dict[str, Any]:
    """The target `loss`: each example's summed cross-entropy of its next tokens; ValueError for a model without logits."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"--gradients differentiates the next-token loss, but {type(model).__name__} has no language modelling head"
        )

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        scores = outputs.logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        kept: torch.Tensor = batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]
        summed: torch.Tensor = -(scores * kept).sum(1)
        return summed

    return {"loss": loss}
