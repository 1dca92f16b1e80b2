"""User code that type checkers must accept; checked by mypy, never run."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tensortape.analyses import ProbeReport, fit_probes
from tensortape.instrument import PCA, Recorder, Site, record
from tensortape.stores import Column, Run, RunWriter, open_run


def record_in_a_loop(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    with Recorder(model, sites=["resid_post", Site("**.mlp", reduce="mean")], to="run.zarr", mode="create") as recorder:
        for number, batch in enumerate(batches):
            with recorder.batch(ids=[number], labels={"example/topic": [1]}):
                model(**batch)
        recorder.commit()


def record_a_loader(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> Run:
    return record(model, batches, to="run.zarr", sites=lambda name, module: "in" if name.endswith("mlp") else None, ids="id")


def train(run: Run) -> None:
    batches = run.batches("resid_post[3]", 4096, seed=1)
    batches.load_state_dict(batches.state_dict())
    for tensor in batches.to_torch(num_workers=2, multiprocessing_context="spawn"):
        assert tensor.ndim == 2
    run.export("files", "sae-lens", sites=["resid_post[3]"], context_size=128)
    run["token/h"].to_xarray().mean("token").compute()
    run["token/h"].to_dask().mean(0).compute()


def write_and_read() -> tuple[Column, ProbeReport]:
    with RunWriter("run.zarr", durability="rename") as writer:
        writer.append(ids=["a"], columns={"token/h": [np.zeros((3, 4), np.float32)]})
    run = open_run("run.zarr", verify="touch")
    open_run("s3://bucket/run.zarr", cache_bytes=1 << 30, storage_options={"region": "us-east-1"})
    columns: list[Column] = run.select("resid_post[0:4]")
    tensor: torch.Tensor = columns[0].to_torch()
    assert run["token/h"].shape == (3, 4) or tensor.ndim
    return run["token/h"], fit_probes(run, labels="token/tag", sites=["resid_post"], seed=0)


def record_less(model: nn.Module, batches: list[dict[str, torch.Tensor]], small: Run) -> Run:
    fitted = PCA.from_run(small.select("resid_post"), 64)
    sites = [Site("resid_post", sample_tokens=0.1, sample_seed=3), Site("mlp_out", project=PCA(8)), Site("embed", project=fitted)]
    return record(model, batches, to="run.zarr", sites=sites, ids="id", check_disk=False)
