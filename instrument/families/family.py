"""The shape of a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Sites of one architecture family.

    Args:
        model_types: values of `config.model_type`, or class names of blocks where there is no config.
        attn_out, mlp_out: the tensors just before they are added to the residual, as sites relative to a block. Of several
            alternatives (a decoder's block has one layer more) the first whose module exists counts.
        resid_mid: the residual between attention and MLP, where it is a module's input or output.
        final_norm: names of the norm after the last block, relative to the module that holds the stack or to its parent.
        repeats: the config's name for how often each block runs, where blocks share their weights.
    """

    model_types: tuple[str, ...]
    attn_out: tuple[str, ...]
    mlp_out: tuple[str, ...]
    resid_mid: tuple[str, ...] = ()
    final_norm: tuple[str, ...] = ()
    repeats: str | None = None
