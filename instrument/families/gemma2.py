"""Gemma 2 and 3: a norm on both sides of attention and MLP, so what is added is the second norm's output."""

from .family import Family

FAMILY = Family(
    model_types=("gemma2", "gemma3_text"),
    attn_out=("post_attention_layernorm:out",),
    mlp_out=("post_feedforward_layernorm:out",),
    resid_mid=("pre_feedforward_layernorm:in",),
    final_norm=("norm",),
)
