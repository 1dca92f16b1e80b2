"""Train a small language model in a plain loop, and record it.

Run as `python examples/train_plain_loop.py --out trained`; called again with more `--steps`, it goes on from its last checkpoint.
In the folder are then a run, `run.zarr`, and `last.pt`.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from small_corpus import loss_of, new_model, split, summarise, windows
from torch.utils.data import DataLoader

from tensortape.instrument import Recorder, Site
from tensortape.stores import open_run

SITES = ["resid_post", "attention", "resid_post:out.grad", Site("param.**.mlp.*.weight.grad", reduce="norm")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run and the checkpoint")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--every", type=int, default=20, help="record every so many steps")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.out, options.steps, options.every)
    summarise(open_run(options.out / "run.zarr"))


def train(folder: Path, steps: int, every: int) -> None:
    checkpoint = torch.load(folder / "last.pt") if (folder / "last.pt").exists() else None
    loader, probe = split(windows())
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mode: Any = "resume" if checkpoint else "overwrite"
    with Recorder(model, sites=SITES, to=folder / "run.zarr", every=every, mode=mode) as recorder:
        if checkpoint:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            recorder.load_state_dict(checkpoint["recorder"])  # what was recorded after the checkpoint counts no more
        for batch in islice(epochs(loader, recorder.steps), steps - recorder.steps):
            probe.record(recorder)
            with recorder.batch(ids=batch["id"]):
                loss = loss_of(model, batch["input_ids"])
                loss.backward()
            optimizer.step()
            recorder.step(loss=loss, lr=optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            if recorder.steps % (every // 2) == 0:
                save(folder / "last.pt", {"model": model, "optimizer": optimizer, "recorder": recorder})
        probe.record(recorder, always=True)


def epochs(loader: DataLoader[Any], done: int) -> Iterator[dict[str, Any]]:
    """Batches after the first `done` ones; each epoch is shuffled by its number."""
    epoch, skipped = divmod(done, len(loader))
    while True:
        torch.manual_seed(epoch)
        yield from islice(loader, skipped, None)
        epoch, skipped = epoch + 1, 0


def save(path: Path, parts: dict[str, Any]) -> None:
    """A checkpoint is there whole or not at all. The recorder's `state_dict` commits, so that the run holds all steps behind it."""
    torch.save({name: part.state_dict() for name, part in parts.items()}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
