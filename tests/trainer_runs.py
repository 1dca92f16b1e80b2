"""A training by the Trainer that tests and child processes share: a tiny GPT-2 with dropout, padded rows with ids and topics."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_models import gpt2
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tensortape.instrument import ProbeSet, Site
from tensortape.instrument.loops.trainer import RecorderCallback

EXAMPLES, BATCH, WIDTH, VOCABULARY = 17, 3, 7, 31
SITES = [
    "resid_post",
    "attention",
    "resid_post[1]:out.grad",
    Site("param.transformer.h.*.mlp.c_fc.weight.grad", reduce="norm"),
    Site("param.transformer.h.*.mlp.c_fc.weight.clipped", reduce="norm"),
    Site("param.transformer.h.0.mlp.c_fc.weight.update", reduce="row_norm"),
]


class Watch(TrainerCallback):
    """What a training without a recorder has to show, too: every gradient that the optimizer sees, and every forward's mode."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.logged: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        self.gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        self.logged.append({"step": state.global_step, **logs})


class Kill(TrainerCallback):
    """Ends the process at an event of a step, without a word to anybody."""

    def __init__(self, step: int, event: str) -> None:
        self._step = step
        setattr(self, event, self._die)

    def _die(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def model(**changes: Any) -> Any:
    """The same weights every time."""
    return gpt2(vocab_size=VOCABULARY, use_cache=False, **changes)


def rows(count: int = EXAMPLES, seed: int = 0) -> list[dict[str, Any]]:
    """Right-padded rows of several lengths; ids from 100."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (count, WIDTH), generator=draw)
    lengths = torch.randint(3, WIDTH + 1, (count,), generator=draw)
    found = []
    for number, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
        mask = (torch.arange(WIDTH) < length).long()
        said = {"id": 100 + 10_000 * seed + number, "topic": int(length) % 2}
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), **said})
    return found


def batch_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as the model's arguments."""
    return {key: torch.stack([row[key] for row in found]) for key in ("input_ids", "attention_mask", "labels")}


def probes() -> ProbeSet:
    """Two fixed examples."""
    fixed = rows(2, seed=7)
    inputs = {key: value for key, value in batch_of(fixed).items() if key != "labels"}
    return ProbeSet([{"id": [row["id"] for row in fixed], **inputs}])


def trainer(folder: Path, callbacks: list[Any], net: Any = None, **changes: Any) -> Trainer:
    """Of three epochs of three steps with two micro-batches each, and clipping."""
    torch.manual_seed(0)
    asked: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        **changes,
    }
    quiet: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(output_dir=str(folder / "checkpoints"), **quiet, **asked)
    return Trainer(net or model(), arguments, train_dataset=rows(), eval_dataset=rows(5, seed=3), callbacks=callbacks)


def recording(folder: Path, **changes: Any) -> RecorderCallback:
    """Every second step, with labels and a probe set."""
    asked = {"sites": SITES, "every": 2, "ids": "id", "labels": {"example/topic": "topic"}, "probe": probes(), **changes}
    return RecorderCallback(to=folder / "run.zarr", **asked)


def resumable(folder: Path, callbacks: list[Any], **changes: Any) -> None:
    """Train from the last checkpoint, if there is one, and save one now and then."""
    found = trainer(folder, callbacks, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=4, **changes)
    made = folder / "checkpoints"
    found.train(resume_from_checkpoint=get_last_checkpoint(str(made)) if made.exists() else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    to = Path(sys.argv[1])
    resumable(to, [recording(to, mode="resume", commit_seconds=0.01), Kill(int(sys.argv[2]), sys.argv[3])])
