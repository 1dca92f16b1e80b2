"""Principal components and t-SNE against scikit-learn on all rows in memory."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from shifted_runs import FAR, LENGTHS, LOW, WIDTH, rows_of, site, states, write
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness
from threadpoolctl import threadpool_limits

from tensortape.analyses import Embedding2D, Projections, neuron_table, pca, rows, tsne
from tensortape.analyses.errors import LabelError, SizeError
from tensortape.stores import Run
from tensortape.stores.derived import Derived

SITES = ("layers.0:out", "layers.1:out")


@pytest.fixture(scope="module")
def recorded() -> list[list[np.ndarray]]:
    """Of two layers; the second has variances over ten orders of magnitude."""
    rng = np.random.default_rng(1)
    spread = [one * np.logspace(1, -4, WIDTH, dtype=np.float32) for one in states(rng)]
    return [states(rng), spread]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("projection")


@pytest.fixture
def run(recorded: list[list[np.ndarray]], tmp_path: Path) -> Run:
    columns: dict[str, object] = {f"token/{name}": values for name, values in zip(SITES, recorded, strict=True)}
    columns["token/tag"] = [["" if at % 5 == 0 else "xyz"[at % 3] for at in range(length)] for length in LENGTHS]
    columns["token/word"] = [np.arange(length) // 3 for length in LENGTHS]
    return write(tmp_path / "run.zarr", columns, {f"token/{name}": site(layer) for layer, name in enumerate(SITES)})


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces, so that there is something to merge."""
    monkeypatch.setattr(rows, "PIECE_BYTES", 1024)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("number", [0, 1])
