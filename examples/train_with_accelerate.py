"""Train a small language model in a loop with accelerate, and record it.

Run as `python examples/train_with_accelerate.py --out trained`, or with `accelerate launch`; called again with more `--steps`, it
goes on from its last checkpoint. In the folder are then a run, `run.zarr`, and checkpoints.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from small_corpus import loss_of, new_model, split, summarise, windows

from tensortape.instrument import Recorder, Site
from tensortape.stores import open_run

SITES = ["resid_post", "attention", "resid_post:out.grad", Site("param.**.mlp.*.weight.grad", reduce="norm")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run and the checkpoints")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--every", type=int, default=20, help="record every so many steps")
    options = parser.parse_args(arguments)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # an epoch's order depends on its number alone
    )
    train(accelerator, options.out, options.steps, options.every)
    if accelerator.is_main_process:
        run = open_run(options.out / "run.zarr")
        summarise(run)
        print(run.steps[["step", "loss", "lr"]].tail())
    accelerator.end_training()


def train(accelerator: Accelerator, folder: Path, steps: int, every: int) -> None:
    last = max(folder.glob("step-*/custom_checkpoint_0.pkl"), key=lambda path: path.stat().st_mtime, default=None)
    loader, probe = split(windows())
    net = new_model()
    model, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=3e-3), loader)
    mode: Any = "resume" if last else "overwrite"
    with Recorder(model, sites=SITES, to=folder / "run.zarr", every=every, mode=mode) as recorder:
        accelerator.register_for_checkpointing(recorder)  # saved last: a folder with its state is whole
        if last:
            accelerator.load_state(str(last.parent))  # what was recorded after the checkpoint counts no more
        batches, losses = epochs(loader, 2 * recorder.steps), []
        while recorder.steps < steps:
            if not losses:
                probe.record(recorder)
            batch = next(batches)
            with accelerator.accumulate(model), recorder.batch(ids=batch["id"]):
                loss = loss_of(model, batch["input_ids"])
                with recorder.target("loss", reduction="mean", factor=2):  # accelerate divides the loss by the accumulation steps
                    accelerator.backward(loss)
            losses.append(loss.detach())
            optimizer.step()
            if accelerator.sync_gradients:
                recorder.step(loss=torch.stack(losses).mean(), lr=optimizer.param_groups[0]["lr"])
                losses.clear()
            optimizer.zero_grad()
            if accelerator.sync_gradients and recorder.steps % (every // 2) == 0:
                accelerator.save_state(str(folder / f"step-{recorder.steps}"))
        probe.record(recorder, always=True)


def epochs(loader: Any, done: int) -> Iterator[dict[str, Any]]:
    """Batches after the first `done` ones."""
    epoch, skipped = divmod(done, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from skip_first_batches(loader, skipped)
        epoch, skipped = epoch + 1, 0


if __name__ == "__main__":
    main()
