"""Reading a call of the root module: which streams of tokens it has."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .errors import BatchError
from .streams import Stream, keep_mask, segments_of

_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions", "position_embedding")
_DERIVES_POSITIONS = ("opt", "roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "data2vec-text", "esm")
_NOT_TOKENS = ("mask", "position_ids", "type_ids", "labels")
IGNORED_LABEL = -100


def main_stream(
    arguments: Mapping[str, Any],
    *,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    segments: torch.Tensor | None,
    examples: int,
    continues: bool = False,
) -> Stream | None:
    """The stream of the root call; None where nothing in the call tells its width.

    Args:
        arguments: the call's arguments by name.
        tokens, mask, segments: what the user gave, which counts more.
        examples: number of ids; more than there are rows means packed rows.
        continues: the forward continues a cache, so that its mask covers earlier positions, too.
    """
    seen = _tokens(arguments)
    if tokens is not None and seen is not None and tokens.shape != seen.shape:
        raise BatchError(f"the tokens given have the shape {list(tokens.shape)}, but the model is called with {list(seen.shape)}")
    tokens = tokens if tokens is not None else seen
    given = mask if mask is not None else _mask(arguments)
    if mask is not None and seen is not None and mask.shape != seen.shape:
        raise BatchError(f"the mask given has the shape {list(mask.shape)}, but the model is called with {list(seen.shape)}")
    sample = next((value for value in (tokens, arguments.get("inputs_embeds"), given) if isinstance(value, torch.Tensor)), None)
    if sample is None:
        return None
    rows, width = sample.shape[:2]
    positions = _grid(arguments.get("position_ids"), rows, width)
    given = given[:, -width:] if given is not None and continues else given
    keep = None if given is None else keep_mask(given, rows, width)
    if segments is not None and tuple(segments.shape) != (rows, width):
        raise BatchError(
            f"the segments given have the shape {list(segments.shape)}, but the batch has {rows} rows of {width} positions"
        )
    if segments is None and examples != rows and positions is not None:
        segments = segments_of(positions)
    # The model may change its inputs in place, so what goes to the disk is copied now.
    copied = None if tokens is None else tokens.detach().clone()
    return Stream(rows, width, None if keep is None or bool(keep.all()) else keep, segments, copied, positions)


def decoder_stream(arguments: Mapping[str, Any], labels: Any) -> Stream | None:
    """The stream of a decoder. Without a mask of its own, positions whose label is -100 count as pads."""
    tokens, mask = _tokens(arguments), arguments.get("attention_mask")
    sample = tokens if tokens is not None else arguments.get("inputs_embeds")
    if not isinstance(sample, torch.Tensor):
        return None
    rows, width = sample.shape[:2]
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        mask = mask[:, -width:]  # of all positions so far, where a cache is continued
    if mask is None and isinstance(labels, torch.Tensor) and tuple(labels.shape) == (rows, width):
        mask = labels != IGNORED_LABEL
    copied = None if tokens is None else tokens.detach().clone()
    return Stream(rows, width, None if mask is None else keep_mask(mask, rows, width), None, copied)


def continued(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward continues a cache of keys and values."""
    cache = arguments.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    return bool(int(length())) if length is not None else bool(cache)


def with_padding_mask(arguments: Mapping[str, Any], past: int) -> Mapping[str, Any]:
    """Arguments whose mask tells which positions are pads, where `generate` has prepared one [B, 1, T, keys] for a static cache.

    A real token sees itself and a pad sees nothing; what is generated later are tokens.
    """
    mask, tokens = arguments.get("attention_mask"), _tokens(arguments)
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)  # one for each kind of layer
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or tokens is None:
        return arguments
    if past:
        return {**arguments, "attention_mask": torch.ones_like(tokens)}
    itself = mask[:, 0].diagonal(dim1=1, dim2=2)
    return {**arguments, "attention_mask": itself if itself.dtype == torch.bool else itself == 0}


def unfinished(model: nn.Module, earlier: Sequence[Stream], stream: Stream, ends: int | Sequence[int] | None = None) -> Stream:
    """A decoding step without the rows that had ended before it: what `generate` feeds them is no token of theirs.

    Args:
        ends: tokens that end an example, if not those that the model's generation_config says.
    """
    known: Any = ends if ends is not None else getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    generated = [step.tokens for step in earlier[1:] if step.tokens is not None]
    if known is None or not generated or stream.width != 1:
        return stream
    last = torch.as_tensor(known, device=generated[0].device).reshape(-1)
    ended = torch.isin(torch.cat(generated, 1), last).any(1, keepdim=True)
    mask = ~ended if stream.mask is None else stream.mask & ~ended.to(stream.mask.device)
    return replace(stream, mask=None if bool(mask.all()) else mask)


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
    """`input_ids`, or the first argument if it is an integer tensor [B, T] (and not by its name something else)."""
    named = {name: value for name, value in arguments.items() if not name.endswith(_NOT_TOKENS)}
    first = next((value for name, value in named.items() if not name.startswith("decoder_")), None)
    found = arguments.get("input_ids", None if "inputs_embeds" in arguments else first)
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
    if not isinstance(positions, torch.Tensor) or positions.ndim not in (1, 2) or positions.shape[-1] != width:
        return None
    return positions.detach().clone().expand(rows, width)