def test_components_are_those_of_scikit_learn(run: Run, recorded: list[list[np.ndarray]], number: int) -> None:
    x, count = rows_of(recorded[number]), 6
    found = pca(run, components=count).sites[number]
    expected = PCA(count, svd_solver="full").fit(x)
    np.testing.assert_allclose(found.variances, expected.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(found.explained, expected.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose((found.mean - x.mean(0)) / x.std(0).clip(1e-9), 0, atol=1e-6)
    angles = np.linalg.svd(found.components @ expected.components_.T)[1]
    assert np.sqrt(np.maximum(1 - angles.min() ** 2, 0)) < 1e-4
    np.testing.assert_allclose(found.components, expected.components_, atol=1e-4)
    assert (found.rows, found.layer, found.name) == (len(x), number, f"resid_post {number}")


@pytest.mark.usefixtures("pieces")
def test_coordinates_are_those_of_scikit_learn(run: Run, recorded: list[list[np.ndarray]]) -> None:
    """Of the rows that are drawn, and of any others; two features far from zero cost no digits."""
    found = pca(run, components=4, sample=37, seed=5)
    x = rows_of(recorded[0])
    assert (abs(x.mean(0)[FAR]) > 2000, abs(x.mean(0)[LOW]) > 700) == (True, True)
    expected = PCA(4, svd_solver="full").fit(x).transform(x)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.of(SITES[0]).scores, expected[found.sample.rows], atol=1e-4 * scale)
    np.testing.assert_allclose(found.of(SITES[0]).transform(rows_of(recorded[0])), expected, atol=1e-6 * scale)
    np.testing.assert_allclose(found.of(SITES[0]).transform(np.concatenate(recorded[0])), expected, atol=1e-4 * scale)


def test_rows_that_are_shown_have_a_label(run: Run) -> None:
    sample = pca(run, labels="token/tag", sample=1000).sample
    tags = run["token/tag"].rows()
    assert sample.rows.tolist() == np.flatnonzero(tags != "").tolist()
    assert [sample.classes[number] for number in sample.of_row] == tags[sample.rows].tolist()  # type: ignore[union-attr]
    np.testing.assert_array_equal(sample.examples, np.repeat(np.arange(len(LENGTHS)), LENGTHS)[sample.rows])


def test_rows_may_be_words_and_examples(run: Run, recorded: list[list[np.ndarray]]) -> None:
    means = np.array([one.mean(0, dtype=np.float64) for one in recorded[1]])
    found = pca(run, SITES[1], components=3, level="example").sites[0]
    # Averages are taken in float32, which costs those of the feature far from zero its last digits.
    np.testing.assert_allclose(found.variances, PCA(3, svd_solver="full").fit(means).explained_variance_, rtol=1e-3)
    assert pca(run, SITES[1], level="token/word").sites[0].rows == sum(-(-length // 3) for length in LENGTHS)


@pytest.mark.usefixtures("pieces")
def test_every_executor_gives_the_same_bits(run: Run, processes: Executor) -> None:
    expected = pca(run, labels="token/tag", keep=False)
    with ThreadPoolExecutor(3) as threads:
        assert pca(run, labels="token/tag", keep=False, executor=threads) == expected
    assert pca(run, labels="token/tag", keep=False, executor=processes) == expected


def test_sums_are_kept_in_the_run(run: Run) -> None:
    """Other components and labels need no second reading of the sums."""
    first = pca(run, components=3)
    with mock.patch.object(Derived, "save", side_effect=AssertionError("computed again")):
        again = pca(run, components=5, labels="token/tag")
    np.testing.assert_allclose(again.sites[0].variances[:3], first.sites[0].variances, rtol=1e-12)


def test_more_components_than_features(run: Run) -> None:
    with pytest.raises(SizeError, match="give 1 to 13"):
        pca(run, components=WIDTH + 1)


def test_results_are_saved_and_loaded(run: Run, tmp_path: Path) -> None:
    found = pca(run, labels="token/tag", components=2)
    assert Projections.load(found.save(tmp_path / "pca")) == found
    assert found.to_pandas().shape == (4, 6)


def test_pictures_say_what_they_show(run: Run) -> None:
    figure = pca(run, labels="token/tag").plot()
    assert [axes.get_title() for axes in figure.axes] == ["resid_post 0", "resid_post 1"]
    assert figure.axes[0].get_xlabel().startswith("component 1 (")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y", "z"]


def test_a_single_component_is_drawn_too(run: Run) -> None:
    assert len(pca(run, components=1).plot().axes) == 2


# --- t-SNE ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups(folder: Path) -> Run:
    """Three far groups of rows."""
    rng = np.random.default_rng(2)
    kind = [np.arange(length) % 3 for length in LENGTHS]
    values = [20 * np.eye(3, WIDTH)[of] + rng.normal(size=(len(of), WIDTH)) for of in kind]
    columns = {f"token/{SITES[0]}": [one.astype(np.float32) for one in values], "token/kind": kind}
    return write(folder / "groups.zarr", columns, {f"token/{SITES[0]}": site(0)})


def test_tsne_is_that_of_scikit_learn(groups: Run) -> None:
    with threadpool_limits(1):
        found = tsne(groups, "resid_post", labels="token/kind", sample=101, perplexity=11, components=5, seed=3)
        scores = pca(groups, components=5, sample=101, labels="token/kind", seed=3).sites[0].scores
        expected = TSNE(perplexity=11, init="pca", random_state=3).fit(scores)
    np.testing.assert_array_equal(found.xy, expected.embedding_)
    assert found.kl == expected.kl_divergence_
    x = groups[SITES[0]].rows()[found.sample.rows]
    assert trustworthiness(x, found.xy) > 0.85
    centres = np.array([found.xy[found.sample.of_row == number].mean(0) for number in range(3)])
    nearest = ((found.xy[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (nearest == found.sample.of_row).all()
    assert found.plot().axes[0].get_title() == "t-SNE of layers.0:out (perplexity 11)"
    assert found.to_pandas()["token/kind"].tolist() == groups["token/kind"].rows()[found.sample.rows].astype(str).tolist()


def test_tsne_is_saved_and_loaded(groups: Run, tmp_path: Path) -> None:
    with threadpool_limits(1):
        found = tsne(groups, "resid_post", sample=20, perplexity=5)
    assert Embedding2D.load(found.save(tmp_path / "tsne")) == found


def test_a_perplexity_needs_more_rows(groups: Run) -> None:
    with pytest.raises(SizeError, match="a perplexity of 30 needs more rows than the 20"):
        tsne(groups, "resid_post", sample=20)


def test_an_empty_space_is_an_error(run: Run) -> None:
    run.add_column("token/early", [[0] * LENGTHS[0]], ids=["e0"])
    run.add_column("example/late", ["y", "z"], ids=["e1", "e2"])
    with pytest.raises(LabelError, match="no example of the run has rows of all of"):
        neuron_table(run, SITES[0], "example/late", level="token/early")
