"""One reading for all statistics, with the same bits whoever computes them."""

from __future__ import annotations

import logging
import multiprocessing
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deadly import Deadly
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortape.analyses import Job, fit_probes, rows, sweep
from tensortape.analyses.gram import ClassSums, Gram, shift_of
from tensortape.analyses.rows import Merged, Rows
from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores.dtypes import Array

WIDTH = 131
SITE = {"path": "layers.0", "port": "out", "call": 1, "aliases": [["", "resid_post", 0, 1]], "layout": "example token ..."}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Rows in two parts, with two dimensions as language models have them: far from zero."""
    path = tmp_path_factory.mktemp("sweep") / "run.zarr"
    random = np.random.default_rng(0)
    for part in range(2):
        with RunWriter(path, mode="resume", durability="rename") as writer:
            writer.describe("token/layers.0:out", site=SITE) if part == 0 else None
            lengths = random.integers(150, 400, 30)
            states = [random.normal(size=(length, WIDTH)) for length in lengths]
            for rows_ in states:
                rows_[:, 3] += 3000
                rows_[:, 7] -= 800
            tags = [(rows_[:, 0] + random.normal(size=len(rows_)) > 0).astype(np.int64) for rows_ in states]
            writer.append(
                ids=[f"{part}.{number}" for number in range(30)],
                columns={
                    "token/layers.0:out": [rows_.astype(np.float32) for rows_ in states],
                    "token/tag": tags,
                    "token/input_ids": [random.integers(0, 40, length) for length in lengths],
                },
            )
    return open_run(path)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE_BYTES", 600_000)


class Serial(Executor):
    """Does everything at once, in the calling thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def whole(run: Run, **tags: Array) -> Rows:
    return Rows((run["layers.0:out"],), np.ones(len(run), bool), tags)


def bits(run: Run, executor: Executor | None) -> list[bytes]:
    source = whole(run, tag=run["token/tag"].rows().astype(np.int32))
    shift = shift_of(source.first_block())
    [[gram, classes]] = sweep([Job(source, (Gram(shift), ClassSums(shift, "tag", 2)))], executor)
    report = fit_probes(run, labels="token/tag", control=True, keep=False, executor=executor)
    probe = report.scores[0].probe
    return [array.tobytes() for array in (gram.outer, gram.total, classes.totals, probe.weights, probe.bias)]


@pytest.mark.usefixtures("small_pieces")
def test_all_executors_give_the_same_bits(run: Run) -> None:
    assert len(whole(run).pieces()) > 10
    expected = bits(run, Serial())
    assert bits(run, None) == expected
    with ThreadPoolExecutor(3) as threads:
        assert bits(run, threads) == expected
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        assert bits(run, processes) == expected


@pytest.mark.usefixtures("small_pieces")
def test_a_dask_cluster_gives_the_same_bits(run: Run) -> None:
    from distributed import Client, LocalCluster

    with LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster, Client(cluster) as client:
        assert bits(run, client.get_executor()) == bits(run, Serial())


@pytest.mark.usefixtures("small_pieces")
def test_sums_are_those_of_numpy(run: Run) -> None:
    x = run["layers.0:out"].rows().astype(np.float64)
    source = whole(run)
    [[found]] = sweep([Job(source, (Gram(shift_of(source.first_block())),))])
    assert found.count == len(x)
    np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-7, rtol=1e-7)
    np.testing.assert_allclose(found.covariance, np.cov(x.T, bias=True), atol=2e-6)
    raw = run["layers.0:out"].rows()
    unshifted = (raw.T @ raw) / len(raw) - np.outer(raw.mean(0), raw.mean(0))
    assert np.abs(unshifted - np.cov(x.T, bias=True)).max() > 0.1  # what the shift is for


@pytest.mark.usefixtures("small_pieces")
def test_a_sweep_goes_on_after_a_worker_was_killed(run: Run, tmp_path: Path) -> None:
    source, trap, notes = whole(run), tmp_path / "trap", tmp_path / "notes"
    job = Job(source, (Deadly(trap, 7000, notes),))
    [[expected]] = sweep([job])
    notes.unlink()
    trap.touch()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as processes, pytest.raises(BrokenProcessPool):
        sweep([job], processes, kept=run.derived)
    before = notes.read_text().split()
    with ProcessPoolExecutor(1, mp_context=spawn) as processes:
        [[found]] = sweep([job], processes, kept=run.derived)
    assert found.tobytes() == expected.tobytes()
    assert not set(notes.read_text().split()[len(before) :]) & set(before)  # nothing was read twice
    assert len(notes.read_text().split()) == len(source.pieces())
    run.derived.remove("deadly")


@pytest.mark.usefixtures("small_pieces")
def test_what_was_kept_is_not_computed_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = whole(run)
    gram = Gram(shift_of(source.first_block()), key="a gram of this test")
    [[first]] = sweep([Job(source, (gram,))], kept=run.derived)
    monkeypatch.setattr(Rows, "pieces", lambda _: pytest.fail("it was read again"))
    [[again]] = sweep([Job(source, (gram,))], kept=run.derived)
    assert again.outer.tobytes() == first.outer.tobytes()
    run.derived.remove("a gram of this test")


def test_a_damaged_number_is_computed_again(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    source = whole(run)
    gram = Gram(shift_of(source.first_block()), key="a gram to be damaged")
    [[first]] = sweep([Job(source, (gram,))], kept=run.derived)
    [file] = (Path(run.path) / "derived").iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        [[again]] = sweep([Job(source, (gram,))], kept=run.derived)
    assert again.outer.tobytes() == first.outer.tobytes()
    assert "not those that were written" in caplog.text
    run.derived.remove("a gram to be damaged")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), pool=st.sampled_from(["first", "last", "mean"]), share=st.sampled_from([0.02, 0.5, 1.0]))
def test_merged_and_wanted_rows_are_those_of_numpy(run: Run, seed: int, pool: Any, share: float) -> None:
    random = np.random.default_rng(seed)
    every = run["layers.0:out"].rows()
    cuts = np.unique(random.integers(0, len(every), 500))
    kept = random.random(len(cuts) - 1) < 0.8
    first, last = cuts[:-1][kept], cuts[1:][kept]
    wanted = random.random(len(first)) < share
    source = Rows(
        (run["layers.0:out"],), np.ones(len(run), bool), {"number": np.arange(len(first))}, wanted, Merged(first, last, pool)
    )
    found = [block for piece in source.pieces() for block in piece.blocks()]
    join = {"first": lambda part: part[0], "last": lambda part: part[-1], "mean": lambda part: part.mean(0)}[pool]
    expected = [join(every[a:b]) for a, b in zip(first[wanted], last[wanted], strict=True)]
    values = np.concatenate([block.values[0] for block in found]) if found else np.empty((0, WIDTH))
    np.testing.assert_allclose(values, np.array(expected).reshape(-1, WIDTH), rtol=1e-5, atol=1e-4)
    numbers = np.concatenate([block.tags["number"] for block in found]) if found else np.empty(0)
    assert numbers.tolist() == np.flatnonzero(wanted).tolist()
    assert [n for block in found for n in block.rows.tolist()] == numbers.tolist()
