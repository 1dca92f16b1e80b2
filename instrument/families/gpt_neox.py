"""GPT-NeoX and Pythia: attention and MLP beside one another, each behind a dropout of its own."""

from .family import Family

FAMILY = Family(
    model_types=("gpt_neox",),
    attn_out=("post_attention_dropout:out",),
    mlp_out=("post_mlp_dropout:out",),
    final_norm=("final_layer_norm",),
)
