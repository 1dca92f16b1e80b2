"""Recording resid_post of all layers: wall and CPU time beyond the bare forward, beside hooks, nnsight and TransformerLens.

The model has the shape of GPT-2 small and random weights. A turn is a few batches, and ends when what it captured is in files: for
a Recorder, with a commit. Others keep fewer promises: no checksums, no commits, no look at NaN, nothing but the tensors.

A forward takes so much more than recording it that CPU seconds beyond the forward drown in its own spread. So they are measured
once more around a hollow model, whose attention and MLPs return what they are given: what is recorded is as large as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import zarr
from report import clear, interleaved, needed, publish, ram_folder, sizes, spread
from torch import nn
from transformers import GPT2Config, GPT2Model

from tensortape.instrument import Recorder

BUDGET = 256 << 20  # 12 sites then have shards of 2048 rows, as many as a turn: its commit rewrites none
WIDTH, HEADS, VOCABULARY, CONTEXT = 768, 12, 50257, 1024
BARE, LENS_BARE = "bare forward", "TransformerLens, bare forward"

nnsight, transformer_lens = needed("nnsight"), needed("transformer_lens")

Batches = list[torch.Tensor]  # of token ids [batch, tokens]
Found = dict[str, torch.Tensor]
Turn = Callable[[Batches], None]
Build = Callable[[], Any]


def gpt2(layers: int) -> GPT2Model:
    """GPT-2 small without its head: logits would take more than what is recorded."""
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(n_layer=layers, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY, n_positions=CONTEXT)).eval()


def lens(layers: int) -> Any:
    """A model of the same shape in TransformerLens."""
    torch.manual_seed(0)
    shape = {"n_layers": layers, "n_heads": HEADS, "d_model": WIDTH, "d_head": WIDTH // HEADS, "n_ctx": CONTEXT}
    config = transformer_lens.HookedTransformerConfig(**shape, d_vocab=VOCABULARY, act_fn="gelu_new")
    return transformer_lens.HookedTransformer(config).eval()


def hollow(model: GPT2Model) -> GPT2Model:
    """The same, in which next to nothing is computed."""
    for block in model.h:
        block.attn.forward = lambda states, **_: (states, None)
        block.mlp.forward = lambda states: states
    return model


def hollow_lens(model: Any) -> Any:
    """The same in TransformerLens."""
    for block in model.blocks:
        block.attn.forward = lambda query_input, **_: query_input
        block.mlp.forward = lambda states: states
    return model


def bare(model: GPT2Model, batches: Batches) -> None:
    """The forward alone."""
    for ids in batches:
        model(input_ids=ids, use_cache=False)


def lens_bare(model: Any, batches: Batches) -> None:
    """The forward alone, without logits as well."""
    for ids in batches:
        model(ids, return_type=None)


class Recording:
    """A recording that goes on."""

    def __init__(self, model: GPT2Model, path: Path, *, background: bool) -> None:
        self._model = model
        self._recorder = Recorder(
            model, sites=["resid_post"], to=path, durability="rename", background=background, memory_budget=BUDGET
        )
        self._examples = 0

    def __call__(self, batches: Batches) -> None:
        """Record the batches, and commit."""
        for ids in batches:
            with self._recorder.batch(ids=range(self._examples, self._examples + len(ids))):
                self._model(input_ids=ids, use_cache=False)
            self._examples += len(ids)
        self._recorder.commit()

    def close(self) -> None:
        """Close the run."""
        self._recorder.close()


@contextmanager
def hooks(model: GPT2Model) -> Iterator[Found]:
    """Plain forward hooks on the blocks; what they found in the last forward."""
    found: Found = {}

    def keep(name: str, module: nn.Module, given: object, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output

    handles = [block.register_forward_hook(partial(keep, f"h{number}")) for number, block in enumerate(model.h)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def hooks_and_save(model: GPT2Model, folder: Path, batches: Batches) -> None:
    """A file per batch."""
    with hooks(model) as found:
        for number, ids in enumerate(batches):
            model(input_ids=ids, use_cache=False)
            torch.save(found, folder / f"{number}.pt")


def hooks_and_append(model: GPT2Model, group: zarr.Group, batches: Batches) -> None:
    """Arrays that grow by whole chunks, neither compressed nor sharded: what zarr-python appends fastest to."""
    with hooks(model) as found:
        for ids in batches:
            model(input_ids=ids, use_cache=False)
            for name, states in found.items():
                rows = states.flatten(0, 1).numpy()
                if name not in group:
                    group.create_array(name, shape=(0, WIDTH), chunks=rows.shape, dtype=rows.dtype, filters=None, compressors=None)
                group[name].append(rows)


def nnsight_and_save(wrapped: Any, folder: Path, batches: Batches) -> None:
    """A trace and a file per batch."""
    for number, ids in enumerate(batches):
        with wrapped.trace(input_ids=ids, use_cache=False):
            found = nnsight.save([block.output for block in wrapped.h])
        torch.save(found, folder / f"{number}.pt")


def lens_and_save(model: Any, folder: Path, batches: Batches) -> None:
    """run_with_cache and a file per batch."""
    for number, ids in enumerate(batches):
        _, cache = model.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_resid_post"), return_type=None)
        torch.save(dict(cache), folder / f"{number}.pt")


@contextmanager
def competitors(build: Build, build_lens: Build, kept: Path, passing: Path) -> Iterator[dict[str, Turn]]:
    """All of them; files that go on stay in `kept`, files of one turn lie in `passing`."""
    model, lens_model = build(), build_lens()
    recordings = {
        "Recorder": Recording(model, kept / "background.zarr", background=True),
        "Recorder, background=False": Recording(model, kept / "foreground.zarr", background=False),
    }
    yield {
        BARE: partial(bare, model),
        **recordings,
        "hooks, torch.save": partial(hooks_and_save, model, passing),
        "hooks, zarr-python append": partial(hooks_and_append, model, zarr.open_group(kept / "plain.zarr", mode="w")),
        "nnsight, torch.save": partial(nnsight_and_save, nnsight.NNsight(build()), passing),
        LENS_BARE: partial(lens_bare, lens_model),
        "TransformerLens, torch.save": partial(lens_and_save, lens_model, passing),
    }
    for recording in recordings.values():
        recording.close()


def wall_and_cpu() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds that passed, and seconds that all threads of the process have computed."""
    return np.array([perf_counter(), process_time()])


