"""ViT: pre-norm; one dropout module serves attention (its first call) and MLP (its second)."""

from .family import Family

FAMILY = Family(
    model_types=("vit",),
    attn_out=("dropout:out",),
    mlp_out=("dropout#2:out",),
    resid_mid=("layernorm_after:in",),
    final_norm=("layernorm",),
)
