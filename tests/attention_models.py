"""Tiny models of many attention families, and what their weights should be: those of an eager copy, or a plain softmax.

Sizes differ on purpose: 5 examples of up to 7 tokens (decoder: 11), 4 heads of 13 features; grouped heads are 6 over 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from tiny_models import (
    BATCH,
    DECODER_LENGTHS,
    HIDDEN,
    INNER,
    LAYERS,
    PAD,
    VOCABULARY,
    Inputs,
    batch,
    batch_with_positions,
    images,
    padding_mask,
    pair_batch,
    seeded,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Matrix = np.ndarray
SIDES = ("left", "right")
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    **SPECIAL,
}
ABSOLUTE = {**COMMON, "max_position_embeddings": 19}
GROUPED = {
    **COMMON,
    "hidden_size": 60,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 29,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 19,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **SPECIAL,
}
VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Family:
    """An architecture.

    Args:
        kind: the model's class.
        config: its configuration's class, and the sizes.
        paths: the attention modules in the order of their calls; one that comes again is a further call.
        inputs: arguments of its forward, with pads on a side.
        masked: whether the batch has pads.
        warns: whether pads on the left move its positions and nothing can be done about it.
        sinks: whether a part of each row goes to no token.
    """

    kind: Any
    config: Any
    sizes: dict[str, Any]
    paths: tuple[str, ...]
    inputs: Callable[[str], Inputs] = batch
    masked: bool = True
    warns: bool = False
    sinks: bool = False

    def build(self, implementation: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """The model, always the same; with its default attention implementation unless told otherwise."""
        asked = {} if implementation is None else {"attn_implementation": implementation}
        return seeded(lambda: self.kind(self.config(**self.sizes, **asked))).to(dtype)

    def masks(self, number: int, side: str) -> tuple[Tensor | None, Tensor | None]:
        """Real positions of the queries and of the keys of a site."""
        if not self.masked:
            return None, None
        own = padding_mask(side, DECODER_LENGTHS) if self.is_of_decoder(number) else padding_mask(side)
        return own, padding_mask(side) if self.is_cross(number) else own

    def is_of_decoder(self, number: int) -> bool:
        """Whether a site's queries are tokens of the second stream."""
        return self.paths[0].startswith("encoder.") and self.paths[number].startswith("decoder.")

    def is_cross(self, number: int) -> bool:
        """Whether a site is cross-attention."""
        return self.paths[number].endswith(("EncDecAttention", "encoder_attn"))

    def sites(self) -> list[str]:
        """What `run.attention_sites` should be."""
        calls = [self.paths[: number + 1].count(path) for number, path in enumerate(self.paths)]
        return [path if call == 1 else f"{path}#{call}" for path, call in zip(self.paths, calls, strict=True)]


def layers(pattern: str, count: int = LAYERS) -> tuple[str, ...]:
    """A path for each layer."""
    return tuple(pattern.format(layer) for layer in range(count))


def pairs(encoder: str, own: str, cross: str) -> tuple[str, ...]:
    """Paths of an encoder, then for each decoder layer self- and cross-attention."""
    return (*layers(encoder), *(path.format(layer) for layer in range(2) for path in (own, cross)))


def audio(side: str) -> Inputs:
    """Spectrograms that are all of one length, and decoder tokens with pads."""
    sound = torch.randn(BATCH, 8, 2 * WHISPER_WIDTH, generator=torch.Generator().manual_seed(0))
    inner = batch(side, 1, DECODER_LENGTHS)
    return {
        "input_features": sound,
        "decoder_input_ids": inner["input_ids"],
        "decoder_attention_mask": inner["attention_mask"],
    }


class Whisper(Family):
    """Whisper: only its decoder has pads."""

    def masks(self, number: int, side: str) -> tuple[Tensor | None, Tensor | None]:
        """Real positions of the queries and of the keys of a site."""
        own = padding_mask(side, DECODER_LENGTHS) if self.is_of_decoder(number) else None
        return own, None if self.is_cross(number) else own


