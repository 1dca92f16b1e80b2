"""What each rank runs in these tests, as a script of its own: `python ranks.py PROGRAM FOLDER RANKS PORT OPTIONS`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from tensortape.instrument import Recorder, Site

WIDTH, VOCABULARY, LAYERS = 24, 97, 2
EXAMPLES, BATCH = 29, 3


class Block(nn.Module):
    """A pre-norm block without attention: what counts here is who writes, not what."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 31), nn.Linear(31, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, d] to [B, T, d]."""
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """The same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B, T] to [B, T, d]."""
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


SITES = ["blocks.*", Site("blocks.1.up", reduce="mean")]


def tokens(number: int) -> torch.Tensor:
    """The tokens of an example: 2 to 12 of them."""
    return torch.randint(3, VOCABULARY, (2 + number * 7 % 11,), generator=torch.Generator().manual_seed(number))


def grid(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """A padded batch, as wide as its longest example."""
    rows = nn.utils.rnn.pad_sequence([tokens(number) for number in numbers], batch_first=True)
    return {"input_ids": rows, "attention_mask": (rows != 0).long()}


def labels(numbers: Sequence[int]) -> dict[str, Any]:
    """One per example, and one per token."""
    return {"example/topic": [f"topic {number}" for number in numbers], "token/tag": [tokens(number) % 5 for number in numbers]}


def batches() -> list[list[int]]:
    """All batches. They are what is distributed, so that an example meets the same batch on however many ranks."""
    return [list(range(start, min(start + BATCH, EXAMPLES))) for start in range(0, EXAMPLES, BATCH)]


def own_batches(rank: int, world_size: int) -> Iterator[list[int]]:
    """Those of one rank; some are also another's."""
    every = batches()
    sampler = DistributedSampler(range(len(every)), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
    return (every[number] for number in sampler)


def go(recorder: Recorder, model: nn.Module, given: Iterator[list[int]], dies_at: int = -1) -> int:
    """Record batches; the number that were run. One who dies before a batch has committed all but the last one before it."""
    run = 0
    for place, numbers in enumerate(given):
        if place == dies_at - 1:
            recorder.commit()
        if place == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with torch.no_grad(), recorder.batch(ids=numbers, labels=labels(numbers)) as told:
            if told.recorded:
                model(**grid(numbers))
                run += 1
    return run


def every_rank(folder: Path, *, wrapped: bool = False, who: int = -1, dies_at: int = -1, **options: Any) -> int:
    """Each rank its own batches; one is killed before a batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model: nn.Module = DistributedDataParallel(Model()) if wrapped else Model()
    with Recorder(model, sites=SITES, to=folder / "run.zarr", **options) as recorder:
        return go(recorder, model, own_batches(rank, size), dies_at if rank == who else -1)


def one_rank(folder: Path) -> None:
    """Rank 0 records, the others never hear of it."""
    if dist.get_rank() == 0:
        model = Model()
        with Recorder(model, sites=SITES, to=folder / "run.zarr") as recorder:
            go(recorder, model, iter(batches()[:2]))
    dist.barrier()


def one_after_another(folder: Path) -> None:
    """Several recordings of one path in one process: as many sessions, in which the ranks agree."""
    for mode in ("create", "overwrite", "resume"):
        model = Model()
        with Recorder(model, sites=SITES, to=folder / "run.zarr", mode=mode) as recorder:  # type: ignore[arg-type]
            go(recorder, model, own_batches(dist.get_rank(), dist.get_world_size()))
        dist.barrier()


def trained(model: nn.Module, recorder: Recorder | None, ranks: Sequence[int], steps: range) -> None:
    """Train on what several ranks read, as a mean over ranks: on one of them or, in one process, on all."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        for rank in ranks:
            numbers = batches()[(step * 2 + rank) % 9]
            with recorder.batch(ids=numbers) if recorder is not None else nullcontext():
                (model(**grid(numbers)).square().mean() / len(ranks)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        if recorder is not None:
            recorder.step(loss=float(step))
        optimizer.zero_grad()


def train_ranks(folder: Path, how: str, **options: Any) -> list[list[float]]:
    """Train under DDP or FSDP2; the final weights."""
    model: nn.Module = Model()
    if how == "ddp":
        model = DistributedDataParallel(model)
    else:
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block)
        fully_shard(model)
    reduced = [Site("param.blocks.*.up.weight.grad", reduce="norm"), Site("param.blocks.*.up.weight.clipped", reduce="norm")]
    whole = [Site("param.blocks.*.up.weight.grad", gather=True), Site("param.blocks.0.up.weight.update", gather=True)]
    with Recorder(model, sites=["blocks.1", *reduced, *whole], to=folder / "run.zarr", every=2, **options) as recorder:
        trained(model, recorder, [dist.get_rank()], range(4))
    weights = [getattr(parameter, "full_tensor", lambda parameter=parameter: parameter)() for parameter in model.parameters()]
    return [weight.flatten().tolist() for weight in weights]


PROGRAMS = {"train_ranks": train_ranks, "every_rank": every_rank, "one_rank": one_rank, "one_after_another": one_after_another}


def rank_of(rank: int, size: int, port: str, folder: Path, program: str, options: dict[str, Any]) -> None:
    """One rank; leaves what its program returned beside the run."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo")
    found = PROGRAMS[program](folder, **options)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # there is nobody to say goodbye to where a rank was killed


def main() -> None:
    """Fork so many ranks, each a process of its own in one process group, once everything is imported."""
    program, folder, size, port, options = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5])
    torch.set_num_threads(1)
    children = []
    for rank in range(size):
        children.append(os.fork())
        if not children[-1]:
            rank_of(rank, size, port, folder, program, options)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "statuses.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
