"""A loop with accelerate that tests and child processes share, on the model and the rows of `trainer_runs`."""

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
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from gradient_models import checkpointing, without_dropout
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainer_runs import BATCH, SITES, batch_of, model, probes, rows

from tensortape.instrument import ProbeSet, Recorder

MICRO = 2
LAST = 7


@dataclass
class Told:
    """What a training without a recorder has to show, too."""

    losses: list[float] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)


@dataclass
class Loop:
    """Everything a loop with accelerate has prepared."""

    accelerator: Accelerator
    net: nn.Module
    optimizer: Any
    loader: Any

    def batches(self, done: int) -> Iterator[dict[str, Any]]:
        """Those after so many steps, epoch after epoch."""
        per_epoch = len(self.loader)
        epoch, skipped = divmod(done * MICRO, per_epoch)
        while True:
            self.loader.set_epoch(epoch)
            yield from skip_first_batches(self.loader, skipped) if skipped else self.loader
            epoch, skipped = epoch + 1, 0


def collate(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {**batch_of(found), "id": [row["id"] for row in found]}


def prepared(precision: str = "no", *, checkpoints: bool = False, scaler: Any = None) -> Loop:
    """Each step is of two micro-batches; an epoch has four steps, or two on each of two ranks."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)
    seeded = DataLoaderConfiguration(use_seedable_sampler=True)  # an epoch's order does not depend on what was drawn before
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=MICRO, dataloader_config=seeded)
    accelerator.scaler = scaler or accelerator.scaler
    net = model()
    net = checkpointing(net, reentrant=False) if checkpoints else net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loader = DataLoader(rows(8 * BATCH), BATCH, collate_fn=collate, shuffle=True)
    return Loop(accelerator, *accelerator.prepare(net, optimizer, loader))


def train(loop: Loop, last: int, recorder: Recorder | None = None, probe: ProbeSet | None = None, done: int = 0) -> Iterator[Told]:
    """Train until a step; gives what there is to show after each."""
    told, losses = Told(), list[Tensor]()
    for batch in loop.batches(done):
        ids = batch.pop("id")
        told.ids.append(ids)
        if recorder is not None and probe is not None and not losses:
            probe.record(recorder)
        scaler = loop.accelerator.scaler
        with loop.accelerator.accumulate(loop.net), recorder.batch(ids=ids) if recorder is not None else nullcontext():
            loss = loop.net(**batch).loss
            with recorder.target("loss", reduction="mean", scaler=scaler) if recorder is not None else nullcontext():
                loop.accelerator.backward(loss)
        losses.append(loss.detach())
        if loop.accelerator.sync_gradients:
            loop.accelerator.clip_grad_norm_(loop.net.parameters(), 0.05)
            told.gradients.append([parameter.grad.clone() for parameter in loop.net.parameters() if parameter.grad is not None])
        loop.optimizer.step()
        if loop.accelerator.sync_gradients:
            done += 1
            told.losses.append(float(torch.stack(losses).mean()))
            losses.clear()
            if recorder is not None:
                recorder.step(loss=told.losses[-1], lr=loop.optimizer.param_groups[0]["lr"])
        loop.optimizer.zero_grad()
        if loop.accelerator.sync_gradients:
            told.weights = [parameter.detach().clone() for parameter in loop.net.parameters()]
            yield told
            if done == last:
                return


def resumable(folder: Path, die_at: int | None = None) -> None:
    """Train from the checkpoint, if there is one; save one now and then, and be killed after a step.

    Without dropout: a loader that begins anew in the middle of an epoch draws one random number more than one that goes on.
    """
    loop = prepared()
    without_dropout(loop.net)
    recorder = Recorder(loop.net, sites=SITES, to=folder / "run.zarr", every=2, mode="resume", commit_seconds=0.01)
    loop.accelerator.register_for_checkpointing(recorder)
    if (folder / "checkpoint").exists():
        loop.accelerator.load_state(str((folder / "checkpoint").resolve()))
    with recorder:
        if recorder.steps < LAST:
            for _ in train(loop, LAST, recorder, probes(), recorder.steps):
                if recorder.steps == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if recorder.steps % 2 == 0:
                    save(loop, folder, recorder.steps)


def save(loop: Loop, folder: Path, step: int) -> None:
    """A checkpoint counts once it is whole."""
    loop.accelerator.save_state(str(folder / f"state-{step}"))
    link = folder / "new"
    link.symlink_to(folder / f"state-{step}")
    link.rename(folder / "checkpoint")


def rank_of(rank: int, world: int, port: int, folder: Path, last: int) -> None:
    """One of several processes that train together; the model is wrapped for that."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, rank, world, "127.0.0.1", port)), strict=True))
    torch.set_num_threads(1)
    loop = prepared()
    assert isinstance(loop.net, nn.parallel.DistributedDataParallel)
    recorder = Recorder(loop.net, sites=SITES, to=folder / "run.zarr", every=2)
    loop.accelerator.register_for_checkpointing(recorder)
    with recorder:
        for told in train(loop, last, recorder):
            torch.save({"weights": told.weights, "losses": told.losses, "ids": told.ids}, folder / f"told-{rank}.pt")
        loop.accelerator.save_state(str(folder / "state"))
    loop.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    resumable(Path(sys.argv[1]), int(sys.argv[2]))
