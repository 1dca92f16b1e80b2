"""Wrappers are looked through: names and values are the user's own model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import (
    BATCH,
    VOCABULARY,
    SdpaDecoder,
    batch,
    gpt2,
    hook_count,
    llama,
    observed,
    packed,
    sdpa_decoder,
    torch_encoder,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from tensortape.instrument import Recorder, record
from tensortape.instrument.anatomy import aliased_sites
from tensortape.instrument.errors import UnsupportedModelError
from tensortape.instrument.modules import named, unwrapped
from tensortape.stores import Run

MASK = batch()["attention_mask"]
Make = Callable[..., Recorder]
Opened = Callable[[Recorder], Run]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process that is a group by itself."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rows_of(model: nn.Module, path: str, inputs: dict[str, Tensor]) -> Tensor:
    """What torch's own hooks see."""
    return packed(observed(model, inputs, {path})[path][0][1], MASK)


@pytest.mark.usefixtures("process_group")
def test_ddp(make: Make, opened: Opened) -> None:
    """Names have no `module.`; gradients are those of training without recording."""
    plain, watched = gpt2(), gpt2()
    wrapped = nn.parallel.DistributedDataParallel(watched)
    recorder = make(wrapped, ["resid_post", "transformer.h.0.mlp"])
    for number in range(2):
        inputs = {**batch(seed=number), "labels": batch(seed=number)["input_ids"]}
        with recorder.batch(ids=[f"{number}.{row}" for row in range(BATCH)]):
            wrapped(**inputs).loss.backward()
        plain(**inputs).loss.backward()
    run = opened(recorder)
    assert [column.name for column in run.select("resid_post")] == [f"token/transformer.h.{layer}:out" for layer in range(3)]
    for path in ("transformer.h.1", "transformer.h.0.mlp"):
        wanted = torch.cat([rows_of(gpt2(), path, batch(seed=number)) for number in range(2)])
        assert torch.equal(run[f"{path}:out"].to_torch(), wanted)
    for name, parameter in watched.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)
    assert run.model["class"] == "GPT2LMHeadModel"


@pytest.mark.usefixtures("process_group")
def test_record_with_ddp(tmp_path: Path) -> None:
    """record() calls the wrapper and leaves its modes as they were."""
    wrapped = nn.parallel.DistributedDataParallel(llama())
    wrapped.train()
    wrapped.module.layers[1].eval()
    before = [module.training for module in wrapped.modules()]
    data = [{**batch(), "id": list(range(BATCH))}]
    run = record(wrapped, data, to=tmp_path / "run.zarr", sites="resid_post", ids="id", durability="rename")
    assert torch.equal(run["layers.1:out"].to_torch(), rows_of(llama(), "layers.1", batch()))
    assert [module.training for module in wrapped.modules()] == before


@pytest.mark.usefixtures("process_group")
def test_a_run_recorded_with_ddp_is_resumed_without(make: Make, tmp_path: Path) -> None:
    """The wrapper is no part of what a run says of its model."""
    to = tmp_path / "run.zarr"
    wrapped = nn.parallel.DistributedDataParallel(llama())
    first = make(wrapped, "resid_post", to=to)
    with torch.no_grad(), first.batch(ids=list("abcde")):
        wrapped(**batch())
    first.close()
    with make(llama(), "resid_post", to=to, mode="resume").batch(ids=list("abcde")) as told:
        assert not told.recorded


