"""BERT and its kin: post-norm blocks; the norm takes the sum of the input and a dropout's output."""

from .family import Family

FAMILY = Family(
    model_types=("bert", "roberta", "electra"),
    attn_out=("attention.output.dropout:out",),
    mlp_out=("output.dropout:out",),
    resid_mid=("attention.output:out",),
)
