"""A Recorder in a loop with accelerate: prepared models, and its place in accelerate's checkpoints."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate_runs
import numpy as np
import pytest
import torch
from accelerate_runs import LAST, MICRO, Told, prepared, resumable, train
from tiny_models import hook_count
from trainer_runs import BATCH, SITES, probes

from tensortape.instrument import Recorder
from tensortape.stores import Run, open_run

KINDS: dict[str, dict[str, Any]] = {
    "accumulation": {},
    "checkpointing": {"checkpoints": True},
    "bf16": {"precision": "bf16"},
    "everything": {"precision": "bf16", "checkpoints": True},
}


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def last_of(loop: accelerate_runs.Loop, *given: Any) -> Told:
    *_, told = train(loop, LAST, *given)
    return told


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_training_does_not_notice_being_recorded(tmp_path: Path, kind: dict[str, Any]) -> None:
    """Losses, gradients and weights, bit for bit, with dropout: no random number is drawn differently."""
    bare = prepared(**kind)
    alone = last_of(bare)
    loop = prepared(**kind)
    with Recorder(loop.net, sites=SITES, to=tmp_path / "run.zarr", every=2, durability="rename") as recorder:
        told = last_of(loop, recorder, probes())
    assert alone.losses == told.losses
    assert all(map(same, alone.gradients, told.gradients))
    assert same(alone.weights, told.weights)
    assert hook_count(loop.net) == hook_count(bare.net)
    run, due = open_run(tmp_path / "run.zarr"), range(1, LAST + 1, 2)
    assert run.steps["step"].tolist() == list(range(1, LAST + 1))
    assert run.steps["loss"].tolist() == told.losses
    trained = [(id_, "train", step) for step in due for batch in told.ids[(step - 1) * MICRO : step * MICRO] for id_ in batch]
    probed = [(id_, "probe", step - 1) for step in due for id_ in (70_100, 70_101)]
    assert sorted(run.keys) == sorted(trained + probed)
    clipped = run.steps.set_index("step")["param.transformer.h.0.mlp.c_fc.weight.clipped|norm"].dropna()
    place = [name for name, _ in loop.net.named_parameters()].index("transformer.h.0.mlp.c_fc.weight")
    norms = [float(torch.linalg.vector_norm(told.gradients[step - 1][place])) for step in due]
    assert clipped.index.tolist() == list(due)
    np.testing.assert_allclose(clipped, norms, rtol=1e-6)
    assert run.verify().ok


def test_a_scaler_leaves_no_trace_in_gradients(tmp_path: Path) -> None:
    """As with mixed_precision="fp16" on a GPU."""
    runs = []
    for name, scaler in (("plain", None), ("scaled", torch.amp.GradScaler("cpu", init_scale=1024.0))):
        loop = prepared(scaler=scaler)
        sites = ["resid_post:out.grad", "param.**.c_fc.weight.grad"]
        with Recorder(loop.net, sites=sites, to=tmp_path / name, every=1, durability="rename") as recorder:
            next(train(loop, 1, recorder))
        runs.append(open_run(tmp_path / name))
    plain, scaled = runs
    gradients = [column.name for column in plain.sites] + [f"step/{name}" for name in plain.tables["step"] if "param" in name]
    assert len(gradients) == 6
    for name in gradients:
        np.testing.assert_array_equal(plain[name].rows(), scaled[name].rows())


def assert_same_runs(found: Run, expected: Run) -> None:
    assert sorted(found.keys) == sorted(expected.keys)
    for name in expected.steps:
        np.testing.assert_array_equal(found.steps[name], expected.steps[name])
    where = {key: number for number, key in enumerate(found.keys)}
    for column in expected.sites:
        for number in np.flatnonzero(column.present).tolist():
            np.testing.assert_array_equal(found[column.name][where[expected.keys[number]]], column[number])
    assert found.verify().ok


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Loading the state comes after the recorder was made. Every step once, of the trajectory that counts."""
    (tmp_path / "whole").mkdir()
    resumable(tmp_path / "whole")
    program, step = Path(accelerate_runs.__file__), random.randrange(1, LAST)
    environment = {**os.environ, "PYTHONPATH": str(program.parent)}
    ended = subprocess.run([sys.executable, program, tmp_path, str(step)], env=environment, capture_output=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    resumable(tmp_path)
    assert_same_runs(open_run(tmp_path / "run.zarr"), open_run(tmp_path / "whole" / "run.zarr"))


def test_ranks_have_one_checkpoint(tmp_path: Path) -> None:
    """Wrapped for several processes; saving the state commits on each of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(accelerate_runs.rank_of, (2, port, tmp_path, 3), nprocs=2)
    told = [torch.load(tmp_path / f"told-{rank}.pt") for rank in (0, 1)]
    assert same(told[0]["weights"], told[1]["weights"])
    run = open_run(tmp_path / "run.zarr")
    assert run.steps[["step", "rank"]].values.tolist() == [[step, rank] for step in (1, 2, 3) for rank in (0, 1)]
    assert run.steps["loss"].tolist() == [told[rank]["losses"][step] for step in range(3) for rank in (0, 1)]
    batches = [batch for rank in (0, 1) for number, batch in enumerate(told[rank]["ids"]) if number // MICRO in (0, 2)]
    assert sorted(run.ids) == sorted(id_ for batch in batches for id_ in batch)
    assert len(run.ids) == 2 * 2 * MICRO * BATCH
    place = torch.load(tmp_path / "state" / "custom_checkpoint_0.pkl")
    assert place == {"step": 3}
