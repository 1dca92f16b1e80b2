"""What `record --attention --gradients` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tensortape.instrument import Site

ATTENTION = ("none", "qk", "weights", "auto")


def selection(sites: Sequence[str], attention: str, *, gradients: bool) -> list[str | Site]:
    """The sites asked for; with gradients, also the gradient at each and what saliency is rebuilt from."""
    if attention not in ATTENTION:
        raise ValueError(f"--attention is one of {', '.join(ATTENTION)}, not {attention!r}")
    plain = [site for site in sites if site != "none"]
    graded = [f"{site}.grad" if ":" in site else f"{site}:{_port(site)}.grad" for site in plain] if gradients else []
    port = "attention.grad" if gradients else "attention"
    attended = [] if attention == "none" else [Site(port, store=attention)]  # type: ignore[arg-type]
    return [*plain, *graded, *attended]


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


def _port(site: str) -> str:
    """Where an alias is tapped: `resid_pre` is what a block is given."""
    return "in" if site.rpartition(".")[2].startswith(("resid_pre", "resid_mid")) else "out"
