"""CKA against its formula in numpy, and the minibatch estimate against that of Song et al., spelled out."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group
from shifted_runs import LENGTHS, rows_of, site, states, write

from tensortape.analyses import Similarity, aligned, cka
from tensortape.analyses.errors import JoinError, SizeError
from tensortape.analyses.gram import Gram, shift_of
from tensortape.analyses.hsic import Hsic
from tensortape.analyses.similarity import linear_cka
from tensortape.analyses.sweep import Block
from tensortape.stores import Run

WIDTHS = (13, 7, 19)
IDS = [f"e{number}" for number in range(len(LENGTHS))]


def formula(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. (2019), section 3: linear CKA of centred features."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. (2012), equation 5, as it is printed."""
    n, ones = len(k), np.ones(len(k))
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    last = 2 / (n - 2) * (ones @ k @ m @ ones)
    return float((np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2)) - last) / (n * (n - 3)))


def layers(seed: int = 0) -> list[list[np.ndarray]]:
    """Rows of three sites that have something in common; the first has two features far from zero."""
    rng = np.random.default_rng(seed)
    first = states(rng)
    others = [
        [(one @ rng_map / 50 + rng.normal(size=(len(one), width))).astype(np.float32) for one in first]
        for width in WIDTHS[1:]
        for rng_map in [rng.normal(size=(WIDTHS[0], width))]
    ]
    return [first, *others]


def recorded(path: Path, values: list[list[np.ndarray]], ids: list[str] = IDS) -> Run:
    columns = {f"token/layers.{layer}:out": one for layer, one in enumerate(values)}
    return write(path, columns, {f"token/layers.{layer}:out": site(layer) for layer in range(len(values))}, ids)


@pytest.fixture(scope="module")
def values() -> list[list[np.ndarray]]:
    return layers()


