"""Stacks and aliases of any Transformer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_models import (
    CASES,
    HEADS,
    HIDDEN,
    INNER,
    VOCABULARY,
    SdpaBlock,
    SdpaDecoder,
    SharedBlocks,
    albert,
    bert,
    gpt2,
    observed,
    random_tokens,
    seeded,
    swin,
    t5,
    torch_encoder,
)
from torch import Tensor, nn

from tensortape.instrument.anatomy import aliased_sites, is_attention, stacks
from tensortape.instrument.modules import clean_name, named


def blocks(model: nn.Module) -> dict[str, list[tuple[str, int]]]:
    """(path, call) of every block, by stack."""
    return {stack.name: [(block.path, block.call) for block in stack.blocks] for stack in stacks(model)}


def aliases(model: nn.Module) -> dict[str, str]:
    """Sites by alias, written `stack.alias[layer]`."""
    return {
        f"{alias.stack}{'.' if alias.stack else ''}{alias.name}{'' if alias.layer is None else f'[{alias.layer}]'}": str(site)
        for alias, site in aliased_sites(model)
    }


@pytest.mark.parametrize("name", CASES)
def test_stacks_of_every_architecture(name: str) -> None:
    """Blocks in the order of their calls, as stated by hand for each architecture."""
    case = CASES[name]
    assert blocks(case.build()) == {
        stack: [(path, paths[: layer + 1].count(path)) for layer, path in enumerate(paths)] for stack, paths in case.blocks.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_every_alias_is_a_module(name: str) -> None:
    """What an alias stands for exists, and no two sites share one alias and layer."""
    model = CASES[name].build()
    paths = {path for path, _ in model.named_modules()}
    found = aliased_sites(model)
    assert all(site.path in paths for _, site in found)
    assert len({(alias.stack, alias.name, alias.layer) for alias, _ in found}) == len(found)
    for stack, embed in CASES[name].embed.items():
        assert aliases(model)[f"{stack}{'.' if stack else ''}embed"] == f"{embed}:out"
    for stack, norm in CASES[name].final_norm.items():
        assert aliases(model)[f"{stack}{'.' if stack else ''}final_norm"] == f"{norm}:out"


def test_stages_flatten() -> None:
    """Swin's stages are one stack."""
    assert blocks(swin()) == {
        "": [("encoder.layers.0.blocks.0", 1), ("encoder.layers.1.blocks.0", 1), ("encoder.layers.1.blocks.1", 1)]
    }
    assert aliases(swin())["resid_pre[2]"] == "encoder.layers.1.blocks.1:in"


def called(model: nn.Module, inside: str) -> list[str]:
    """Paths of the modules of a list, in the order in which they are called."""
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda m, args, path=path: order.append(path))
        for path, module in model.named_modules()
        if path.rpartition(".")[0].endswith(inside)
    ]
    with torch.no_grad():
        model(random_tokens(2, 3))
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 4, "num_hidden_groups": 2},
        {"num_hidden_layers": 2, "inner_group_num": 2},
        {"num_hidden_layers": 6, "num_hidden_groups": 3, "inner_group_num": 2},
    ],
    ids=["one group", "groups", "inner layers", "both"],
)
def test_layers_of_albert(options: dict[str, int]) -> None:
    """Blocks come in the order in which ALBERT calls them, however layers share groups."""
    model = albert(**options)
    order = called(model, "albert_layers")
    assert blocks(model) == {"": [(path, order[: place + 1].count(path)) for place, path in enumerate(order)]}


def test_one_block_three_times() -> None:
    """ModuleList([block] * 3) is three layers of one module."""
    assert blocks(seeded(SharedBlocks)) == {"": [("blocks.0", 1), ("blocks.0", 2), ("blocks.0", 3)]}