WHISPER_WIDTH = 17
_SELF_ATTN = layers("layers.{}.self_attn")
_BERT = layers("encoder.layer.{}.attention.self")
_ENCODER_DECODER = pairs("encoder.layers.{}.self_attn", "decoder.layers.{}.self_attn", "decoder.layers.{}.encoder_attn")
_SWA = ["sliding_attention", "full_attention", "sliding_attention"]
_MLA = {
    "q_lora_rank": 9,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": LAYERS,
    "head_dim": 4,
}
_WITHOUT_DROPOUT = {"attention_dropout": 0.0}

INTERFACE: dict[str, Family] = {
    "gpt2": Family(
        hf.GPT2Model,
        hf.GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 19, **SPECIAL},
        layers("h.{}.attn"),
        batch_with_positions,
    ),
    "gpt2_square": Family(  # T == d
        hf.GPT2Model,
        hf.GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 21, "n_layer": LAYERS, "n_head": 3, "n_positions": 19, **SPECIAL},
        layers("h.{}.attn"),
        batch_with_positions,
    ),
    "gpt2_scaled": Family(
        hf.GPT2Model,
        hf.GPT2Config,
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 19,
            "scale_attn_by_inverse_layer_idx": True,
            **SPECIAL,
        },
        layers("h.{}.attn"),
        batch_with_positions,
    ),
    "gpt_neox": Family(
        hf.GPTNeoXModel, hf.GPTNeoXConfig, {**ABSOLUTE, "hidden_size": 40, **_WITHOUT_DROPOUT}, layers("layers.{}.attention")
    ),
    "opt": Family(
        hf.OPTModel,
        hf.OPTConfig,
        {**ABSOLUTE, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN},
        layers("decoder.layers.{}.self_attn"),
    ),
    "llama": Family(hf.LlamaModel, hf.LlamaConfig, GROUPED, _SELF_ATTN),
    "qwen3": Family(hf.Qwen3Model, hf.Qwen3Config, {**GROUPED, "head_dim": 14}, _SELF_ATTN),
    "phi3": Family(
        hf.Phi3Model,
        hf.Phi3Config,
        {**GROUPED, "original_max_position_embeddings": 29},
        _SELF_ATTN,
    ),
    "gemma": Family(hf.GemmaModel, hf.GemmaConfig, GROUPED, _SELF_ATTN),
    "mistral": Family(hf.MistralModel, hf.MistralConfig, {**GROUPED, "sliding_window": 4}, _SELF_ATTN),
    "gemma3": Family(
        hf.Gemma3TextModel,
        hf.Gemma3TextConfig,
        {**GROUPED, "sliding_window": 3, "layer_types": _SWA, "query_pre_attn_scalar": 17},
        _SELF_ATTN,
    ),
    "gemma2": Family(
        hf.Gemma2Model,
        hf.Gemma2Config,
        {**GROUPED, "sliding_window": 3, "layer_types": _SWA, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 17},
        _SELF_ATTN,
    ),
    "gpt_oss": Family(
        hf.GptOssModel,
        hf.GptOssConfig,
        {
            **GROUPED,
            "sliding_window": 3,
            "layer_types": _SWA,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "experts_implementation": "eager",
        },
        _SELF_ATTN,
        sinks=True,
    ),
    "deepseek": Family(hf.DeepseekV3Model, hf.DeepseekV3Config, {**COMMON, **_MLA}, _SELF_ATTN),
    "bert": Family(hf.BertModel, hf.BertConfig, ABSOLUTE, _BERT, batch_with_positions),
    "roberta": Family(hf.RobertaModel, hf.RobertaConfig, ABSOLUTE, _BERT),
    "distilbert": Family(
        hf.DistilBertModel,
        hf.DistilBertConfig,
        {
            "vocab_size": VOCABULARY,
            "dim": HIDDEN,
            "hidden_dim": INNER,
            "n_layers": LAYERS,
            "n_heads": 4,
            "max_position_embeddings": 19,
            **SPECIAL,
        },
        layers("transformer.layer.{}.attention"),
        batch_with_positions,
    ),
    "albert": Family(
        hf.AlbertModel,
        hf.AlbertConfig,
        {**ABSOLUTE, "embedding_size": 23},
        ("encoder.albert_layer_groups.0.albert_layers.0.attention",) * LAYERS,
        batch_with_positions,
    ),
    "modernbert": Family(
        hf.ModernBertModel,
        hf.ModernBertConfig,
        {
            **ABSOLUTE,
            "hidden_size": 40,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 0,
            "sep_token_id": 2,
        },
        layers("layers.{}.attn"),
    ),
    "t5": Family(
        hf.T5Model,
        hf.T5Config,
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 14,
            "d_ff": INNER,
            "num_layers": LAYERS,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": PAD,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 6,
            **SPECIAL,
        },
        pairs(
            "encoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.1.EncDecAttention",
        ),
        pair_batch,
    ),
    "bart": Family(hf.BartModel, hf.BartConfig, BART, _ENCODER_DECODER, pair_batch, warns=True),
    "marian": Family(hf.MarianModel, hf.MarianConfig, BART, _ENCODER_DECODER, pair_batch, warns=True),
    "whisper": Whisper(
        hf.WhisperModel,
        hf.WhisperConfig,
        {
            **BART,
            "num_mel_bins": 8,
            "max_source_positions": WHISPER_WIDTH,
            "max_target_positions": 19,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        _ENCODER_DECODER,
        audio,
    ),
    "vit": Family(
        hf.ViTModel,
        hf.ViTConfig,
        {**VISION, "image_size": (12, 20)},
        layers("layers.{}.attention"),
        lambda side: images(12, 20),
        masked=False,
    ),
    "clip_vision": Family(
        hf.CLIPVisionModel,
        hf.CLIPVisionConfig,
        {**VISION, "image_size": 12},
        layers("encoder.layers.{}.self_attn"),
        lambda side: images(12, 12),
        masked=False,
    ),
    "dinov2": Family(
        hf.Dinov2Model,
        hf.Dinov2Config,
        {**VISION, "image_size": 12},
        layers("encoder.layer.{}.attention"),
        lambda side: images(12, 20),
        masked=False,
    ),
    "segformer": Family(
        hf.SegformerModel,
        hf.SegformerConfig,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 2],
            "sr_ratios": [2, 1],
            "hidden_sizes": [10, 21],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 3],
            "mlp_ratios": [2, 2],
        },
        ("stages.0.blocks.0.attention", "stages.1.blocks.0.attention", "stages.1.blocks.1.attention"),
        lambda side: images(16, 24),
        masked=False,
    ),
}

