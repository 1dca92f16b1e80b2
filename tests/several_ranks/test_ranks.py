"""Ranks of one job, as real processes that gloo connects: one run, whoever records and whoever dies."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from several_ranks import ranks

from tensortape.instrument import Recorder
from tensortape.instrument.errors import SessionError
from tensortape.stores import Run, open_run

LIMIT = 120  # seconds, after which ranks that hang are an error


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def launch(program: str, folder: Path, size: int, **options: Any) -> list[int]:
    """Run a program of `ranks.py` on so many ranks; the status of each."""
    command = [sys.executable, ranks.__file__, program, str(folder), str(size), str(free_port()), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads((folder / "statuses.json").read_text())
    assert all(status in (0, -signal.SIGKILL) for status in found), done.stderr
    return found


def returned(folder: Path, size: int) -> list[Any]:
    """What the program returned on each rank."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All batches in this process."""
    to, model = tmp_path_factory.mktemp("alone") / "run.zarr", ranks.Model()
    with Recorder(model, sites=ranks.SITES, to=to) as recorder:
        ranks.go(recorder, model, iter(ranks.batches()))
    return open_run(to)


def assert_same(folder: Path, alone: Run) -> Run:
    """The run is what one process records, however it lies on disk."""
    run = open_run(folder / "run.zarr")
    assert sorted(run.ids) == list(range(ranks.EXAMPLES))
    for table in alone.tables.values():
        for column in table.values():
            if not column.name.startswith("example/start."):
                for number, id_ in enumerate(run.ids):
                    np.testing.assert_array_equal(run[column.name][number], column[alone.ids.index(id_)])
    assert run.digest() == alone.digest()
    assert run.verify().ok
    return run


@pytest.mark.parametrize(("size", "wrapped"), [(2, False), (4, True)], ids=["2 ranks", "4 ranks under DDP"])
def test_ranks_write_one_run(tmp_path: Path, alone: Run, size: int, wrapped: bool) -> None:
    """Each a part of its own; batches that the sampler gave to two ranks are there once."""
    assert launch("every_rank", tmp_path, size, wrapped=wrapped) == [0] * size
    run = assert_same(tmp_path, alone)
    documents = [part.document for part in run.parts]
    assert sorted((document.rank, document.world_size) for document in documents) == [(rank, size) for rank in range(size)]
    assert len({document.session for document in documents}) == 1
    written = sum(part.examples for part in run.parts)
    if size == 4:  # 10 batches on 4 ranks make 12
        assert written > ranks.EXAMPLES


@pytest.mark.slow
def test_a_killed_rank_and_a_restart_with_fewer(tmp_path: Path, alone: Run) -> None:
    """The others finish; what the dead one had not committed is recorded by two ranks later, and nothing else is run."""
    assert launch("every_rank", tmp_path, 4, who=1, dies_at=2, commit_seconds=1e9) == [0, -signal.SIGKILL, 0, 0]
    run = open_run(tmp_path / "run.zarr")
    assert [part.closed for part in run.parts] == [part.document.rank != 1 for part in run.parts]
    missing = set(range(ranks.EXAMPLES)) - set(run.ids)
    assert {27, 28} <= missing <= {15, 16, 17, 27, 28}  # its third batch, and the second, which it had not been told is committed
    assert launch("every_rank", tmp_path, 2, mode="resume") == [0, 0]
    lacking = [numbers for numbers in ranks.batches() if missing & set(numbers)]
    assert sum(returned(tmp_path, 2)) == len(lacking)
    run = assert_same(tmp_path, alone)
    assert all(part.closed for part in run.parts)
    assert {part.document.world_size for part in run.parts} == {2, 4}
    assert launch("every_rank", tmp_path, 2, mode="resume") == [0, 0]
    assert returned(tmp_path, 2) == [0, 0]
    assert len(open_run(tmp_path / "run.zarr").parts) == len(run.parts)


