"""Llama and its kin: pre-norm blocks, nothing between attention or MLP and the residual."""

from .family import Family

FAMILY = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    attn_out=("self_attn:out",),
    mlp_out=("mlp:out",),
    resid_mid=("post_attention_layernorm:in",),
    final_norm=("norm",),
)
