"""What recording costs a training: steps that are not recorded, and steps that are, beside plain hooks with torch.save.

Steps are taken in turns in one process, each competitor on a model and an optimizer of its own, and compared step by step with the
bare training's of the same repetition.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from report import clear, interleaved, publish, ram_folder, sizes, spread
from transformers import GPT2Config, GPT2LMHeadModel

from tensortape.instrument import Recorder, Site

BARE = "bare training"
NEVER_DUE = [10**12]


class Training:
    """One training, a step at a time."""

    def __init__(self, layers: int, width: int, batch: int, tokens: int, recorder: Callable[[Any], Recorder | None]) -> None:
        torch.manual_seed(0)
        shape = {"n_layer": layers, "n_embd": width, "n_head": width // 64, "vocab_size": 8192, "n_positions": tokens}
        self.model = GPT2LMHeadModel(GPT2Config(**shape, use_cache=False))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.ids = torch.randint(8192, (batch, tokens))
        self.recorder = recorder(self.model)
        self.steps = 0

    def __call__(self) -> None:
        """A step."""
        names = range(self.steps * len(self.ids), (self.steps + 1) * len(self.ids))
        with self.recorder.batch(ids=names) if self.recorder else nullcontext():
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
            loss.backward()
        self.optimizer.step()
        if self.recorder:
            self.recorder.step(loss=loss, lr=1e-4)
        self.optimizer.zero_grad()
        self.steps += 1

    def turn(self, steps: int) -> None:
        """Some steps, and all that was recorded is in files."""
        for _ in range(steps):
            self()
        if self.recorder:
            self.recorder.commit()


class Saving(Training):
    """Plain hooks on the blocks, and a file per step."""

    def __init__(self, *shape: int, folder: Path) -> None:
        super().__init__(*shape, recorder=lambda model: None)
        self._folder = folder

    def __call__(self) -> None:
        """A step."""
        found: dict[str, torch.Tensor] = {}

        def keep(name: str, module: object, given: object, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).detach()

        handles = [block.register_forward_hook(partial(keep, f"h{n}")) for n, block in enumerate(self.model.transformer.h)]
        super().__call__()
        for handle in handles:
            handle.remove()
        torch.save(found, self._folder / f"{self.steps}.pt")


def against(times: dict[str, list[float]]) -> list[str]:
    """Seconds of each, and its ratio to the bare training, repetition by repetition; with the mean's standard error."""
    lines = ["| | s | of bare, median (middle half) | mean of ratios, and its standard error |", "|---|---|---|---|"]
    for name, seconds in times.items():
        ratios = [own / bare for own, bare in zip(seconds, times[BARE], strict=True)]
        error = float(np.std(ratios, ddof=1)) / len(ratios) ** 0.5
        lines.append(f"| {name} | {median(seconds):.4f} | {spread(ratios)} | {mean(ratios):.4f} +- {error:.4f} |")
    return lines


def main() -> None:
    """Measure and publish."""
    given = sizes(layers=4, width=256, batch=4, tokens=128, steps=300, turn=4, turns=12)
    shape = (given.layers, given.width, given.batch, given.tokens)
    sites = ["resid_post", "attention", "resid_post:out.grad", Site("param.**.grad", reduce="norm")]
    with ram_folder() as kept, ram_folder() as passing:

        def recorder(name: str, chosen: Any, every: Any) -> Callable[[Any], Recorder]:
            return lambda model: Recorder(model, sites=chosen, to=kept / f"{name}.zarr", every=every, durability="rename")

        idle = {
            BARE: Training(*shape, recorder=lambda model: None),
            "Recorder, no step due": Training(*shape, recorder=recorder("idle", sites, NEVER_DUE)),
            "bare training, once more": Training(*shape, recorder=lambda model: None),
        }
        steps = interleaved(idle, given.steps)
        busy = {
            BARE: Training(*shape, recorder=lambda model: None),
            "Recorder, resid_post": Training(*shape, recorder=recorder("resid", ["resid_post"], 1)),
            "hooks on the blocks, torch.save": Saving(*shape, folder=passing),
            "Recorder, resid_post, attention, gradients, norms of parameters": Training(*shape, recorder=recorder("all", sites, 1)),
        }
        turns = interleaved(
            {name: partial(one.turn, given.turn) for name, one in busy.items()}, given.turns, partial(clear, passing)
        )
        for one in [*idle.values(), *busy.values()]:
            if one.recorder:
                one.recorder.close()
    about = f"GPT-2 of {given.layers} layers, width {given.width}, batches of {given.batch} x {given.tokens}, AdamW"
    sections = {
        f"Steps that are not recorded: {given.steps} of each, in turns; {about}": against(steps),
        f"Steps that are recorded: turns of {given.turn} steps, {given.turns} of each, until all is in files; {about}": against(
            turns
        ),
    }
    publish("training", "Recording a training", sections, ["transformers"])


if __name__ == "__main__":
    main()
