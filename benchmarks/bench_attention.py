"""Recording attention: what it costs beside output_attentions=True and TransformerLens' cached patterns.

Model and sizes are those of GPT-2 small, with random weights. Times are measured in turns in one process, the recorder's within one
recording, which commits when it does. Peak memory is that of a fresh process per competitor, above what it holds before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import clear, interleaved, needed, publish, ram_folder, spread
from transformers import GPT2Config, GPT2Model

from tensortape.instrument import Recorder
from tensortape.stores import open_run

LENGTHS = (512, 1024, 2048)
LAYERS, HEADS, WIDTH = 12, 12, 768
REPETITIONS = 7
Run = Callable[[Path], object]


def gpt2(implementation: str) -> GPT2Model:
    """GPT-2 small without its head, so that logits do not hide the attention."""
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(n_positions=max(LENGTHS), attn_implementation=implementation)).eval()


def tokens(length: int) -> dict[str, torch.Tensor]:
    """One example."""
    ids = torch.randint(0, 50000, (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bare(model: GPT2Model, batch: dict[str, torch.Tensor], folder: Path) -> None:
    """The forward alone."""
    model(**batch, use_cache=False)


def bare_and_write(model: GPT2Model, batch: dict[str, torch.Tensor], folder: Path) -> None:
    """The forward, and writing as many bytes as q and k of all layers have, to raw files."""
    model(**batch, use_cache=False)
    rows = np.ones((batch["input_ids"].numel(), WIDTH), np.float32)
    for number in range(2 * LAYERS):
        (folder / f"{number}.raw").write_bytes(rows.data)


def recorded(model: GPT2Model, batch: dict[str, torch.Tensor], folder: Path) -> None:
    """`attention` of every layer: queries, keys and which keys each query sees."""
    with Recorder(model, sites=["attention"], to=folder / "run.zarr", durability="rename") as recorder, recorder.batch(ids=[0]):
        model(**batch, use_cache=False)


class Recording:
    """A recording that goes on: what one more batch takes."""

    def __init__(self, model: GPT2Model, folder: Path) -> None:
        self._model = model
        self._recorder = Recorder(model, sites=["attention"], to=folder / "run.zarr", durability="rename")
        self._batches = 0

    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        """Record a batch."""
        with self._recorder.batch(ids=[self._batches]):
            self._model(**batch, use_cache=False)
        self._batches += 1

    def close(self) -> None:
        """Close the run."""
        self._recorder.close()


def output_attentions(model: GPT2Model, batch: dict[str, torch.Tensor], folder: Path) -> None:
    """The model's own weights, saved as they are."""
    found = model(**batch, use_cache=False, output_attentions=True).attentions
    for number, weights in enumerate(found):
        np.save(folder / f"{number}.npy", weights.numpy())


def cached_patterns(model: Any, batch: dict[str, torch.Tensor], folder: Path) -> None:
    """TransformerLens: run_with_cache of all patterns, saved."""
    _, cache = model.run_with_cache(batch["input_ids"], names_filter=lambda name: name.endswith("hook_pattern"), return_type=None)
    for number, weights in enumerate(cache.values()):
        np.save(folder / f"{number}.npy", weights.numpy())


def lens() -> Any:
    """A model of the same shape in TransformerLens."""
    transformer_lens = needed("transformer_lens")
    torch.manual_seed(0)
    config = transformer_lens.HookedTransformerConfig(
        n_layers=LAYERS, n_heads=HEADS, d_model=WIDTH, d_head=WIDTH // HEADS, n_ctx=max(LENGTHS), d_vocab=50257, act_fn="gelu_new"
    )
    return transformer_lens.HookedTransformer(config).eval()


