"""torch.nn.TransformerEncoder and Decoder layers, norm first or last."""

from .family import Family

FAMILY = Family(
    model_types=("TransformerEncoderLayer", "TransformerDecoderLayer"),
    attn_out=("dropout1:out",),
    mlp_out=("dropout3:out", "dropout2:out"),
    final_norm=("norm",),
)
