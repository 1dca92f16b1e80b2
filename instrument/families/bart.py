"""BART and Marian: post-norm; dropout is a function call, so in training mode what is added differs from these by it."""

from .family import Family

FAMILY = Family(
    model_types=("bart", "marian"),
    attn_out=("self_attn:out",),
    mlp_out=("fc2:out",),
    resid_mid=("fc1:in",),
)
