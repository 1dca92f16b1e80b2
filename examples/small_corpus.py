"""What the training examples share: windows of the Python standard library's sources, and a GPT-2 that is small enough for them.

It needs no network: the data are files of the running interpreter, and the tokenizer is that of the model in the package.
"""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tensortape.app.demo_runs import source_files
from tensortape.app.models import demo_folder
from tensortape.instrument import ProbeSet
from tensortape.stores import Run

WINDOW, BATCH, PROBES = 64, 8, 16


def windows(files: int = 24) -> list[dict[str, Any]]:
    """Examples: `id`, the file and the window's number in it, and `input_ids`, int64 [64]."""
    tokenizer, library = AutoTokenizer.from_pretrained(demo_folder()), Path(sysconfig.get_path("stdlib"))
    found = []
    for path in source_files(files, seed=0):
        tokens = torch.tensor(tokenizer(path.read_text(encoding="ascii"), verbose=False)["input_ids"])
        rows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
        name = path.relative_to(library).as_posix()
        found += [{"id": f"{name}:{number}", "input_ids": row} for number, row in enumerate(rows)]
    return found


def split(examples: list[dict[str, Any]]) -> tuple[DataLoader[Any], ProbeSet]:
    """A loader that shuffles, and sixteen windows that are not trained on."""
    held_out = list(DataLoader(examples[:PROBES], batch_size=BATCH))  # type: ignore[arg-type]
    return DataLoader(examples[PROBES:], batch_size=BATCH, shuffle=True, drop_last=True), ProbeSet(held_out)  # type: ignore[arg-type]


def new_model(seed: int = 0) -> GPT2LMHeadModel:
    """Three layers of 48 features, about 0.2 million parameters."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": WINDOW, "vocab_size": 2048}
    return GPT2LMHeadModel(GPT2Config(use_cache=False, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes))


def loss_of(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Mean loss in nats per token."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def summarise(run: Run) -> None:
    """Print the losses, and how far the states of the probe set have moved away from those of the untrained model."""
    losses = run.steps["loss"]
    print(f"steps 1 to {run.last_step}: loss {losses.iloc[0]:.2f} to {losses.iloc[-1]:.2f}")
    for column in run.select("resid_post"):
        first, *later = (states(run, column.name, step) for step in sorted({key[2] for key in run.keys if key[1] == "probe"}))
        cosines = [torch.cosine_similarity(first, now, dim=1).mean().item() for now in later]
        print(f"{column.name}: cosine with step 0 {' '.join(f'{cosine:.2f}' for cosine in cosines)}")
    print(run)


def states(run: Run, column: str, step: int) -> Tensor:
    """A site of the whole probe set after a step, [tokens, features]."""
    values = run[column]
    return torch.cat([torch.tensor(values[number]) for number in run.where(phase="probe", step=step)])
