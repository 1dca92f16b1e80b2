"""ALBERT: one block, called once per layer."""

from .family import Family

FAMILY = Family(
    model_types=("albert",),
    attn_out=("attention.output_dropout:out",),
    mlp_out=("ffn_output:out",),
    resid_mid=("attention:out",),
    repeats="num_hidden_layers",
)
