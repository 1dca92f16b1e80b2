"""OPT: dropout is a function call, so in training mode what is added differs from these by it."""

from .family import Family

FAMILY = Family(
    model_types=("opt",),
    attn_out=("self_attn:out",),
    mlp_out=("fc2:out",),
    final_norm=("final_layer_norm",),
)
