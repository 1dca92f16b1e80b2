"""Drift and probes across the steps of a training, against plain numpy and against runs of one step alone."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import Executor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from shifted_runs import FAR, LENGTHS, WIDTH, site, states
from strategies import small_chunks

from tensortape.analyses import Drift, ProbeSteps, aligned, drift, fit_probes, probe_steps, similarity
from tensortape.analyses.errors import JoinError, LabelError, StepError
from tensortape.stores import Run, RunWriter, open_run

STEPS, LAYERS = (0, 3, 7, 20), 2
IDS = [f"e{number}" for number in range(len(LENGTHS))]
Values = dict[tuple[int, int], list[np.ndarray]]  # of a step and a layer, one array per example


def made() -> Values:
    """Rows that wander off from step to step, and turn at the last one."""
    found: Values = {}
    for layer in range(LAYERS):
        rng = np.random.default_rng(layer)
        now = np.concatenate(states(rng)).astype(np.float64)
        turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
        for step in STEPS:
            now = now @ turn if step == STEPS[-1] else now + rng.normal(size=now.shape) * (1 + layer)
            found[step, layer] = np.split(now.astype(np.float32), np.cumsum(LENGTHS)[:-1])
    found[3, 1][4][:] = 0  # an example of one row, which then has no direction
    return found


def write(path: Path, values: Values, steps: tuple[int, ...], *, order_of: dict[int, list[int]] | None = None) -> Run:
    """A run of a probe set, beside training steps of other tokens; each step in its own order."""
    rng = np.random.default_rng(9)
    tags = [["ab"[int(row[0] + row[FAR] - 3000 > 0)] for row in rows] for rows in values[0, 0]]
    tokens = [rng.integers(0, 7, length) for length in LENGTHS]
    with small_chunks(), RunWriter(path, durability="rename") as writer:
        for layer in range(LAYERS):
            writer.describe(f"token/layers.{layer}:out", site=site(layer))
        for step in steps:
            order = (order_of or {}).get(step, list(range(len(LENGTHS))))
            columns = {f"token/layers.{layer}:out": [values[step, layer][n] for n in order] for layer in range(LAYERS)}
            labels = {"token/tag": [tags[n] for n in order], "token/input_ids": [tokens[n] for n in order]}
            documents = {"example/document": [f"d{n // 2}" for n in order]}
            writer.append(ids=[IDS[n] for n in order], columns={**columns, **labels, **documents}, phase="probe", step=step)
            other = {name: [np.ones((3, WIDTH), np.float32)] for name in columns}
            other.update({"token/tag": [["a"] * 3], "token/input_ids": [[1, 2, 3]], "example/document": ["t"]})
            writer.append(ids=[f"t{step}"], columns=other, phase="train", step=step + 1)
    return open_run(path)


def joined(rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows).astype(np.float64)


def by_hand(now: np.ndarray, then: np.ndarray) -> list[float]:
    """Linear CKA (Kornblith et al., 2019, section 3), mean cosine, ratio of mean norms."""
    x, y = now - now.mean(0), then - then.mean(0)
    cka = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    sizes = np.linalg.norm(now, axis=1), np.linalg.norm(then, axis=1)
    here = (sizes[0] > 0) & (sizes[1] > 0)
    cosine = ((now * then).sum(1)[here] / (sizes[0] * sizes[1])[here]).mean()
    return [cka, cosine, sizes[0].mean() / sizes[1].mean()]


def measured(found: Drift) -> np.ndarray:
    """[site, step, against, measure]."""
    return np.stack([found.cka, found.cosine, found.norm_ratio], -1)


@pytest.fixture(scope="module")
def values() -> Values:
    return made()


@pytest.fixture(scope="module")
def run(values: Values, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The order of examples is another at each step."""
    order = {step: np.random.default_rng(step).permutation(len(LENGTHS)).tolist() for step in STEPS[1:]}
    return write(tmp_path_factory.mktemp("steps") / "run.zarr", values, STEPS, order_of=order)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and pieces, so that there is something to merge."""
    monkeypatch.setattr(aligned, "BLOCK_BYTES", 4 * 3 * WIDTH * 67)
    monkeypatch.setattr(aligned, "PIECE_BYTES", 4 * 3 * WIDTH * 150)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("reference", [None, 7])
def test_drift_is_what_numpy_says(run: Run, values: Values, reference: int | None) -> None:
    found = drift(run, reference=reference)
    for layer in range(LAYERS):
        rows = {step: joined(values[step, layer]) for step in STEPS}
        then = [by_hand(rows[step], rows[reference or 0]) for step in STEPS]
        before = [by_hand(rows[step], rows[last]) for last, step in pairwise(STEPS)]
        np.testing.assert_allclose(measured(found)[layer, :, 0], then, rtol=1e-5)
        np.testing.assert_allclose(measured(found)[layer, 1:, 1], before, rtol=1e-5)
    assert np.isnan(measured(found)[:, 0, 1]).all(), "no step is before the first"
    assert (found.steps.tolist(), found.reference, found.examples) == (list(STEPS), reference or 0, len(LENGTHS))
    assert found.rows.tolist() == [sum(LENGTHS)] * LAYERS
    assert found.cka[0, 3, 1] == pytest.approx(1, abs=1e-4), "a rotation leaves CKA as it is"
    assert found.cosine[0, 3, 1] < 0.9, "and turns the rows"


def test_a_table_of_sites_and_steps(run: Run, tmp_path: Path) -> None:
    found = drift(run, "resid_post", steps=[20, 3, 0])
    table = found.to_pandas()
    assert table["step"].tolist() == [0, 3, 20] * LAYERS
    assert table["site"].tolist() == ["layers.0:out"] * 3 + ["layers.1:out"] * 3
    assert table["layer"].tolist() == [0, 0, 0, 1, 1, 1]
    assert table["previous"].isna().tolist() == [True, False, False] * LAYERS
    np.testing.assert_array_equal(table["norm_ratio_previous"], found.norm_ratio[:, :, 1].ravel())
    assert Drift.load(found.save(tmp_path / "drift")) == found
    assert "2 sites over 3 steps, 0 to 20, from step 0: 11 examples" in repr(found)
    assert found.plot().get_size_inches()[0] > 4


def test_everyone_finds_the_same(run: Run, processes: Executor) -> None:
    assert drift(run, "resid_post[0]") == drift(run, "resid_post[0]", executor=processes)


def test_pooled_examples(run: Run, values: Values) -> None:
    found = drift(run, "resid_post[1]", level="example", steps=[0, 7])
    now, then = (np.stack([rows.mean(0, dtype=np.float64) for rows in values[step, 1]]) for step in (7, 0))
    np.testing.assert_allclose(measured(found)[0, 1, 0], by_hand(now, then), rtol=1e-5)


def test_sites_too_wide_for_the_formula_are_estimated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """From minibatches that are the same at every step; cosines and norms are of all rows all the same."""
    monkeypatch.setattr(similarity, "WIDEST", 3 * WIDTH - 1)
    estimated, formula = (drift(run, estimate=how, batches=6, batch_rows=35) for how in ("auto", "full"))
    assert (estimated.cka_error[:, 2, 0] > 0).all()
    assert np.isnan(formula.cka_error).all()
    np.testing.assert_allclose(estimated.cka[:, 1:], formula.cka[:, 1:], atol=0.1)
    np.testing.assert_array_equal(estimated.cosine, formula.cosine)
    assert "estimated" in repr(estimated)
    with pytest.raises(ValueError, match="estimate is one of"):
        drift(run, estimate="exact")  # type: ignore[arg-type]


def test_memory_does_not_grow_with_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligned, "BLOCK_BYTES", 4 * 3 * 61 * 100)
    monkeypatch.setattr(aligned, "PIECE_BYTES", 4 * 3 * 61 * 500)
    rng = np.random.default_rng(0)
    with RunWriter(tmp_path / "run.zarr", durability="rename") as writer:
        writer.describe("token/layers.0:out", site=site(0))
        for step in range(23):
            rows = [rng.normal(size=(1100, 61)).astype(np.float32) for _ in range(2)]
            writer.append(ids=["a", "b"], columns={"token/layers.0:out": rows}, phase="probe", step=step)
    run = open_run(tmp_path / "run.zarr", verify="off")

    def peak(steps: range) -> int:
        tracemalloc.start()
        drift(run, steps=steps)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(range(2))  # what is read once
    assert peak(range(23)) < 1.2 * peak(range(4)) < 23 * 2200 * 61 * 4 / 3


def test_a_step_at_which_training_has_blown_up(values: Values, tmp_path: Path) -> None:
    broken = {key: [rows.copy() for rows in some] for key, some in values.items()}
    broken[3, 0][2][1, 5] = np.nan
    found = drift(write(tmp_path / "run.zarr", broken, (0, 3, 7)))
    assert np.isnan(found.cka[0, 1]).all()
    assert np.isfinite(found.cka[0, [0, 2], 0]).all()
    assert np.isfinite(found.cka[1, 1]).all(), "the other site is whole"


def test_examples_that_a_step_lacks_are_left_out(values: Values, tmp_path: Path) -> None:
    order = {3: [4, 2, 9, 0], 7: [9, 2, 1, 0]}
    found = drift(write(tmp_path / "run.zarr", values, (0, 3, 7), order_of=order))
    now, then = (joined([values[step, 1][n] for n in (0, 2, 9)]) for step in (7, 0))
    np.testing.assert_allclose(measured(found)[1, 2, 0], by_hand(now, then), rtol=1e-5)
    assert found.examples == 3


def test_what_cannot_be_compared(run: Run, values: Values, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"no example of phase 'train' is recorded at each of the steps 1, 4, 8, 21.*probe set"):
        drift(run, phase="train")
    with pytest.raises(StepError, match=r"no example of phase 'valid'.*its phases are probe, train"):
        drift(run, phase="valid")
    with pytest.raises(StepError, match=r"at step 5; it has 0, 3, 7, 20"):
        drift(run, steps=[0, 5])
    with pytest.raises(StepError, match=r"at step 4; it has"):
        drift(run, reference=4)
    with pytest.raises(StepError, match="none asked for"):
        drift(run, steps=[])
    shorter = {key: [rows[:-1] if key[0] == 3 and len(rows) == 23 else rows for rows in some] for key, some in values.items()}
    with small_chunks(), RunWriter(tmp_path / "run.zarr", durability="rename") as writer:
        writer.describe("token/layers.0:out", site=site(0))
        for step in (0, 3):
            writer.append(ids=IDS, columns={"token/layers.0:out": shorter[step, 0]}, phase="probe", step=step)
    with pytest.raises(JoinError, match=r"'e0' has 23 rows at step 0 and 22 at step 3"):
        drift(open_run(tmp_path / "run.zarr"))


def test_probes_of_a_step_are_those_of_a_run_of_it_alone(run: Run, values: Values, tmp_path: Path) -> None:
    """In another order of examples, too: the split goes by the documents' names."""
    found = probe_steps(run, "token/tag", control=True, seed=2)
    assert (found.steps.tolist(), found.examples) == (list(STEPS), len(LENGTHS))
    for step, report in zip(STEPS, found.reports, strict=True):
        alone = write(tmp_path / f"{step}.zarr", values, (step,))
        expected = fit_probes(alone, labels="token/tag", control=True, seed=2, examples=alone.where(phase="probe"))
        assert report.sets == expected.sets
        for one, other in zip(report.scores, expected.scores, strict=True):
            assert (one.accuracy, one.control, one.low) == (other.accuracy, other.control, other.low)
            np.testing.assert_allclose(one.probe.weights, other.probe.weights, rtol=1e-3, atol=1e-4)
    assert found.accuracy("token/tag").shape == (len(STEPS), LAYERS)
    assert found.accuracy("token/tag")[0, 0] > 0.8 > found.accuracy("token/tag")[2, 1]