def measure(batches: Batches, repetitions: int, build: Build, build_lens: Build) -> dict[str, list[Any]]:
    """What each competitor's turns take."""
    with ram_folder() as kept, ram_folder() as passing, competitors(build, build_lens, kept, passing) as turns:
        runs = {name: partial(turn, batches) for name, turn in turns.items()}
        return interleaved(runs, repetitions, partial(clear, passing), wall_and_cpu)


def with_bare(times: dict[str, list[Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Each competitor's turns, paired with those of the bare forward of its own model."""
    for name, turns in times.items():
        yield name, list(zip(turns, times[LENS_BARE if name.startswith("TransformerLens") else BARE], strict=True))


def ratios(times: dict[str, list[Any]], batches: int, gigabytes: float) -> list[str]:
    """Wall time as a multiple of the bare forward's, and CPU seconds beyond it."""
    lines = ["| | s per batch | wall time of bare forward | CPU s per GB beyond it |", "|---|---|---|---|"]
    for name, pairs in with_bare(times):
        seconds = median(own[0] for own, _ in pairs) / batches
        ratio = spread(own[0] / base[0] for own, base in pairs)
        beyond = spread((own[1] - base[1]) / gigabytes for own, base in pairs)
        lines.append(f"| {name} | {seconds:.3g} | {ratio} | {beyond} |")
    return lines


def costs(times: dict[str, list[Any]], gigabytes: float) -> list[str]:
    """Seconds beyond the bare forward."""
    lines = ["| | CPU s per GB | wall s per GB |", "|---|---|---|"]
    for name, pairs in with_bare(times):
        wall, cpu = (spread((own[kind] - base[kind]) / gigabytes for own, base in pairs) for kind in (0, 1))
        lines.append(f"| {name} | {cpu} | {wall} |")
    return lines


@torch.no_grad()
def main() -> None:
    """Measure and publish."""
    size = sizes(layers=12, examples=4, tokens=128, batches=4, repetitions=4, hollow_repetitions=9)
    random = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, VOCABULARY, (size.examples, size.tokens), generator=random) for _ in range(size.batches)]
    gigabytes = size.layers * WIDTH * 4 * sum(ids.numel() for ids in batches) / 1e9
    build, build_lens = partial(gpt2, size.layers), partial(lens, size.layers)
    whole = measure(batches, size.repetitions, build, build_lens)
    alone = measure(batches, size.hollow_repetitions, lambda: hollow(build()), lambda: hollow_lens(build_lens()))
    turns = f"turns of {size.batches} batches of {size.examples} x {size.tokens} tokens, {gigabytes:.3f} GB"
    sections = {
        f"{size.layers} layers of {WIDTH}, fp32, CPU; {turns}": ratios(whole, size.batches, gigabytes),
        "Beyond the bare forward of a hollow model; the same turns": costs(alone, gigabytes),
    }
    publish("overhead", "Recording resid_post of all layers", sections, ("transformers", "nnsight", "transformer-lens"))


if __name__ == "__main__":
    main()