_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 22, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
_SWIN_BLOCKS = tuple(f"encoder.layers.{stage}.blocks.{block}.attention" for stage in (0, 1) for block in (0, 1))
SWIN = Family(hf.SwinModel, hf.SwinConfig, _SWIN, _SWIN_BLOCKS, lambda side: images(16, 16), masked=False)
SWIN_V2 = Family(
    hf.Swinv2Model,
    hf.Swinv2Config,
    _SWIN,
    tuple(f"{path}.self" for path in _SWIN_BLOCKS),
    lambda side: images(16, 16),
    masked=False,
)

SOFTMAX: dict[str, Family] = {
    "bloom": Family(
        hf.BloomModel,
        hf.BloomConfig,
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4, **SPECIAL},
        layers("h.{}.self_attention"),
    ),
    "mpt": Family(
        hf.MptModel,
        hf.MptConfig,
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 19, **SPECIAL},
        layers("blocks.{}.attn"),
    ),
    "gptj": Family(
        hf.GPTJModel,
        hf.GPTJConfig,
        {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 19, "rotary_dim": 4, **SPECIAL},
        layers("h.{}.attn"),
        batch_with_positions,
    ),
    "gpt_neo": Family(
        hf.GPTNeoModel,
        hf.GPTNeoConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 3,
            "max_position_embeddings": 19,
            **SPECIAL,
        },
        layers("h.{}.attn.attention", 4),
        batch_with_positions,
    ),
    "deberta_v2": Family(
        hf.DebertaV2Model,
        hf.DebertaV2Config,
        {**ABSOLUTE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
        layers("encoder.layer.{}.attention.self"),
        batch_with_positions,
    ),
    "xlnet": Family(
        hf.XLNetModel,
        hf.XLNetConfig,
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layer": LAYERS, "n_head": 4, "d_inner": INNER, **SPECIAL},
        layers("layer.{}.rel_attn"),
    ),
    "mpnet": Family(hf.MPNetModel, hf.MPNetConfig, ABSOLUTE, layers("encoder.layer.{}.attention.attn")),
}

