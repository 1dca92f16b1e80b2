"""Train a small language model with the Trainer of transformers, and record it.

Run as `python examples/train_with_trainer.py --out trained`; called again with more `--steps`, it goes on from its last checkpoint.
In the folder are then a run, `run.zarr`, and checkpoints.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from small_corpus import BATCH, PROBES, new_model, split, summarise, windows
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tensortape.instrument import Site
from tensortape.instrument.loops.trainer import RecorderCallback
from tensortape.stores import open_run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run and the checkpoints")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--every", type=int, default=20, help="record every so many steps")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.out, options.steps, options.every)
    run = open_run(options.out / "run.zarr")
    summarise(run)
    print(run.steps[["step", "loss", "lr", "log.grad_norm"]].tail())


def train(folder: Path, steps: int, every: int) -> None:
    examples = windows()
    recording = RecorderCallback(
        sites=["resid_post", "attention", "resid_post:out.grad", Site("param.**.mlp.*.weight.grad", reduce="norm")],
        to=folder / "run.zarr",
        mode="overwrite",  # without a checkpoint the training begins anew, and so does the run
        every=every,
        ids="id",
        probe=split(examples)[1],
        # The Trainer differentiates the mean over all tokens of a step; so gradients become those of each example's summed loss.
        target=lambda call: {"reduction": "sum", "factor": call["num_items_in_batch"]},
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=every // 4,
        save_steps=every // 2,
        remove_unused_columns=False,  # or the Trainer would remove the ids
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    rows: Any = examples[PROBES:]
    trainer = Trainer(new_model(), arguments, train_dataset=rows, data_collator=collated, callbacks=[recording])
    with recording:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))


def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of the model's arguments, and the ids."""
    tokens = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens, "id": [row["id"] for row in rows]}


if __name__ == "__main__":
    main()
