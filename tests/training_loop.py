"""A training that tests and child processes share: a tiny GPT-2, tokens that a step's number decides, every kind of loop."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gradient_models import checkpointing
from tiny_models import gpt2
from torch import Tensor, nn

from tensortape.instrument import ProbeSet, Recorder, Site
from tensortape.stores import open_run

BATCH, WIDTH, VOCABULARY = 3, 7, 31
SITES = [
    "resid_post",
    "attention",
    "resid_post[1]:out.grad",
    Site("param.transformer.h.*.mlp.c_fc.weight.grad", reduce="norm"),
    Site("param.transformer.h.0.mlp.c_fc.weight.clipped", reduce="row_norm"),
    Site("param.transformer.h.0.mlp.c_fc.weight.update", reduce="random", width=11),
]


@dataclass(frozen=True)
class Loop:
    """How a loop trains: micro-batches per step, checkpointing (None, or whether it is reentrant), autocast, a scaler, clipping."""

    micro: int = 1
    reentrant: bool | None = None
    autocast: bool = False
    scaler: bool = False
    clip: float | None = None
    every: int = 2


@dataclass
class Told:
    """What a training without a recorder has to show, too."""

    losses: list[float] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


def model(loop: Loop, seed: int = 0) -> Any:
    """In training mode, without dropout, so that nothing is random."""
    torch.manual_seed(seed)
    found = gpt2(vocab_size=VOCABULARY, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False).train()
    if loop.reentrant is not None:
        checkpointing(found, reentrant=loop.reentrant)
    return found


def tokens(step: int, micro: int, seed: int = 0) -> dict[str, Tensor]:
    """A right-padded batch of the model's arguments."""
    draw = torch.Generator().manual_seed(10_000 * seed + 100 * step + micro)
    ids = torch.randint(1, VOCABULARY, (BATCH, WIDTH), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def names(step: int, micro: int) -> list[str]:
    """Ids of a batch."""
    return [f"{step}.{micro}.{row}" for row in range(BATCH)]


def probes() -> ProbeSet:
    """Two fixed examples."""
    batch = tokens(0, 0, seed=7)
    return ProbeSet([{"id": ["p", "q"], **{key: batch[key][:2] for key in ("input_ids", "attention_mask")}}])


def train(
    loop: Loop,
    net: Any,
    optimizer: Any,
    steps: Iterator[int] | range,
    recorder: Recorder | None = None,
    probe: ProbeSet | None = None,
) -> Told:
    """Train for some steps (from 1), recorded or not."""
    told = Told()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=loop.scaler)
    for step in steps:
        if recorder is not None and probe is not None:
            probe.record(recorder)
        told.losses.append(_one_step(loop, net, step, recorder, scaler))
        scaler.unscale_(optimizer)
        if loop.clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), loop.clip)
        told.gradients.append([parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        if recorder is not None:
            recorder.step(loss=told.losses[-1], lr=optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
    told.weights = [parameter.detach().clone() for parameter in net.parameters()]
    return told


def _one_step(loop: Loop, net: Any, step: int, recorder: Recorder | None, scaler: Any) -> float:
    total = 0.0
    for micro in range(loop.micro):
        with recorder.batch(ids=names(step, micro)) if recorder is not None else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=loop.autocast):
                loss = net(**tokens(step, micro)).loss / loop.micro
            with recorder.target("loss", reduction="mean", scaler=scaler) if recorder is not None else nullcontext():
                scaler.scale(loss).backward()
        total += float(loss.detach())
    return total


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """With state of its own, which a checkpoint has to carry."""
    return torch.optim.AdamW(net.parameters(), lr=3e-3)


def killed(folder: Path, die_before: int, last: int, save_every: int) -> None:
    """Go on from the checkpoint, if there is one, save one now and then, and be killed before a step."""
    loop, checkpoint = Loop(clip=0.5), folder / "checkpoint.pt"
    net = model(loop)
    optimizer = optimizer_of(net)
    recorder = Recorder(net, sites=SITES, to=folder / "run.zarr", every=loop.every, mode="resume", commit_seconds=0.05)
    begin = 1
    if checkpoint.exists():
        state = torch.load(checkpoint)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        recorder.load_state_dict(state["recorder"])
        begin = state["recorder"]["step"] + 1
    probe = probes()
    for step in range(begin, last + 1):
        if step == die_before:
            os.kill(os.getpid(), signal.SIGKILL)
        train(loop, net, optimizer, range(step, step + 1), recorder, probe)
        if step % save_every == 0:
            saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "recorder": recorder.state_dict()}
            torch.save(saved, folder / "new.pt")
            (folder / "new.pt").replace(checkpoint)
    recorder.close()
    open_run(folder / "run.zarr").verify()


if __name__ == "__main__":
    torch.set_num_threads(1)
    killed(Path(sys.argv[1]), *map(int, sys.argv[2:]))
