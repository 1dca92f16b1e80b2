"""Peak memory of recording, over an input and over one ten times as long."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from report import publish, ram_folder

BUDGET = 32 << 20
ROWS, WIDTH = 16, 128


def run_batches(folder: Path, batches: int, *, record: bool) -> float:
    """Run a small GPT-2 in this process, recording it or not; peak MiB of the process."""
    import resource

    import torch
    from transformers import GPT2Config, GPT2Model

    from tensortape.instrument import Recorder

    model = GPT2Model(GPT2Config(n_embd=128, n_layer=4, n_head=4, vocab_size=512)).eval()
    inputs = [torch.randint(0, 512, (ROWS, WIDTH)) for _ in range(batches)]
    with torch.no_grad():
        if record:
            with Recorder(
                model, sites=["resid_post"], to=folder / "run.zarr", durability="rename", memory_budget=BUDGET
            ) as recorder:
                for number, ids in enumerate(inputs):
                    with recorder.batch(ids=[f"{number}-{row}" for row in range(ROWS)]):
                        model(ids)
        else:
            for ids in inputs:
                model(ids)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_own_process(batches: int, *, record: bool) -> tuple[float, float]:
    """(peak MiB, MiB on disk) of the same in a fresh process, whose peak is its own."""
    with ram_folder() as folder:
        command = [sys.executable, __file__, "--folder", str(folder), "--batches", str(batches), *(["--record"] if record else [])]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return peak, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main() -> None:
    """Measure and publish, or run in a child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.folder:
        print(run_batches(options.folder, options.batches, record=options.record))
        return
    table = ["| batches | on disk, MiB | peak of the bare model, MiB | peak while recording, MiB | more |", "|---|---|---|---|---|"]
    for batches in (options.batches, 10 * options.batches):
        bare, (recorded, written) = in_own_process(batches, record=False)[0], in_own_process(batches, record=True)
        table.append(f"| {batches} | {written:.0f} | {bare:.0f} | {recorded:.0f} | {recorded - bare:.0f} |")
    publish(
        "memory", "Memory of recording", {f"Budget {BUDGET >> 20} MiB, 4 sites of [{ROWS} x {WIDTH}, 128] fp32 per batch": table}
    )


if __name__ == "__main__":
    main()
