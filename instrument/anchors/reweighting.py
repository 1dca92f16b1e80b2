"""Attention from the target to each label word, weighed anew (Wang et al., EMNLP 2023, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Self

import torch
from torch import nn

from ..errors import BatchError
from .edits import Rows, edited, layer_count
from .isolation import check_rows
from .prompts import Prompt, tokens_of


class AnchorWeights(nn.Module):
    """A^(q, p_i) = exp(beta) A(q, p_i), after the softmax and without normalising again; beta starts at 0, which changes nothing.

    Args:
        layers, heads: of the model. demonstrations: label words of each prompt, C.

    `beta` is the parameter, [layers, heads, demonstrations].
    """

    def __init__(self, layers: int, heads: int, demonstrations: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(layers, heads, demonstrations))

    @classmethod
    def of(cls, model: nn.Module, demonstrations: int) -> Self:
        """For a model, on its device."""
        heads: int = model.config.num_attention_heads  # type: ignore[union-attr,assignment]
        return cls(layer_count(model), heads, demonstrations).to(next(model.parameters()).device)

    @contextmanager
    def applied(self, model: nn.Module, labels: Sequence[Sequence[int]], targets: Sequence[int]) -> Iterator[None]:
        """Within the block, the model's targets see their label words with these weights.

        Args:
            model: see `edited`.
            labels: positions of the label words of each row of the batch, as many as there are demonstrations.
            targets: q of each row.

        Raises:
            BatchError: positions that do not fit. What `edited` raises.
        """
        if any(len(row) != self.beta.shape[2] for row in labels) or len(labels) != len(targets):
            raise BatchError(f"every row needs {self.beta.shape[2]} label words and a target; got {labels} and {targets}")

        def change(layer: int, shape: tuple[int, int, int, int], device: torch.device) -> list[Rows]:
            check_rows([[*row, target] for row, target in zip(labels, targets, strict=True)], shape)
            return [self._rows(layer, row, list(found), targets[row], shape, device) for row, found in enumerate(labels)]

        with edited(model, change):
            yield

    def fit(
        self,
        model: nn.Module,
        prompts: Sequence[Prompt],
        gold: Sequence[int],
        label_tokens: Sequence[int],
        *,
        epochs: int = 10,
        rate: float = 0.01,
        seed: int = 0,
    ) -> list[float]:
        """Learn beta by Adam, one prompt at a time; the model stays as it is, and so does every `.grad` of it.

        Args:
            model: in eval mode.
            prompts: other ones than those to be judged by.
            gold: the right label of each, a number in `label_tokens`.
            label_tokens: token ids of the label words; the loss is the cross-entropy over them alone.

        Returns:
            The mean loss of each epoch, in nats.
        """
        optimizer, order = torch.optim.Adam([self.beta], lr=rate), Random(seed)
        numbers = list(range(len(prompts)))
        losses = []
        for _ in range(epochs):
            order.shuffle(numbers)
            losses.append(sum(self._step(model, prompts[n], gold[n], label_tokens, optimizer) for n in numbers) / len(numbers))
        return losses

    def _step(
        self, model: nn.Module, prompt: Prompt, gold: int, label_tokens: Sequence[int], optimizer: torch.optim.Optimizer
    ) -> float:
        device = self.beta.device
        with torch.enable_grad(), self.applied(model, [prompt.labels], [len(prompt.tokens) - 1]):
            logits = model(input_ids=tokens_of([prompt], device), use_cache=False).logits[:, -1, list(label_tokens)]
            loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor([gold], device=device))
            (self.beta.grad,) = torch.autograd.grad(loss, [self.beta])
        optimizer.step()
        return float(loss.detach())

    def _rows(
        self, layer: int, row: int, labels: list[int], target: int, shape: tuple[int, int, int, int], device: torch.device
    ) -> Rows:
        at = torch.tensor(labels, device=device)
        logs = torch.zeros(shape[1], shape[3], device=device).index_copy(1, at, self.beta[layer].to(device))
        return Rows(row, torch.tensor([target], device=device), factor=logs.exp()[:, None])