def test_torch_encoder_inside_a_users_module() -> None:
    """nn.TransformerEncoder goes by its own table wherever it stands, and so does what embeds its input."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, HIDDEN)
            self.body = torch_encoder(batch_first=True, norm_first=True)
            self.head = nn.Linear(HIDDEN, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(self.words(tokens)).mean(1))

    found = aliases(Model())
    assert blocks(Model()) == {"": [(f"body.layers.{layer}", 1) for layer in range(3)]}
    assert found["attn_out[1]"] == "body.layers.1.dropout1:out"
    assert found["mlp_out[1]"] == "body.layers.1.dropout2:out"
    assert found["final_norm"] == "body.norm:out"
    assert found["embed"] == "words:out"


def test_encoder_and_decoder_of_torch() -> None:
    """nn.Transformer has two stacks."""
    model = nn.Transformer(HIDDEN, HEADS, 2, 3, INNER, batch_first=True)
    found = aliases(model)
    assert blocks(model) == {
        "encoder": [(f"encoder.layers.{layer}", 1) for layer in range(2)],
        "decoder": [(f"decoder.layers.{layer}", 1) for layer in range(3)],
    }
    assert found["decoder.mlp_out[2]"] == "decoder.layers.2.dropout3:out"
    assert found["encoder.mlp_out[1]"] == "encoder.layers.1.dropout2:out"
    assert found["decoder.final_norm"] == "decoder.norm:out"


def test_a_model_without_attention() -> None:
    """No stacks; an embedding is still one."""
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2)))
    assert stacks(model) == []
    assert aliases(model) == {"embed": "0:out"}
    assert aliases(nn.Linear(3, 3)) == {}


def test_blocks_in_a_sequential() -> None:
    """Elements without attention beside blocks are no layers."""
    model = nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN), SdpaBlock(), SdpaBlock(), nn.LayerNorm(HIDDEN))
    assert blocks(model) == {"": [("1", 1), ("2", 1)]}
    assert aliases(model)["embed"] == "0:out"


def test_a_family_without_a_table() -> None:
    """Blocks of unknown kind have a residual stream, and nothing else is claimed of them."""
    found = aliases(seeded(SdpaDecoder))
    assert {name.partition("[")[0] for name in found} == {"embed", "resid_pre", "resid_post"}
    assert found["embed"] == "table:out"


def test_two_models_in_one() -> None:
    """Every stack counts, each with the table of its own family and named by its path."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader, self.writer = bert(), gpt2()

    found = aliases(Both())
    assert found["reader.encoder.attn_out[0]"] == "reader.encoder.layer.0.attention.output.dropout:out"
    assert found["writer.transformer.attn_out[0]"] == "writer.transformer.h.0.attn:out"
    assert found["writer.transformer.final_norm"] == "writer.transformer.ln_f:out"
    assert found["writer.transformer.embed"] == "writer.transformer.wte:out"


def test_embeddings_of_two_models_in_one() -> None:
    """Each stack's embedding is its own model's."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.writer, self.reader = gpt2(), bert()

    assert aliases(Both())["reader.encoder.embed"] == "reader.embeddings.word_embeddings:out"


def test_cross_attention_alone_makes_a_decoder() -> None:
    """T5's decoder is a stack beside its encoder, with one layer more in each block."""
    found = aliases(t5())
    assert found["decoder.mlp_out[1]"] == "decoder.block.1.layer.2.dropout:out"
    assert found["encoder.mlp_out[1]"] == "encoder.block.1.layer.1.dropout:out"
    assert found["decoder.resid_mid[0]"] == "decoder.block.0.layer.2:in"


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("h.0.attn", nn.Identity(), True),
        ("layers.0.self_attn", nn.Identity(), True),
        ("layers.0.Attention", nn.Identity(), True),
        ("layers.0.attn1", nn.Identity(), True),
        ("layers.0.mixer", nn.MultiheadAttention(4, 2), True),
        ("layers.0.attn_norm", nn.Identity(), False),
        ("layers.0.post_attention_layernorm", nn.LayerNorm(4), False),
        ("attention.0.mlp", nn.Linear(4, 4), False),
        ("", nn.Identity(), False),
    ],
)
def test_what_attention_is(name: str, module: nn.Module, expected: bool) -> None:
    """By the name of the class, or by its last name in the model."""
    assert is_attention(name, module) is expected


def test_layers_are_what_is_called() -> None:
    """resid_post of a layer is resid_pre of the next, for shared blocks too."""
    model = albert(num_hidden_layers=4)
    [path] = {path for path, _ in blocks(model)[""]}
    seen = observed(model, {"input_ids": random_tokens(2, 3)}, {path})[path]
    assert len(seen) == 4
    assert all(torch.equal(before[1], after[0]) for before, after in pairwise(seen))


def test_names_without_wrappers() -> None:
    """Segments that wrappers add are left out; names that only end like them stay."""
    assert clean_name("_orig_mod.layers.0._checkpoint_wrapped_module.mlp") == "layers.0.mlp"
    assert clean_name("_fsdp_wrapped_module.layers.0") == "layers.0"
    assert clean_name("my_orig_mod.x") == "my_orig_mod.x"
    model = nn.ModuleDict({"my_orig_mod": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert [path for path, _ in named(model)] == ["", "my_orig_mod", "other"]
