"""GPT-2: pre-norm blocks `h.*` whose dropout is inside attn and mlp."""

from .family import Family

FAMILY = Family(
    model_types=("gpt2",),
    attn_out=("attn:out",),
    mlp_out=("mlp:out",),
    resid_mid=("ln_2:in",),
    final_norm=("ln_f",),
)