def test_a_table_and_a_picture_of_probes(run: Run, tmp_path: Path) -> None:
    found = probe_steps(run, ["token/tag", "token/input_ids"], "resid_post", steps=[7, 0], fit="lda", bootstrap=0)
    table = found.to_pandas()
    assert table["step"].tolist() == [0] * 4 + [7] * 4
    assert table["accuracy"].tolist() == [score.accuracy for report in found.reports for score in report.scores]
    assert ProbeSteps.load(found.save(tmp_path / "probes")) == found
    assert "token/tag: best" in repr(found)
    assert [axes.get_title() for axes in found.plot().axes[:2]] == ["token/tag", "token/input_ids"]


def test_probes_of_some_examples(run: Run, tmp_path: Path, values: Values) -> None:
    """Numbers, masks and draws of examples; of a baseline those with the same ids."""
    chosen = run.where(phase="probe", step=7)[:8]
    mask = np.isin(np.arange(len(run)), chosen)
    by_number, by_mask = (fit_probes(run, labels="token/tag", examples=one) for one in (chosen.tolist(), mask))
    assert by_number == by_mask
    assert by_number.sets[0].train_rows + by_number.sets[0].test_rows == run["token/tag"].lengths[chosen].sum()
    assert by_number.groups == "example/document"
    untrained = write(tmp_path / "run.zarr", values, (0,))
    ids = {run.ids[number] for number in chosen}
    beside = fit_probes(run, labels="token/tag", examples=chosen, baseline=untrained)
    same = [number for number, id_ in enumerate(untrained.ids) if id_ in ids]
    expected = fit_probes(untrained, labels="token/tag", examples=same)
    assert [score.random_init for score in beside.scores] == [score.accuracy for score in expected.scores]
    with pytest.raises(LabelError, match="none of those asked for"):
        fit_probes(run, labels="token/tag", examples=[])
