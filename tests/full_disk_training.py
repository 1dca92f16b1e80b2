"""A training whose disk fills up: `python full_disk_training.py FOLDER KIBIBYTES ON_ERROR RESERVE` in a namespace of its own.

Prints, as JSON, the losses, what was raised, what was dropped and what the run holds.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from training_loop import SITES, Loop, model, optimizer_of, train

from tensortape.instrument import Recorder
from tensortape.stores import open_run
from tensortape.stores import writer as writer_module

STEPS = 12


def main() -> None:
    """Train on a small disk."""
    folder, size, on_error, reserve = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)], check=True)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    writer_module.RESERVE = reserve  # without it the disk is full in the middle of a write
    net, found = model(Loop()), dict[str, Any](losses=[], raised=None)
    optimizer = optimizer_of(net)
    options: Any = {"on_error": on_error, "memory_budget": 16 << 20, "commit_seconds": 0.0, "durability": "rename"}
    recorder = Recorder(net, sites=SITES, to=folder / "run.zarr", every=1, **options)
    try:
        for step in range(1, STEPS + 1):
            found["losses"] += train(Loop(), net, optimizer, range(step, step + 1), recorder).losses
    except OSError as error:
        found["raised"] = type(error).__name__
    found["steps"], found["dropped"] = recorder.steps, recorder.dropped
    try:
        recorder.close()
    except OSError as error:
        found["raised"] = type(error).__name__
    found |= {"ok": True, "recorded": [], "rows": []}
    if (folder / "run.zarr" / "zarr.json").exists():
        run = open_run(folder / "run.zarr")
        found |= {"ok": run.verify().ok, "recorded": sorted({step for _, _, step in run.keys}), "rows": run.steps["step"].tolist()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