COMPETITORS: dict[str, tuple[Callable[[], Any], Callable[..., None]]] = {
    "bare forward (sdpa)": (partial(gpt2, "sdpa"), bare),
    "bare forward, raw write": (partial(gpt2, "sdpa"), bare_and_write),
    "recorded attention": (partial(gpt2, "sdpa"), recorded),
    "output_attentions, saved": (partial(gpt2, "eager"), output_attentions),
    "TransformerLens patterns, saved": (lens, cached_patterns),
}


def times(length: int) -> dict[str, list[float]]:
    """Seconds of every competitor, in turns."""
    batch = tokens(length)
    with ram_folder() as folder, ram_folder() as kept, torch.no_grad():
        runs: dict[str, Callable[[], object]] = {
            name: partial(run, build(), batch, folder) for name, (build, run) in COMPETITORS.items()
        }
        recording = Recording(gpt2("sdpa"), kept)
        runs["recorded attention"] = partial(recording, batch)
        found = interleaved(runs, REPETITIONS, partial(clear, folder))
        recording.close()
        return found


def measure_memory(name: str, length: int) -> None:
    """In a process of its own: print bytes on disk and peak memory, both in bytes."""
    build, run = COMPETITORS[name]
    model, batch = build(), tokens(length)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        warm = tokens(8)
        bare(model, warm, Path(folder)) if isinstance(model, GPT2Model) else model(warm["input_ids"])
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak_bytes()
        run(model, batch, Path(folder))
        peak = peak_bytes() - before
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    print(json.dumps({"peak": peak, "stored": stored}))


def peak_bytes() -> int:
    """The largest memory the process has had, as Linux counts it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(name: str, length: int) -> dict[str, int]:
    """Bytes on disk and peak memory of one competitor."""
    found = subprocess.run([sys.executable, __file__, name, str(length)], capture_output=True, text=True, check=True)
    result: dict[str, int] = json.loads(found.stdout.splitlines()[-1])
    return result


def rebuilt(length: int) -> float:
    """Seconds to rebuild one layer's weights from a run."""
    batch = tokens(length)
    with ram_folder() as folder, torch.no_grad():
        recorded(gpt2("sdpa"), batch, folder)
        attention = open_run(folder / "run.zarr").attention(0)
        found = interleaved({"rebuilt": lambda: attention[0]}, REPETITIONS)["rebuilt"]
    return sorted(found)[REPETITIONS // 2]


def table(length: int) -> list[str]:
    """One length's rows."""
    formula = LAYERS * length * (WIDTH // HEADS) * 2 * HEADS * 4
    lines = ["| | seconds | of bare | MB on disk | MB peak | above bare |", "|---|---|---|---|---|---|"]
    forward = memory("bare forward (sdpa)", length)["peak"]
    taken = times(length)
    median = {name: sorted(seconds)[REPETITIONS // 2] for name, seconds in taken.items()}
    for name, seconds in median.items():
        held = memory(name, length)
        ratio = seconds / median["bare forward (sdpa)"]
        sizes = [f"{held['stored'] / 1e6:.1f}", f"{held['peak'] / 1e6:.0f}", f"{(held['peak'] - forward) / 1e6:.0f}"]
        lines.append(f"| {name} | {seconds:.3f} | {ratio:.2f} | {' | '.join(sizes)} |")
    cost = spread(a / b for a, b in zip(taken["recorded attention"], taken["bare forward, raw write"], strict=True))
    lines += [
        "",
        f"q and k by the crossover formula: {formula / 1e6:.1f} MB. Recorded against bare forward and raw write, in pairs: {cost}. "
        f"One layer's weights are rebuilt in {1e3 * rebuilt(length):.0f} ms.",
    ]
    return lines


def main() -> None:
    """Measure and publish; with arguments, one measurement of memory."""
    if len(sys.argv) > 1:
        measure_memory(sys.argv[1], int(sys.argv[2]))
        return
    sections = {f"GPT-2 small, 1 example, T = {length}, fp32": table(length) for length in LENGTHS}
    publish("attention", "Recording attention", sections)


if __name__ == "__main__":
    main()