@pytest.fixture(scope="module")
def run(values: list[list[np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recorded(tmp_path_factory.mktemp("cka") / "run.zarr", values)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and pieces, so that there is something to merge."""
    monkeypatch.setattr(aligned, "BLOCK_BYTES", 4 * sum(WIDTHS) * 11)
    monkeypatch.setattr(aligned, "PIECE_BYTES", 4 * sum(WIDTHS) * 150)


@pytest.mark.usefixtures("pieces")
def test_cka_is_the_formula(run: Run, values: list[list[np.ndarray]]) -> None:
    found = cka(run)
    expected = [[formula(rows_of(x), rows_of(y)) for y in values] for x in values]
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-6)
    assert found.estimate == f"formula on all {sum(LENGTHS)} rows"
    assert (found.error, found.names) == (None, ("resid_post 0", "resid_post 1", "resid_post 2"))


@pytest.mark.usefixtures("pieces")
def test_two_runs_are_joined_by_key(run: Run, values: list[list[np.ndarray]], tmp_path: Path) -> None:
    """The second run has its examples in another order, one of its own, and lacks two."""
    order = [7, 0, 10, 3, 1, 5, 8, 2, 9]
    later = layers(seed=1)
    strange = np.ones((4, 1), np.float32)
    other = recorded(
        tmp_path / "other.zarr",
        [[*(one[number] for number in order), strange * np.ones(one[0].shape[1], np.float32)] for one in later[:2]],
        [*(IDS[number] for number in order), "strange"],
    )
    common = sorted(order)
    picked = [[rows_of([one[number] for number in common]) for one in two] for two in (values, later[:2])]
    expected = [[formula(x, y) for y in picked[1]] for x in picked[0]]
    found = cka(run, other=other, other_sites="resid_post")
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-6, atol=1e-9)
    assert (found.matrix.shape, found.joined, found.rows) == ((3, 2), True, len(picked[0][0]))
    estimated = cka(run, other=other, estimate="minibatch", batches=1, batch_rows=10**6)
    products = [[x @ x.T for x in map(centred, two)] for two in picked]
    own = [[hsic(k, k) for k in two] for two in products]
    across = np.array([[hsic(k, m) for m in products[1]] for k in products[0]])
    np.testing.assert_allclose(estimated.matrix, across / np.sqrt(np.outer(*own)), rtol=1e-6, atol=1e-9)


def test_pooled_examples_of_runs_with_other_tokens(run: Run, values: list[list[np.ndarray]], tmp_path: Path) -> None:
    """Two tokenizers: tokens cannot be compared, examples can."""
    shorter = recorded(tmp_path / "shorter.zarr", [[one[:-1] if len(one) > 1 else one for one in values[0]]])
    with pytest.raises(JoinError, match=r"'e0' has 23 rows in .* and 22 in .*level='example'"):
        cka(run, other=shorter)
    means = np.array([one.mean(0, dtype=np.float64) for one in values[1]])
    fewer = np.array([one[: max(len(one) - 1, 1)].mean(0, dtype=np.float64) for one in values[0]])
    found = cka(run, "resid_post[1]", shorter, other_sites="resid_post[0]", level="example")
    assert found.matrix[0, 0] == pytest.approx(formula(means, fewer), rel=1e-5)


def test_runs_without_common_examples(run: Run, values: list[list[np.ndarray]], tmp_path: Path) -> None:
    other = recorded(tmp_path / "foreign.zarr", values, [f"f{number}" for number in range(len(LENGTHS))])
    with pytest.raises(JoinError, match="no example"):
        cka(run, other=other)


def centred(x: np.ndarray) -> np.ndarray:
    return x - x.mean(0)


@pytest.mark.parametrize("kind", ["linear", "rbf"])
def test_the_estimate_is_the_ratio_of_mean_unbiased_hsic(kind: str) -> None:
    """Of two batches, with the kernels and the estimator spelled out."""
    rng = np.random.default_rng(4)
    batches = [rng.normal(size=(29, 8)) + 100 for _ in range(2)]
    found = [Hsic([5, 3], kind).init() for _ in batches]  # type: ignore[arg-type]
    for one, x in zip(found, batches, strict=True):
        one.update(Block((x,), np.arange(29), {}))
    found[0].merge(found[1])
    kernels = [[kernel(centred(part), kind) for part in (x[:, :5], x[:, 5:])] for x in batches]
    expected = [[[hsic(k, m) for m in two] for k in two] for two in kernels]
    np.testing.assert_allclose(found[0].finalize(), expected, rtol=1e-9)


def kernel(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "linear":
        return x @ x.T
    distances = np.linalg.norm(x[:, None] - x, axis=2)
    return np.exp(-(distances**2) / (2 * np.median(distances[np.triu_indices(len(x), 1)]) ** 2))


def test_the_estimate_comes_with_its_error(tmp_path: Path) -> None:
    """Twenty disjoint minibatches; the truth, known by construction, is within four errors of nearly all of several draws."""
    rng = np.random.default_rng(7)
    common = [rng.normal(size=(400, 3)).astype(np.float32) for _ in range(20)]
    noisy = [(one + rng.normal(size=one.shape)).astype(np.float32) for one in common]
    run = recorded(tmp_path / "many.zarr", [common, noisy], [f"e{number}" for number in range(20)])
    truth = 0.5  # covariances 1, 1 and 2 in each of the dimensions: 3 / (sqrt(3) sqrt(3 * 4))
    off = []
    for seed in range(5):
        found = cka(run, estimate="minibatch", batches=20, batch_rows=101, seed=seed)
        assert found.error is not None
        assert 0 < found.error[0, 1] < 0.05
        off.append(abs(found.matrix[0, 1] - truth) / found.error[0, 1])
    assert sorted(off)[3] < 4
    assert found.rows == 20 * 101
    assert found.estimate == "unbiased estimate from 20 minibatches of 101 rows"


def test_unrelated_sites_are_zero_only_in_the_unbiased_estimate(tmp_path: Path) -> None:
    """With few rows beside features the formula says 'alike' of noise (Murphy et al. 2024); the estimate does not."""
    rng = np.random.default_rng(8)
    noise = [[rng.normal(size=(5, 61)).astype(np.float32) for _ in LENGTHS] for _ in range(2)]
    run = recorded(tmp_path / "noise.zarr", noise)
    assert cka(run).matrix[0, 1] > 0.4
    assert abs(cka(run, estimate="minibatch", batches=1, batch_rows=55).matrix[0, 1]) < 0.1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(-6, 6), st.floats(-3000, 3000))
def test_rotation_scale_and_shift_change_nothing(seed: int, exponent: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(37, 5)), rng.normal(size=(37, 4))
    y += x[:, :4]
    turned = 10.0**exponent * (x @ ortho_group.rvs(5, random_state=rng)) + shift * 10.0**exponent
    assert of_arrays(turned, y) == pytest.approx(of_arrays(x, y), rel=1e-6)
    assert of_arrays(turned, x) == pytest.approx(1, rel=1e-6)
    assert 0 <= of_arrays(x, y) <= 1
    for kind in ("linear", "rbf"):
        assert estimated(turned, y, kind) == pytest.approx(estimated(x, y, kind), rel=1e-5, abs=1e-7)


def of_arrays(x: np.ndarray, y: np.ndarray) -> float:
    block = Block((np.concatenate([x, y], 1),), np.arange(len(x)), {})
    gram = Gram(shift_of(block)).init()
    gram.update(block)
    return float(linear_cka(gram.finalize(), [x.shape[1], y.shape[1]])[0, 1])


def estimated(x: np.ndarray, y: np.ndarray, kind: str) -> float:
    found = Hsic([x.shape[1], y.shape[1]], kind).init()  # type: ignore[arg-type]
    found.update(Block((np.concatenate([x, y], 1),), np.arange(len(x)), {}))
    own = found.finalize()[0]
    return float(own[0, 1] / np.sqrt(own[0, 0] * own[1, 1]))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("estimate", ["full", "minibatch"])
def test_every_executor_gives_the_same_bits(run: Run, estimate: str, processes: Executor) -> None:
    options = {"estimate": estimate, "batches": 5, "batch_rows": 31}
    expected = cka(run, **options)  # type: ignore[arg-type]
    with ThreadPoolExecutor(3) as threads:
        assert cka(run, executor=threads, **options) == expected  # type: ignore[arg-type]
    assert cka(run, executor=processes, **options) == expected  # type: ignore[arg-type]


def test_what_cannot_be_estimated(run: Run) -> None:
    with pytest.raises(SizeError, match="at least 4"):
        cka(run, estimate="minibatch", batch_rows=3)
    with pytest.raises(ValueError, match="estimate='full'"):
        cka(run, kind="rbf", estimate="full")


def test_wide_sites_are_estimated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensortape.analyses.similarity.WIDEST", sum(WIDTHS) - 1)
    assert cka(run, batch_rows=50).batches == sum(LENGTHS) // 50


def test_a_similarity_is_saved_shown_and_drawn(run: Run, tmp_path: Path) -> None:
    found = cka(run, "resid_post[0:2]")
    assert Similarity.load(found.save(tmp_path / "cka")) == found
    assert found.to_pandas()["cka"].tolist() == found.matrix.ravel().tolist()
    axes = found.plot().axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["resid_post 0", "resid_post 1"]
    assert "formula on all" in repr(found)
