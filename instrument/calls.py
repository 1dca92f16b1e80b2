"""Reading a call of the root module: which streams of tokens it has."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import BatchError
from .streams import Stream, keep_mask, segments_of

_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions", "position_embedding")
_DERIVES_POSITIONS = ("opt", "roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "data2vec-text", "esm")
IGNORED_LABEL = -100


def main_stream(
    arguments: Mapping[str, Any],
    *,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    segments: torch.Tensor | None,
    examples: int,
) -> Stream | None:
    """The stream of the root call; None where nothing in the call tells its width.

    Args:
        arguments: the call's arguments by name.
        tokens, mask, segments: what the user gave, which counts more.
        examples: number of ids; more than there are rows means packed rows.
    """
    tokens = tokens if tokens is not None else _tokens(arguments)
    given = mask if mask is not None else _mask(arguments)
    sample = next((value for value in (tokens, arguments.get("inputs_embeds"), given) if isinstance(value, torch.Tensor)), None)
    if sample is None:
        return None
    rows, width = sample.shape[:2]
    positions = _grid(arguments.get("position_ids"), rows, width)
    keep = None if given is None else keep_mask(given, rows, width)
    if segments is None and examples != rows and positions is not None:
        segments = segments_of(positions)
    return Stream(rows, width, None if keep is None or bool(keep.all()) else keep, segments, tokens, positions)


def decoder_stream(arguments: Mapping[str, Any], labels: Any) -> Stream | None:
    """The stream of a decoder. Without a mask of its own, positions whose label is -100 count as pads."""
    tokens, mask = _tokens(arguments), arguments.get("attention_mask")
    sample = tokens if tokens is not None else arguments.get("inputs_embeds")
    if not isinstance(sample, torch.Tensor):
        return None
    rows, width = sample.shape[:2]
    if mask is None and isinstance(labels, torch.Tensor) and tuple(labels.shape) == (rows, width):
        mask = labels != IGNORED_LABEL
    return Stream(rows, width, None if mask is None else keep_mask(mask, rows, width), None, tokens)


def warn_of_positions(model: nn.Module, stream: Stream | None) -> None:
    """Warn where pads on the left shift absolute positions: transformers models count positions from the first pad."""
    if stream is None or stream.mask is None or stream.positions is not None or bool(stream.mask[:, 0].all()):
        return
    kind = getattr(getattr(model, "config", None), "model_type", "")
    absolute = any(name.rpartition(".")[2] in _POSITION_TABLES for name, _ in model.named_modules())
    if absolute and kind not in _DERIVES_POSITIONS:
        warnings.warn(
            "this batch is padded on the left and has no position_ids, but the model has absolute positions: real tokens get other "
            "positions than without padding, and other activations. Pad on the right or pass position_ids",
            stacklevel=2,
        )


def _tokens(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """`input_ids`, or the first argument if it is an integer tensor [B, T]."""
    found = arguments.get("input_ids", next(iter(arguments.values()), None))
    if isinstance(found, torch.Tensor) and found.ndim == 2 and not found.is_floating_point() and found.dtype != torch.bool:
        return found
    return None


def _mask(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """`attention_mask`, or the inverse of torch's `src_key_padding_mask`."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, torch.Tensor):
        if mask.ndim != 2:
            raise BatchError(
                f"the attention mask has the shape {list(mask.shape)}, which does not tell which positions are pads; give "
                "batch(mask=...) of shape [B, T], 1 where a position is a real token"
            )
        return mask
    padding = arguments.get("src_key_padding_mask")
    return ~(padding if padding.dtype == torch.bool else padding < 0) if isinstance(padding, torch.Tensor) else None


def _grid(positions: Any, rows: int, width: int) -> torch.Tensor | None:
    """Position ids [B, T] (also given as [1, T] or [T]); None for anything else."""
    if not isinstance(positions, torch.Tensor) or positions.ndim > 2 or positions.shape[-1] != width:
        return None
    return positions.expand(rows, width)
