"""All tables, and which one a model goes by."""

from __future__ import annotations

from . import albert, bart, bert, gemma2, gpt2, gpt_neox, llama, opt, t5, torch_encoder, vit
from .family import Family

FAMILIES: tuple[Family, ...] = tuple(
    table.FAMILY for table in (gpt2, llama, gemma2, gpt_neox, opt, bert, albert, t5, bart, vit, torch_encoder)
)


def family_of(model_type: str) -> Family | None:
    """The family of a config's model type or of a block's class; None without a table."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
