"""An exception in the model, a user's hook, a backward, a target or the loader: no hook, thread or half batch is left behind."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch
from tiny_models import batch, features, gpt2, hook_count, observed, pair_batch, t5_lm, tensors, torch_encoder
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from transformers.modeling_utils import AttentionInterface

from tensortape.instrument import record
from tensortape.stores import Run, open_run

from .promises import same

SITES = ["resid_post", "attention", "resid_post:out.grad"]
BATCHES, ROWS = 2, 5
ERRORS: tuple[type[BaseException], ...] = (ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit)

Inputs = dict[str, Tensor]
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "GPT-2": (gpt2, batch),
    "T5": (t5_lm, pair_batch),
    "torch encoder": (lambda: torch_encoder(batch_first=True, norm_first=True), features),
}


class Trap:
    """Raises once, from when it is armed."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.armed = False

    def spring(self) -> None:
        """What is called where the error is to happen."""
        if self.armed:
            self.armed = False
            raise self.error


# Places of the error.


@contextmanager
def _in_forward(module: nn.Module, trap: Trap) -> Iterator[None]:
    original = module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        trap.spring()
        return original(*args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _in_hook(module: nn.Module, trap: Trap) -> Iterator[None]:
    """A forward hook of the user's own."""
    handle = module.register_forward_hook(lambda *_: trap.spring())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _in_backward(module: nn.Module, trap: Trap) -> Iterator[None]:
    """A hook of the user's own on the gradient of the module's output."""

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: trap.spring())

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


PLACES: dict[str, Callable[[nn.Module, Trap], AbstractContextManager[None]]] = {
    "the forward": _in_forward,
    "a hook": _in_hook,
    "the backward": _in_backward,
}


# Trials.


def interrupted(folder: Path, name: str, every: int = 1) -> Iterator[list[str]]:
    """The second batch fails in one of the places (of every so many; with up to 3 in every module), a new session goes on."""
    model, inputs = MODELS[name][0](), MODELS[name][1]()
    reference = _recorded(model, _loader(inputs), folder / "reference.zarr")
    called = sorted(observed(model, inputs, {path for path, _ in model.named_modules()}))
    places = [*product(called, PLACES), *product(("target", "loader"), ERRORS)]
    for (path, place), error in zip(islice(places, 0, None, every), cycle(ERRORS), strict=False):
        trap = Trap(error)
        with PLACES[place](model.get_submodule(path), trap) if place in PLACES else nullcontext():
            wrong = _trial(folder / "run.zarr", model, inputs, trap, reference, path)
        yield [f"{error.__name__} in {place} of {path!r}: {one}" for one in wrong]


def _trial(path: Path, model: nn.Module, inputs: Inputs, trap: Trap, reference: Run, where: str) -> list[str]:
    before, threads = standing(model), set(threading.enumerate())
    try:
        _recorded(model, _loader(inputs, trap, springs=where == "loader"), path, trap if where == "target" else None)
    except trap.error:
        wrong = [] if open_run(path).ids == reference.ids[:ROWS] else [f"the run holds {open_run(path).ids}"]
    else:
        wrong = ["the error did not come through"]
    if standing(model) != before:
        wrong.append("hooks or settings were left behind")
    wrong += [f"thread {thread.name} was left behind" for thread in set(threading.enumerate()) - threads if _is_ours(thread)]
    wrong += _differences(_recorded(model, _loader(inputs), path), reference)
    shutil.rmtree(path)
    return wrong


def _loader(inputs: Inputs, trap: Trap | None = None, *, springs: bool = False) -> Iterator[dict[str, Any]]:
    """Batches that differ in the order of their examples; the trap is armed before the second, and may spring right there."""
    for number in range(BATCHES):
        if trap is not None and number == 1:
            trap.armed = True
            if springs:
                trap.spring()
        ids = [f"{number}-{row}" for row in range(ROWS)]
        yield {"id": ids, **{name: value.roll(number, 0) for name, value in inputs.items()}}


def _recorded(model: nn.Module, batches: Iterator[dict[str, Any]], path: Path, trap: Trap | None = None) -> Run:
    def loss(outputs: Any, entries: Any) -> Tensor:
        if trap is not None:
            trap.spring()
        return next(tensors(outputs)).flatten(1).square().sum(1)

    return record(model, batches, to=path, sites=SITES, ids="id", targets={"loss": loss}, mode="resume", durability="rename")


def standing(model: nn.Module) -> tuple[object, ...]:
    """Everything that recording changes for a while."""
    flags = tuple((module.training, *(parameter.requires_grad for parameter in module.parameters())) for module in model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    return hook_count(model), _len_torch_function_stack(), fast, AttentionInterface.get_interface, torch.is_grad_enabled(), flags


def _is_ours(thread: threading.Thread) -> bool:
    """Not one that zarr-python keeps for its own use."""
    return not thread.name.startswith(("zarr", "asyncio"))


def _differences(run: Run, reference: Run) -> Iterator[str]:
    if run.ids != reference.ids:
        yield f"the completed run holds {run.ids}"
        return
    for name, table in reference.tables.items():
        for short in (short for short in table if not short.startswith("start.")):  # which depends on the part
            if not same(run[f"{name}/{short}"].rows(), table[short].rows()):
                yield f"the completed run differs in {name}/{short}"