def sharded(model: Any, blocks: Any) -> Any:
    """A model under FSDP, block by block."""
    mesh = init_device_mesh("cpu", (1,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.usefixtures("process_group")
def test_fsdp(make: Make, opened: Opened) -> None:
    """fully_shard keeps names and turns parameters into DTensors: rows are plain, and so is what the run says of the model."""
    plain, model = sdpa_decoder(), sdpa_decoder()
    sharded(model, model.blocks)
    recorder = make(model, ["resid_post", "blocks.*.mlp.0"])
    with recorder.batch(ids=range(BATCH), mask=MASK):
        model(batch()["input_ids"]).sum().backward()
    run = opened(recorder)
    for path in ("blocks.1", "blocks.2.mlp.0"):
        assert torch.equal(run[f"{path}:out"].to_torch(), rows_of(plain, path, {"tokens": batch()["input_ids"]}))
    assert run.model["class"] == "SdpaDecoder"
    assert run.model["parameters"] == sum(parameter.numel() for parameter in plain.parameters())


@pytest.mark.usefixtures("process_group")
def test_families_under_fsdp() -> None:
    """The class of a sharded block is another one, but it goes by the same table."""
    plain, model = (torch_encoder(batch_first=True, norm_first=True) for _ in range(2))
    sharded(model, model.layers)
    assert aliased_sites(model) == aliased_sites(plain)
    assert {alias.name for alias, _ in aliased_sites(model)} >= {"attn_out", "mlp_out"}


def test_data_parallel_is_refused(make: Make) -> None:
    """The error names torchrun; also where only a part of the model is wrapped."""
    part = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.DataParallel(nn.Linear(4, 4)))
    for model in (nn.DataParallel(llama()), part):
        with pytest.raises(UnsupportedModelError, match="torchrun"):
            make(model, "**")


@pytest.mark.parametrize("wrapped", ["blocks", "root"])
def test_checkpoint_wrappers(wrapped: str, make: Make, opened: Opened) -> None:
    """Activation checkpointing by wrapper modules: clean names, one capture, the same gradients."""
    plain, model = sdpa_decoder(), sdpa_decoder()
    tokens = batch()["input_ids"]
    if wrapped == "blocks":
        apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "SdpaBlock")
        called: Any = model
    else:
        called = checkpoint_wrapper(model)
    recorder = make(called, ["resid_pre", "resid_post", "blocks.*.mlp.0"])
    with recorder.batch(ids=range(BATCH), mask=MASK):
        called(tokens).sum().backward()
    plain(tokens).sum().backward()
    run = opened(recorder)
    assert [column.name for column in run.select("resid_post")] == [f"token/blocks.{layer}:out" for layer in range(3)]
    assert {column.site["call"] for column in run.sites} == {1}
    for path in ("blocks.1", "blocks.2.mlp.0"):
        assert torch.equal(run[f"{path}:out"].to_torch(), rows_of(plain, path, {"tokens": tokens}))
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


class Checkpointing(SdpaDecoder):
    """Checkpoints its blocks by hand."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, d]."""
        x = self.table(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.norm(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_by_hand(reentrant: bool, make: Make, opened: Opened) -> None:
    """torch.utils.checkpoint in the user's forward: what the backward computes again is not taken."""
    plain, model = sdpa_decoder(), Checkpointing(reentrant=reentrant)
    model.load_state_dict(plain.state_dict())
    recorder, tokens = make(model, ["resid_post", "blocks.*.attention.qkv"]), batch()["input_ids"]
    for number in range(2):
        with recorder.batch(ids=range(number * BATCH, (number + 1) * BATCH), mask=MASK):
            model(tokens).sum().backward()
        plain(tokens).sum().backward()
    run = opened(recorder)
    assert len(run.sites) == 6
    for path in ("blocks.0", "blocks.2.attention.qkv"):
        assert torch.equal(run[f"{path}:out"].to_torch(), torch.cat([rows_of(plain, path, {"tokens": tokens})] * 2))
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_unwrapping() -> None:
    """Wrappers within wrappers; a model's own attribute `module` is no wrapper."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    model, own = sdpa_decoder(), Own()
    assert unwrapped(torch.compile(checkpoint_wrapper(model), backend="eager")) is model
    assert unwrapped(own) is own
    assert [path for path, _ in named(own)] == ["", "module"]
    wrapped = nn.ModuleList([checkpoint_wrapper(nn.Sequential(nn.Linear(2, 2)))])
    assert [path for path, _ in named(wrapped)] == ["", "0", "0.0"]
    assert isinstance(dict(named(wrapped))["0"], nn.Sequential)
    assert hook_count(wrapped) == 0
