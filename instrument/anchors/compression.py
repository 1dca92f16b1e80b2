"""Demonstrations compressed to their anchors (Wang et al., EMNLP 2023, section 3.2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import BatchError, UnsupportedModelError
from ..inference import inference
from .loyalty import Answers, answers, label_loyalty, word_loyalty
from .prompts import Prompt, alike, tokens_of

METHODS = ("hidden_anchor", "text_anchor", "hidden_random")
Kept = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Compressed:
    """Answers from compressed demonstrations, beside those from whole ones.

    Args:
        method: `full`; `hidden_anchor`, keys and values of label words and format tokens, computed in the whole prompt;
            `text_anchor`, these tokens alone, read anew; `hidden_random`, as `hidden_anchor`, each label word swapped for another
            token of its demonstration.
        draw: number of the random draw; 0 where nothing is drawn.
        label_loyalty, word_loyalty: see `tensortape.instrument.anchors`.
        accuracy: share of right labels; None without gold labels.
        kept: share of the demonstrations' tokens that is kept.
        seconds: per prompt, of the forward that answers it, with the keys and values at hand.
        speed_up: over the forward of the whole prompt.
    """

    method: str
    draw: int
    label_loyalty: float
    word_loyalty: float
    accuracy: float | None
    kept: float
    seconds: float
    speed_up: float


def compress(
    model: nn.Module,
    prompts: Sequence[Prompt],
    label_tokens: Sequence[int],
    *,
    gold: Sequence[int] | None = None,
    methods: Sequence[str] = METHODS,
    draws: int = 5,
    top: int = 5,
    batch_size: int = 16,
    seed: int = 0,
) -> list[Compressed]:
    """Answer prompts from their anchors alone.

    Args:
        model: a decoder of transformers with a KV cache; runs in eval mode without gradients.
        prompts: those of one shape run together.
        label_tokens: token ids of the label words.
        gold: the right label of each prompt, a number in `label_tokens`.
        methods: see `Compressed`.
        draws: of `hidden_random`, each of which is a row of the result.
        top: words that word loyalty compares.
        batch_size: most prompts at a time. Loyalties do not depend on it, times do.
        seed: of the draws.

    Returns:
        A row for the whole prompts, then one for each method and draw.

    Raises:
        BatchError: no prompts, or a demonstration without a token to draw. UnsupportedModelError: a cache that is not one of plain
        keys and values (a sliding window, say).
    """
    if not prompts or set(methods) - set(METHODS):
        raise BatchError(
            f"compress needs prompts and methods among {', '.join(METHODS)}; got {len(prompts)} prompts, {list(methods)}"
        )
    random = np.random.default_rng(seed)
    anchors = [prompt.anchors for prompt in prompts]
    plans: list[tuple[str, int, Kept, Answering]] = []
    plans += [("hidden_anchor", 0, anchors, from_cache)] if "hidden_anchor" in methods else []
    plans += [("text_anchor", 0, anchors, from_text)] if "text_anchor" in methods else []
    drawn = range(draws if "hidden_random" in methods else 0)
    plans += [("hidden_random", draw, [_random(prompt, random) for prompt in prompts], from_cache) for draw in drawn]
    with inference(model):
        every = [list(range(prompt.context)) for prompt in prompts]
        results = [
            (method, draw, kept, *_answered(model, prompts, kept, answering, batch_size))
            for method, draw, kept, answering in [("full", 0, every, from_text), *plans]
        ]
    whole, seconds = answers(results[0][3], label_tokens, top), results[0][4]
    context = sum(prompt.context for prompt in prompts)
    return [
        _scored(method, draw, sum(map(len, kept)) / context, answers(logits, label_tokens, top), whole, gold, took, seconds)
        for method, draw, kept, logits, took in results
    ]


Answering = Callable[[nn.Module, torch.Tensor, int, torch.Tensor], tuple[torch.Tensor, float]]


def _answered(
    model: nn.Module, prompts: Sequence[Prompt], kept: Kept, answering: Answering, batch_size: int
) -> tuple[torch.Tensor, float]:
    """Logits [n, vocabulary] of each prompt's next token, and seconds per prompt."""
    device = next(model.parameters()).device
    found: dict[int, torch.Tensor] = {}
    seconds = 0.0
    for numbers in alike(prompts, batch_size):
        tokens = tokens_of([prompts[number] for number in numbers], device)
        at = torch.tensor([kept[number] for number in numbers], dtype=torch.long, device=device)
        logits, took = answering(model, tokens, prompts[numbers[0]].context, at)
        found.update(zip(numbers, logits, strict=True))
        seconds += took
    return torch.stack([found[number] for number in range(len(prompts))]), seconds / len(prompts)


def from_text(model: nn.Module, tokens: torch.Tensor, context: int, kept: torch.Tensor) -> tuple[torch.Tensor, float]:
    """From the kept tokens and the query as a prompt of their own."""
    short = torch.cat([tokens.gather(1, kept), tokens[:, context:]], 1)
    return _timed(lambda: model(input_ids=short, use_cache=False).logits[:, -1])


def from_cache(model: nn.Module, tokens: torch.Tensor, context: int, kept: torch.Tensor) -> tuple[torch.Tensor, float]:
    """From the keys and values that the kept tokens have in the whole prompt; the query stays at the positions it has there."""
    past = only(model(input_ids=tokens[:, :context], use_cache=True).past_key_values, kept)
    positions = torch.arange(context, tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    query = tokens[:, context:]
    return _timed(lambda: model(input_ids=query, past_key_values=past, position_ids=positions, use_cache=True).logits[:, -1])


def only(cache: Any, kept: torch.Tensor) -> Any:
    """A copy of a filled cache with some positions of each row, [B, k], alone."""
    found = deepcopy(cache)
    for layer in getattr(found, "layers", [None]):
        if type(layer).__name__ != "DynamicLayer":
            raise UnsupportedModelError(
                f"demonstrations are compressed in a cache of plain keys and values, but this model's has {type(layer).__name__}"
            )
        for name in ("keys", "values"):
            tensor = getattr(layer, name)
            at = kept[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
            setattr(layer, name, tensor.gather(2, at))
    return found


def _timed(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    found = run()
    if found.is_cuda:
        torch.cuda.synchronize(found.device)
    return found, time.perf_counter() - began


def _random(prompt: Prompt, random: np.random.Generator) -> list[int]:
    """The anchors with each label word swapped for a token of its demonstration that is none."""
    others = [prompt.others(number) for number in range(len(prompt.demonstrations))]
    if not all(others):
        raise BatchError("a demonstration consists of its label word and format tokens alone, so there is no other token to draw")
    return sorted({*prompt.format, *(int(random.choice(choices)) for choices in others)})


def _scored(
    method: str,
    draw: int,
    kept: float,
    found: Answers,
    whole: Answers,
    gold: Sequence[int] | None,
    seconds: float,
    full_seconds: float,
) -> Compressed:
    accuracy = None if gold is None else float((found.labels == torch.tensor(list(gold))).double().mean())
    loyalty = label_loyalty(found, whole), word_loyalty(found, whole)
    return Compressed(method, draw, *loyalty, accuracy, kept, seconds, full_seconds / seconds)
