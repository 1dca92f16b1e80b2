"""A small training with Lightning.

As a program it is killed again and again, `python lightning_training.py FOLDER KILLS SEED`, or runs in two processes,
`python lightning_training.py FOLDER ranks`.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tensortape.instrument import ProbeSet, Site
from tensortape.instrument.loops.lightning import RecorderCallback

Tensor = torch.Tensor
Batch = dict[str, Any]

VOCABULARY, LAYERS, WIDTH, PAD = 97, 2, 12, 0
LENGTHS = (7, 3, 5)
SITES: list[Any] = [
    "resid_post",
    "attention",
    "resid_post[0]:out.grad",
    Site("param.**.attn.c_proj.weight.grad", reduce="norm"),
    "param.transformer.ln_f.bias.clipped",
    "param.transformer.ln_f.bias.update",
]


class Language(pl.LightningModule):
    """Next-token prediction: the mean over examples of each one's mean loss; with warm-up, so that rates differ by step."""

    def __init__(self, *, dropout: float = 0.0, checkpoints: bool = False) -> None:
        super().__init__()
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 3, "n_inner": 17, "n_positions": 19}
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
        torch.manual_seed(0)
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, use_cache=False, **sizes, **drops, **ends))
        if checkpoints:
            name = "activation_checkpointing_enable"  # of newer transformers
            getattr(self.model, name, self.model.gradient_checkpointing_enable)({"use_reentrant": False})

    def losses(self, batch: Batch) -> Tensor:
        """[examples]."""
        tokens, mask = batch["input_ids"], batch["attention_mask"][:, 1:]
        logits = self.model(input_ids=tokens, attention_mask=batch["attention_mask"]).logits[:, :-1]
        each = nn.functional.cross_entropy(logits.transpose(1, 2).float(), tokens[:, 1:], reduction="none")
        return (each * mask).sum(1) / mask.sum(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.losses(batch).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Runs the same model."""
        self.losses(batch)

    def configure_optimizers(self) -> Any:
        """AdamW, whose rate rises."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Whole(Language):
    """A LightningModule that training_step calls itself."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T] to logits [B, T, words]."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Something to differentiate."""
        return self(batch["input_ids"], batch["attention_mask"]).pow(2).mean()


def batch_of(number: int) -> Batch:
    """The batch of a number: three examples of 7, 3 and 5 tokens."""
    dice = torch.Generator().manual_seed(number)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    tokens = torch.randint(3, VOCABULARY, mask.shape, generator=dice)
    return {
        "id": [f"b{number}-{letter}" for letter in "abc"],
        "topic": torch.arange(3 * number, 3 * number + 3),
        "input_ids": tokens.masked_fill(mask == 0, PAD),
        "attention_mask": mask,
    }


class Batches:
    """A loader that goes on where a checkpoint was, as Lightning asks loaders to."""

    def __init__(self, count: int, first: int = 0) -> None:
        self._batches = [batch_of(first + number) for number in range(count)]
        self._given = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        self._given %= len(self)  # nobody asks an epoch of a known length for its end
        while self._given < len(self):
            self._given += 1
            yield self._batches[self._given - 1]

    def state_dict(self) -> dict[str, int]:
        """How many were given."""
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after so many."""
        self._given = state["given"]


def probe_set() -> ProbeSet:
    """Two batches that are not trained on."""
    return ProbeSet([{key: value for key, value in batch_of(number).items() if key != "topic"} for number in (100, 101)])


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet trainer on the processor."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    place = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "num_sanity_val_steps": 0}
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **place, **options})


class Saves(pl.Callback):
    """Writes a checkpoint after every third step, and forgets none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = self._folder / f"{trainer.global_step:03}.ckpt"
        if trainer.global_step % 3 == 0 and trainer.global_step and not path.exists():
            trainer.save_checkpoint(path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)


class Tells(pl.Callback):
    """Says through a pipe that a batch has begun."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def on_train_batch_start(self, *_: Any) -> None:
        self._pipe.send(1)


def train(folder: Path, *spies: pl.Callback) -> None:
    """Four epochs of seven batches, two to a step, from the last checkpoint on, if there is one; recorded in every other step."""
    torch.set_num_threads(1)
    checkpoints = sorted(folder.glob("*.ckpt"))
    callback = RecorderCallback(
        sites=SITES, to=folder / "run.zarr", every=2, module="model", probe=probe_set(), mode="overwrite", durability="rename"
    )
    options: dict[str, Any] = {"max_epochs": 4, "accumulate_grad_batches": 2, "enable_checkpointing": False}
    going = trainer(folder, callback, *spies, Saves(folder), **options)
    going.fit(Language(), Batches(7), ckpt_path=checkpoints[-1] if checkpoints else None)


def kill_once(folder: Path, dice: random.Random) -> None:
    """Train in a process of its own, and kill that at a random instant of a random batch."""
    processes = multiprocessing.get_context("fork")
    hears, tells = processes.Pipe(duplex=False)
    child = processes.Process(target=train, args=(folder, Tells(tells)))
    child.start()
    tells.close()  # so that a child that ends is heard
    for _ in range(dice.randint(3, 9)):
        hears.recv()
    child.join(dice.random() * 0.05)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def on_two_ranks(folder: Path, trained: Language, epochs: int, **recorded: Any) -> None:
    """So many epochs of seven batches on each rank, two to a step, from the checkpoint of step 2 on, if there is one."""

    def loader() -> Batches:
        return Batches(7, first=200 * trained.global_rank)

    trained.train_dataloader = loader  # ranks know which they are once they are started
    callback = RecorderCallback(to=folder / "run.zarr", every=2, probe=probe_set(), durability="rename", **recorded)
    saves = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    checkpoint = folder / "step=2.ckpt"
    options = {"max_epochs": epochs, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    going = trainer(folder, callback, saves, strategy="ddp_fork", devices=2, **options)
    going.fit(trained, ckpt_path=checkpoint if checkpoint.exists() else None)


def main(folder: Path, what: str, seed: str = "0") -> None:
    """Do what the arguments say."""
    if what == "whole":
        on_two_ranks(folder / "whole", Whole(), 1, sites=SITES)
    elif what == "ranks":
        on_two_ranks(folder, Language(), 1, sites=SITES, module="model")
        on_two_ranks(folder, Language(), 2, sites=SITES, module="model")
    else:
        dice = random.Random(int(seed))
        for _ in range(int(what)):
            kill_once(folder, dice)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
