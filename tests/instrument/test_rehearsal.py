"""Rehearsals on the meta device: the columns of a real recording, whatever the family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import CASES, hook_count, random_tokens
from torch import nn

from tensortape.instrument import PCA, Recorder, Site
from tensortape.instrument.errors import UnsupportedModelError
from tensortape.instrument.rehearsal import rehearse
from tensortape.stores import Run, names

FAMILIES = ["gpt2", "llama", "qwen3", "gemma2", "gpt_neox", "opt_post_norm", "electra", "albert", "t5", "bart"]
ROWS, WIDTH = 3, 7
SITES: list[Any] = [
    "embed",
    "resid_post",
    Site("mlp_out", reduce="mean", dtype="float16"),
    Site("resid_pre", positions=[0, -1]),
    Site("attn_out", sample_tokens=0.5),
]


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Tokens without pads; of an encoder-decoder also those of a decoder of another length."""
    given = {"input_ids": random_tokens(ROWS, WIDTH)}
    return {**given, "decoder_input_ids": random_tokens(ROWS, WIDTH + 4)} if name in ("t5", "bart") else given


def without_weights(model: nn.Module) -> nn.Module:
    """The same model on the meta device."""
    return copy.deepcopy(model).to("meta")


@pytest.mark.parametrize("name", FAMILIES)
def test_columns_are_those_of_a_recording(
    make: Callable[..., Recorder], opened: Callable[[Recorder], Run], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Names, tables, dtypes and feature shapes; of values, gradients and attention with all it is rebuilt from."""
    model = CASES[name].build().to(torch.bfloat16)
    # T5 adds to its scores what it has learnt of distances, which without weights is not seen.
    sites = [*SITES, "resid_post:out.grad", *(["attention.grad"] if name != "t5" else [])]
    meta = {key: value.to("meta") for key, value in inputs(name).items()}
    found = rehearse(without_weights(model), sites, meta, ids=[*"abc"], labels={"token/n": [[1] * WIDTH] * ROWS})
    recorder = make(model, sites)
    with recorder.batch(ids=[*"abc"], labels={"token/n": [[1] * WIDTH] * ROWS}), recorder.target("loss", reduction="sum"):
        model(**inputs(name))[0].float().square().sum().backward()
    run = opened(recorder)
    own = {f"{table.name}/{short}" for table in run.tables.values() for short in table}
    recorded = {name: run[name] for name in own if not names.is_bookkeeping(name)}
    assert found.columns.keys() == recorded.keys()
    for column in recorded.values():
        values = found.columns[column.name]
        if not isinstance(values, list):
            assert (values.shape, values.dtype) == (column.shape, run.parts[0].columns[column.name].dtype), column.name
    assert hook_count(model) == 0


def test_projections_need_no_components() -> None:
    found = rehearse(
        without_weights(CASES["llama"].build()),
        Site("resid_post[1]", project=PCA(4)),
        {"input_ids": torch.zeros(ROWS, WIDTH, dtype=torch.long, device="meta")},
        ids=[*"abc"],
        labels={},
    )
    assert found.columns["token/layers.1:out|pca4"].shape == (ROWS * WIDTH, 4)
    assert found.columns["token/layers.1:out|pca4|residual"].shape == (ROWS * WIDTH,)


class Undecided(nn.Module):
    """A model whose path depends on what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T, 5]."""
        found: torch.Tensor = self.layer(input_ids[..., None].expand(-1, -1, 5).float())
        return found if found.sum() > 0 else -found


def test_a_forward_that_needs_values() -> None:
    with torch.device("meta"):
        model = Undecided()
    with pytest.raises(UnsupportedModelError, match="needs values"):
        rehearse(model, "layer", {"input_ids": torch.zeros(3, 7, dtype=torch.long, device="meta")}, ids=[*"abc"], labels={})
    assert hook_count(model) == 0