FALCON: dict[str, Family] = {
    "falcon": Family(
        hf.FalconModel,
        hf.FalconConfig,
        {
            **ABSOLUTE,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "new_decoder_architecture": False,
            "multi_query": True,
            "ffn_hidden_size": INNER,
        },
        layers("h.{}.self_attention"),
    ),
    "falcon_grouped": Family(
        hf.FalconModel,
        hf.FalconConfig,
        {
            **ABSOLUTE,
            "hidden_size": 60,
            "num_attention_heads": 6,
            "num_kv_heads": 3,
            "new_decoder_architecture": True,
            "ffn_hidden_size": INNER,
        },
        layers("h.{}.self_attention"),
    ),
}


def attentions(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Weights [B, H, Tq, Tk] of every attention call of an eager model, in the order of the calls."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = model(**inputs, output_attentions=True)
    if "encoder_attentions" not in outputs:
        return list(outputs["attentions"])
    decoder = zip(outputs["decoder_attentions"], outputs["cross_attentions"], strict=True)
    return [*outputs["encoder_attentions"], *(weights for pair in decoder for weights in pair)]


def kept(weights: Tensor, queries: Tensor | None, keys: Tensor | None) -> list[Matrix]:
    """Weights [H, q, k] of each example over its real tokens alone."""
    found = []
    for row, one in enumerate(weights.float()):
        at = range(one.shape[1]) if queries is None else queries[row].nonzero().squeeze(1)
        to = range(one.shape[2]) if keys is None else keys[row].nonzero().squeeze(1)
        found.append(one[:, list(at)][:, :, list(to)].numpy())
    return found


# --- written by hand -----------------------------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]  # q, k, v [B, H, T, d] and the mask to z


class HandAttention(nn.Module):
    """Projections, and whatever way to attend it is given."""

    def __init__(self, attend: Attend, heads: int = 4, groups: int = 4, width: int = HIDDEN) -> None:
        super().__init__()
        self.attend, self.heads, self.size = attend, heads, width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, groups * self.size)
        self.v = nn.Linear(width, groups * self.size)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each [B, heads, T, d]."""
        q, k, v = (linear(x).unflatten(2, (-1, self.size)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, d] to [B, T, d]."""
        return self.proj(self.attend(*self.project(x), mask).transpose(1, 2).flatten(2))


class HandBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        width = options.get("width", HIDDEN)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = HandAttention(**options)
        self.mlp = nn.Sequential(nn.Linear(width, INNER), nn.GELU(), nn.Linear(INNER, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, d] to [B, T, d]."""
        x = x + self.attn(self.norm_1(x), mask)
        return x + self.mlp(self.norm_2(x))


class Hand(nn.Module):
    """A nanoGPT-like model: `mask_of` makes what its attention is given out of the padding mask [B, T]."""

    def __init__(self, mask_of: Callable[[Tensor], Tensor | None], count: int = LAYERS, **options: Any) -> None:
        super().__init__()
        width = options.get("width", HIDDEN)
        self.mask_of = mask_of
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(19, width)
        self.h = nn.ModuleList(HandBlock(**options) for _ in range(count))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """[B, T] to [B, T, d]."""
        at = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        x = self.wte(input_ids) + self.wpe(at)
        mask = self.mask_of(attention_mask)
        for block in self.h:
            x = block(x, mask)
        return x


@dataclass(frozen=True)
class ByHand:
    """A way to attend, and what it means.

    Args:
        attend: q, k, v and the mask to z.
        mask_of: the mask that `attend` is given, out of the padding mask.
        scores: what is added to the scores, out of the padding mask: [B or 1, H or 1, T, T], -inf where a query sees nothing.
        stored: what should be stored of it; None where either will do.
        scale: what the scores are multiplied with, if not d ** -0.5.
        groups: key heads.
        sides: where pads may be.
    """

    attend: Attend
    mask_of: Callable[[Tensor], Tensor | None]
    scores: Callable[[Tensor], Tensor]
    stored: str | None = "qk"
    scale: float | None = None
    groups: int = 4
    sides: tuple[str, ...] = SIDES

    def build(self, count: int = LAYERS) -> Hand:
        """The model, always the same."""
        return seeded(lambda: Hand(self.mask_of, count, attend=self.attend, groups=self.groups))

    def weights(self, attention: HandAttention, x: Tensor, mask: Tensor) -> Tensor:
        """A plain softmax of the module's own projections, [B, H, T, T]."""
        with torch.no_grad():
            q, k, _ = attention.project(x)
            scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            return torch.softmax(q @ k.transpose(2, 3) * scale + self.scores(mask), -1)


def causal(mask: Tensor) -> Tensor:
    """[B, 1, T, T] bool: real tokens that are not later."""
    width = mask.shape[1]
    return torch.ones(width, width).tril().bool() & mask[:, None, None].bool()


def dilated(mask: Tensor) -> Tensor:
    """[B, 1, T, T] bool: every other token before, and itself, so that the keys of a query are not neighbours."""
    at = torch.arange(mask.shape[1])
    return causal(mask) & ((at[:, None] - at) % 2 == 0)


def by_head(mask: Tensor) -> Tensor:
    """[B, 4, T, T] bool: a window of its own for each head."""
    at, windows = torch.arange(mask.shape[1]), torch.arange(1, 5)[:, None, None]
    return causal(mask) & (at[:, None] - at < windows)


def alibi(width: int) -> Tensor:
    """[4, T, T]: a slope of its own for each head."""
    at = torch.arange(width)
    return -torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None] * (at[:, None] - at).abs()


def noise(width: int) -> Tensor:
    """[4, T, T] that depend on more than the distance."""
    return torch.randn(4, width, width, generator=torch.Generator().manual_seed(7))


def added(keep: Tensor, bias: Tensor | float = 0.0, masked: float = -torch.inf) -> Tensor:
    """A mask as scores."""
    return torch.where(keep, torch.as_tensor(bias, dtype=torch.float32), masked)


def _with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


BY_HAND: dict[str, ByHand] = {
    "is_causal": ByHand(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda mask: None,
        lambda mask: added(causal(torch.ones_like(mask))),
        sides=("right",),
    ),
    "bool": ByHand(_with_mask, causal, lambda mask: added(causal(mask))),
    "positional": ByHand(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, 0.0), causal, lambda mask: added(causal(mask))
    ),
    "bidirectional": ByHand(_with_mask, lambda mask: mask[:, None, None].bool(), lambda mask: added(mask[:, None, None].bool())),
    "float": ByHand(_with_mask, lambda mask: added(causal(mask)), lambda mask: added(causal(mask))),
    "float_minimum": ByHand(
        _with_mask,
        lambda mask: added(causal(mask), masked=torch.finfo(torch.float32).min),
        lambda mask: added(causal(mask), masked=torch.finfo(torch.float32).min),
    ),
    "alibi": ByHand(
        _with_mask,
        lambda mask: added(causal(mask), alibi(mask.shape[1])),
        lambda mask: added(causal(mask), alibi(mask.shape[1])),
        stored=None,
    ),
    "noise": ByHand(
        _with_mask,
        lambda mask: added(causal(mask), noise(mask.shape[1])),
        lambda mask: added(causal(mask), noise(mask.shape[1])),
        stored="weights",
    ),
    "dilated": ByHand(_with_mask, dilated, lambda mask: added(dilated(mask)), stored="weights"),
    "by_head": ByHand(_with_mask, by_head, lambda mask: added(by_head(mask)), stored="weights"),
    "scale": ByHand(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7),
        causal,
        lambda mask: added(causal(mask)),
        scale=0.7,
    ),
    "grouped": ByHand(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
        causal,
        lambda mask: added(causal(mask)),
        groups=2,
    ),
    "imported": ByHand(
        lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, attn_mask=mask), causal, lambda mask: added(causal(mask))
    ),
    "softmax": ByHand(_softmax, lambda mask: added(causal(mask)), lambda mask: added(causal(mask)), stored="weights"),
}
