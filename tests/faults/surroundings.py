"""What surrounds a recording: a disk that fails under a model, other writers, a clock that jumps, secrets in the environment."""

from __future__ import annotations

import errno
import random
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from tiny_models import batch, gpt2, tensors
from torch import Tensor, nn

from tensortape.instrument import Recorder, record
from tensortape.stores import StoreError, open_run

from .failing import fails
from .interruptions import SITES, standing
from .layer import Meet, Operation, layer
from .promises import broken
from .recipe import ADDED, Recipe
from .recipe import record as record_recipe

BATCHES = 3
SECRETS = {"HF_TOKEN": "hf_canary5ecret", "AWS_SECRET_ACCESS_KEY": "canary/5ecret+key", "WANDB_API_KEY": "canary5ecret0123"}


# A disk that fails.


class FullFrom:
    """Every operation from the n-th on fails, as on a disk that stays full."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.calls = 0

    def __call__(self, operation: Operation) -> object:
        """Meet one operation."""
        self.calls += 1
        writes = operation.name not in ("read", "close")
        return fails(errno.ENOSPC)(operation) if self.calls >= self._number and writes else operation.make()


def full_disk_under_a_model(folder: Path, every: int) -> Iterator[list[str]]:
    """One trial per operation (of every so many) from which on the disk is full: the model does not notice, the caller does."""
    model, path = gpt2(), folder / "runs" / "run.zarr"
    expected = [_outputs(model, number) for number in range(BATCHES)]
    for number in count(1, every):
        path.parent.mkdir()
        meet, before = FullFrom(number), standing(model)
        errors = list(_recorded(path, model, expected, meet))
        wrong = [error for error in errors if isinstance(error, str)]
        if standing(model) != before:
            wrong.append("hooks or settings were left behind")
        wrong += [] if errors or meet.calls < number else ["nobody was told"]
        wrong += [repr(error) for error in _recorded(path, model, expected, Operation.make)]
        wrong += (
            [] if open_run(path).ids == [f"{n}-{row}" for n in range(BATCHES) for row in range(5)] else ["the run is not complete"]
        )
        yield [f"full from operation {number} on: {one}" for one in wrong]
        shutil.rmtree(path.parent)
        if meet.calls < number:
            break


def _recorded(path: Path, model: nn.Module, expected: list[list[Tensor]], meet: Meet) -> Iterator[Exception | str]:
    """Record all batches, whatever happens to any; the errors that came, and in words where the model computed something else."""
    with layer(path.parent, meet):
        try:
            recorder = Recorder(model, sites=["resid_post", "attention"], to=path, mode="resume")
        except OSError as error:
            yield error
            return
        for number in range(BATCHES):
            outputs: list[Tensor] = []
            try:
                with recorder.batch(ids=[f"{number}-{row}" for row in range(5)]):
                    outputs = _outputs(model, number)
                recorder.commit()
            except (OSError, StoreError) as error:
                yield error
            if not all(map(torch.equal, outputs, expected[number])) or len(outputs) != len(expected[number]):
                yield f"the outputs of batch {number} are not the model's own"
        try:
            recorder.close()
        except OSError as error:
            yield error


def _outputs(model: nn.Module, number: int) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors(model(**batch(seed=number))))


# A clock, secrets.


def jumping_clock(folder: Path, trials: int) -> Iterator[list[str]]:
    """P12: both clocks jump by up to a year at every look; the run is what it would have been."""
    for number in range(trials):
        dice, recipe, acknowledged = random.Random(number), Recipe(number, 6, 30), list[int | str]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", _jumping(time.time, dice))
            patch.setattr(time, "monotonic", _jumping(time.monotonic, dice))
            record_recipe(folder / "run.zarr", recipe, acknowledged.append, 4)
        ids_in_order = open_run(folder / "run.zarr").ids == list(recipe.examples)
        yield [*broken(folder / "run.zarr", recipe, [*range(6), ADDED]), *([] if ids_in_order else ["the order is another"])]
        shutil.rmtree(folder / "run.zarr")


def _jumping(clock: Callable[[], float], dice: random.Random) -> Callable[[], float]:
    return lambda: clock() + dice.uniform(-3e7, 3e7)


def secrets(folder: Path) -> Iterator[list[str]]:
    """P14: no file of a run that a model was recorded into holds a secret of its environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        record(gpt2(), [{"id": list(range(5)), **batch()}], to=folder / "run.zarr", sites=SITES[:2], ids="id")
    files = [file for file in (folder / "run.zarr").rglob("*") if file.is_file()]
    yield [f"{name} is in {file}" for name, secret in SECRETS.items() for file in files if secret.encode() in file.read_bytes()]
