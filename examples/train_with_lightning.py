"""Train a small language model with Lightning, and record it.

Run as `python examples/train_with_lightning.py --out trained`; called again with more `--steps`, it goes on from its last
checkpoint. In the folder are then a run, `run.zarr`, and checkpoints.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_corpus import loss_of, new_model, split, summarise, windows
from torch import Tensor

from tensortape.instrument import Site
from tensortape.instrument.loops.lightning import RecorderCallback
from tensortape.stores import open_run


class Language(pl.LightningModule):
    """Next-token prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.model = new_model()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return loss_of(self.model, batch["input_ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run and the checkpoints")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--every", type=int, default=20, help="record every so many steps")
    options = parser.parse_args(arguments)
    train(options.out, options.steps, options.every)
    summarise(open_run(options.out / "run.zarr"))


def train(folder: Path, steps: int, every: int) -> None:
    loader, probe = split(windows())
    recorder = RecorderCallback(
        sites=["resid_post", "attention", Site("param.**.mlp.*.weight.grad", reduce="norm")],
        to=folder / "run.zarr",
        mode="overwrite",  # without a checkpoint the training begins anew, and so does the run
        every=every,
        module="model",
        ids="id",
        probe=probe,
    )
    trainer = pl.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[recorder, ModelCheckpoint(folder, every_n_train_steps=every // 2, save_last=True)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Language(), loader, ckpt_path="last" if (folder / "last.ckpt").exists() else None)


if __name__ == "__main__":
    main()