def test_only_one_rank_records(tmp_path: Path) -> None:
    """Nothing waits for the others."""
    assert launch("one_rank", tmp_path, 2) == [0, 0]
    assert open_run(tmp_path / "run.zarr").ids == list(range(2 * ranks.BATCH))


def test_recordings_one_after_another(tmp_path: Path, alone: Run) -> None:
    """All ranks overwrite the run once, not one another's; then resume it with nothing to do."""
    assert launch("one_after_another", tmp_path, 2) == [0, 0]
    run = assert_same(tmp_path, alone)
    assert len(run.parts) == 2
    aside = [path for path in tmp_path.iterdir() if ".old-" in path.name]
    assert len(aside) == 1
    assert open_run(aside[0]).digest() == alone.digest()


def test_processes_that_nothing_connects_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SessionError, match=r"process 1 of 3.*init_process_group.*session='"):
        Recorder(ranks.Model(), sites=ranks.SITES, to=tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()


def test_a_session_may_be_named_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or comes from torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, options in enumerate(({"session": "mine"}, {"session": "mine"})):
        monkeypatch.setenv("RANK", str(rank))
        model = ranks.Model()
        with Recorder(model, sites=ranks.SITES, to=tmp_path / "run.zarr", **options) as recorder, torch.no_grad():
            ranks.go(recorder, model, ranks.own_batches(rank, 2))
    run = open_run(tmp_path / "run.zarr")
    assert [(part.document.session, part.document.rank) for part in run.parts] == [("mine", 0), ("mine", 1)]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    recorder = Recorder(ranks.Model(), sites=ranks.SITES, to=tmp_path / "other.zarr")
    assert recorder.writer._session == "job.3"
    recorder.close()


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[list[float]]]:
    """The same training in one process, on the batches of both ranks."""
    to, model = tmp_path_factory.mktemp("trained") / "run.zarr", ranks.Model()
    sites = [f"param.blocks.{block}.up.weight.{kind}" for block in (0, 1) for kind in ("grad", "clipped", "update")]
    with Recorder(model, sites=["blocks.1", *sites], to=to, every=2) as recorder:
        ranks.trained(model, recorder, [0, 1], range(4))
    return open_run(to), [parameter.detach().flatten().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_train(tmp_path: Path, trained_alone: tuple[Run, list[list[float]]], how: str) -> None:
    """Gradients are those of the whole job: before clipping, after the ranks have exchanged theirs; shares add up to them."""
    assert launch("train_ranks", tmp_path, 2, how=how) == [0, 0]
    alone, weights = trained_alone
    for found in returned(tmp_path, 2):
        for mine, theirs in zip(found, weights, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-7)
    run = open_run(tmp_path / "run.zarr")
    assert run.steps[["step", "rank"]].values.tolist() == [[step, rank] for step in range(1, 5) for rank in (0, 1)]
    assert sorted({step for _, _, step in run.keys}) == [1, 3]
    table, expected = run.tables["step"], alone.tables["step"]
    for name in ("param.blocks.0.up.weight.grad", "param.blocks.1.up.weight.grad", "param.blocks.0.up.weight.update"):
        wanted = {
            step: expected[name][number] for number, step in enumerate(expected["step"].rows()) if expected[name].present[number]
        }
        for number in np.flatnonzero(table[name].present):
            np.testing.assert_allclose(table[name][int(number)], wanted[int(table["step"][int(number)])], rtol=1e-4, atol=1e-7)
        assert table[name].present.sum() == 4, "two steps on two ranks"
    for kind in ("grad", "clipped"):
        name = f"param.blocks.0.up.weight.{kind}"
        norms = run.steps.pivot(index="step", columns="rank", values=f"{name}|norm").loc[[1, 3]].to_numpy()
        of_all = [np.linalg.norm(expected[name][number]) for number in range(2)]
        np.testing.assert_allclose(np.sqrt((norms**2).sum(1)) if how == "fsdp" else norms[:, 0], of_all, rtol=1e-4)
        assert how == "fsdp" or (norms[:, 0] == norms[:, 1]).all()
    assert run.verify().ok
