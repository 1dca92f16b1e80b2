"""Peak memory of recording, over an input and over one ten times as long."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from report import publish, ram_folder

BUDGET = 64 << 20
ROWS, WIDTH = 16, 128


def record_batches(folder: Path, batches: int) -> dict[str, float]:
    """Record a small GPT-2 in this process; MiB above what the model and the first forward take."""
    import resource

    import torch
    from transformers import GPT2Config, GPT2Model

    from tensortape.instrument import Recorder

    model = GPT2Model(GPT2Config(n_embd=256, n_layer=6, n_head=4, vocab_size=512)).eval()
    with torch.no_grad():
        for _ in range(8):
            model(torch.zeros(ROWS, WIDTH, dtype=torch.long))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with Recorder(model, sites=["resid_post"], to=folder / "run.zarr", durability="rename", memory_budget=BUDGET) as recorder:
            for number in range(batches):
                with recorder.batch(ids=[f"{number}-{row}" for row in range(ROWS)]):
                    model(torch.randint(0, 512, (ROWS, WIDTH)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    return {"above": peak - before, "written": written}


def in_own_process(batches: int) -> dict[str, float]:
    """The same in a fresh process, whose peak is its own."""
    with ram_folder() as folder:
        command = [sys.executable, __file__, "--folder", str(folder), "--batches", str(batches)]
        found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found


def main() -> None:
    """Measure and publish, or record in a child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batches", type=int, default=16)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(record_batches(options.folder, options.batches)))
        return
    table = ["| batches | recorded MiB | peak above the bare model, MiB |", "|---|---|---|"]
    for batches in (options.batches, 10 * options.batches):
        found = in_own_process(batches)
        table.append(f"| {batches} | {found['written']:.0f} | {found['above']:.0f} |")
    publish(
        "memory", "Memory of recording", {f"Budget {BUDGET >> 20} MiB, 6 sites of [{ROWS} x {WIDTH}, 256] fp32 per batch": table}
    )


if __name__ == "__main__":
    main()
