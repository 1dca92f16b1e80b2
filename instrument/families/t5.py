"""T5: a block is a list of layers, self-attention first and the MLP last; decoders have cross-attention between them."""

from .family import Family

FAMILY = Family(
    model_types=("t5", "mt5"),
    attn_out=("layer.0.dropout:out",),
    mlp_out=("layer.2.dropout:out", "layer.1.dropout:out"),
    resid_mid=("layer.2:in", "layer.1:in"),
    final_norm=("final_layer_norm",),
)
