"""Concept activation vectors against scikit-learn, captum and torch called by hand."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from concept_runs import SHIFT, cosine, pooled, topics, write_rows, write_topics
from safetensors.numpy import load_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from tensortape.analyses import CAV, CAVs, fit_cavs
from tensortape.analyses.divisions import random_sets
from tensortape.analyses.errors import CAVError, LabelError
from tensortape.analyses.splits import split
from tensortape.stores import Run
from tensortape.stores.errors import GradientError, UnknownColumnError

EXAMPLES = 101


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_topics(tmp_path_factory.mktemp("concepts") / "run.zarr", seed=0)


def fitted(run: Run, **more: Any) -> CAV:
    return fit_cavs(run, concepts="example/topic=net", test_share=0, null=0, **more)["topic=net", "layers.1:out"]


# --- the vectors -----------------------------------------------------------------------------------------------------------------


def test_logistic_is_that_of_scikit_learn(run: Run) -> None:
    x, y = pooled(run), topics(run) == "net"
    scaler = StandardScaler().fit(x)
    expected = LogisticRegression(tol=1e-10, max_iter=10_000).fit(scaler.transform(x), y)
    found = fitted(run, kind="logistic")
    assert cosine(found.vector, expected.coef_[0] / scaler.scale_) >= 0.9999
    assert found.raw_norm == pytest.approx(np.linalg.norm(expected.coef_[0] / scaler.scale_), rel=1e-3)
    margins = expected.decision_function(scaler.transform(x)) / found.raw_norm
    np.testing.assert_allclose(x @ found.vector + found.bias, margins, atol=1e-3)


@pytest.mark.parametrize("against", [None, "example/topic=mail"])
def test_lda_without_a_penalty_is_that_of_scikit_learn(run: Run, against: str | None) -> None:
    x, topic = pooled(run), topics(run)
    here = (topic == "net") | (topic == "mail") if against else np.ones(EXAMPLES, bool)
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit((x - SHIFT)[here], topic[here] == "net")
    found = fitted(run, kind="lda", strength=0, against=against)
    assert cosine(found.vector, expected.coef_[0]) >= 0.9999
    halfway = found.vector @ (x[topic == "net"].mean(0) + x[here & (topic != "net")].mean(0)) / 2
    assert found.bias == pytest.approx(-halfway, rel=1e-6)
    assert found.train_accuracy == np.mean((x @ found.vector > halfway)[here] == (topic == "net")[here])
    assert (found.concept_rows, found.against_rows) == ((topic == "net").sum(), here.sum() - (topic == "net").sum())


def test_lda_with_a_penalty_has_the_direction_of_ridge_regression(run: Run) -> None:
    x, y = pooled(run), topics(run) == "net"
    scaler = StandardScaler().fit(x)
    expected = Ridge(alpha=3.0).fit(scaler.transform(x), y).coef_ / scaler.scale_
    assert cosine(fitted(run, strength=3.0).vector, expected) >= 0.999999


def test_mean_difference(run: Run) -> None:
    x, y = pooled(run), topics(run) == "net"
    difference = x[y].mean(0) - x[~y].mean(0)
    found = fitted(run, kind="mean_difference")
    assert cosine(found.vector, difference) >= 0.999999
    assert found.raw_norm == pytest.approx(np.linalg.norm(difference), rel=1e-4)
    assert found.bias == pytest.approx(-found.vector @ (x[y].mean(0) + x[~y].mean(0)) / 2, rel=1e-6)


def test_mean_gradient_is_the_mean_of_what_was_recorded(run: Run) -> None:
    found = fitted(run, kind="mean_gradient", target="logit")
    slopes = np.stack([rows.astype(np.float64).sum(0) for rows in run["layers.1:out.grad@logit"][:]])
    expected = slopes[topics(run) == "net"].mean(0)
    np.testing.assert_allclose(found.vector * found.raw_norm, expected, rtol=1e-5, atol=1e-6)
    assert np.isnan([found.bias, found.accuracy, found.auc]).all()
    assert found.target == "logit"


@pytest.mark.parametrize("kind", ["lda", "logistic", "mean_difference", "mean_gradient"])
def test_random_sets_are_fitted_as_the_concept_is(run: Run, kind: Any) -> None:
    """The vector of a random set is that of a concept whose labels are the set."""
    more = {"target": "logit"} if kind == "mean_gradient" else {}
    cavs = fit_cavs(run, concepts="example/topic=net", kind=kind, test_share=0, null=3, seed=5, sites="resid_post[1]", **more)
    cav = next(iter(cavs))
    x, norms = pooled(run), np.linalg.norm(cav.null, axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    labels = (topics(run) == "net").astype(np.int8)
    sets, shuffled = random_sets(labels, np.arange(EXAMPLES), 3, 5)
    assert cav.shuffled == shuffled == EXAMPLES  # documents have rows of both sides, so that rows are shuffled
    for number in range(3):
        y = sets[:, 1 + number] == 1
        assert y.sum() == labels.sum()
        if kind == "mean_gradient":
            slopes = np.stack([rows.sum(0) for rows in run["layers.1:out.grad@logit"][:]])
            assert cosine(cav.null[number], slopes[y].mean(0)) >= 0.9999
        elif kind == "mean_difference":
            assert cosine(cav.null[number], x[y].mean(0) - x[~y].mean(0)) >= 0.9999
        else:
            again = with_label(run, f"random.{kind}.{number}", y)
            assert cosine(cav.null[number], fitted_to(again, f"random.{kind}.{number}", kind).vector) >= 0.9999


def test_whole_documents_are_shuffled_where_each_has_one_label() -> None:
    """So that a random set is of as many rows, and of all rows of its documents but those of one."""
    documents = np.repeat(np.arange(31), 3)
    labels = (documents % 4 == 0).astype(np.int8)
    labels[-3:] = -1
    sets, shuffled = random_sets(labels, documents, 17, seed=0)
    assert shuffled == 30
    assert np.array_equal(sets[:, 0], labels)
    assert (sets[-3:] == -1).all()
    assert ((sets == 1).sum(0) == (labels == 1).sum()).all()
    inside = np.stack([(sets[documents == document] == 1).mean(0) for document in range(30)])
    assert (((inside > 0) & (inside < 1)).sum(0) <= 1).all()
    assert len(np.unique(sets, axis=1).T) > 15


def with_label(run: Run, name: str, values: np.ndarray) -> Run:
    run.add_column(f"example/{name}", values.astype(np.int64))
    return run


def fitted_to(run: Run, name: str, kind: Any) -> CAV:
    return next(iter(fit_cavs(run, concepts=f"example/{name}", kind=kind, test_share=0, null=0, sites="resid_post[1]")))


# --- rows ------------------------------------------------------------------------------------------------------------------------


def test_accuracy_and_auc_are_of_documents_that_were_held_out(run: Run) -> None:
    cav = fit_cavs(run, concepts="example/topic=net", null=0, seed=3)["topic=net", "layers.1:out"]
    margins, y = pooled(run) @ cav.vector + cav.bias, topics(run) == "net"
    documents = np.array(run["example/document"].rows())
    cell = split(documents.tolist(), np.arange(EXAMPLES), test_share=0.25, folds=None, blocks=False, seed=3).of_row
    tested = cell < 0
    assert not set(documents[tested]) & set(documents[~tested])
    assert cav.accuracy == pytest.approx(np.mean((margins > 0)[tested] == y[tested]))
    assert cav.train_accuracy == pytest.approx(np.mean((margins > 0)[~tested] == y[~tested]))
    assert cav.auc == pytest.approx(roc_auc_score(y[tested], margins[tested]))
    assert (cav.test_rows, cav.concept_rows) == (tested.sum(), y[~tested].sum())
    assert cav.auc > 0.8


@pytest.mark.parametrize("said", [{"net": "example/is_net"}, {"net": ("example/topic", "net")}, {"net": "example/topic=net"}])
def test_a_concept_is_a_class_or_a_column_of_truths(run: Run, said: Any) -> None:
    found = fit_cavs(run, concepts=said, null=0)["net", "layers.0:out"]
    assert np.array_equal(found.vector, fit_cavs(run, concepts="example/topic=net", null=0)["topic=net", "layers.0:out"].vector)


def test_against_as_many_random_rows(run: Run) -> None:
    found = fitted(run, against="random", seed=1)
    assert found.against_rows == found.concept_rows == (topics(run) == "net").sum()
    assert not np.array_equal(found.vector, fitted(run, against="random", seed=2).vector)


@pytest.mark.parametrize("pool", ["first", "last"])
def test_one_token_may_stand_for_all(run: Run, pool: Any) -> None:
    x, y = np.stack([rows[0 if pool == "first" else -1] for rows in run["layers.1:out"][:]]), topics(run) == "net"
    difference = x[y].mean(0, dtype=np.float64) - x[~y].mean(0, dtype=np.float64)
    assert cosine(fitted(run, kind="mean_difference", pool=pool).vector, difference) >= 0.9999


def test_rows_may_be_tokens(run: Run) -> None:
    x, early = run["layers.1:out"].rows().astype(np.float64), run["token/early"].rows() == 1
    cavs = fit_cavs(run, concepts="token/early", kind="mean_difference", test_share=0, null=2)
    assert cavs.level == "token"
    assert cavs["early", "layers.1:out"].concept_rows == early.sum()
    assert cosine(cavs["early", "layers.1:out"].vector, x[early].mean(0) - x[~early].mean(0)) >= 0.9999


def test_rows_without_a_label_are_on_no_side(run: Run) -> None:
    labels = np.where(np.arange(EXAMPLES) % 4 == 0, "", topics(run))
    run.add_column("example/partly", labels[: EXAMPLES - 9].tolist(), ids=run.ids[: EXAMPLES - 9])
    cav = fit_cavs(run, concepts="example/partly=net", test_share=0, null=0)["partly=net", "layers.0:out"]
    known = (labels != "") & (np.arange(EXAMPLES) < EXAMPLES - 9)
    assert cav.concept_rows == (labels[known] == "net").sum()
    assert cav.concept_rows + cav.against_rows == known.sum()


# --- scores and files ------------------------------------------------------------------------------------------------------------


def test_scores_of_another_run(run: Run, tmp_path: Path) -> None:
    cavs = fit_cavs(run, concepts=["example/topic=net", "example/topic=gui"], null=0)
    other = write_topics(tmp_path / "other.zarr", seed=8)
    found = cavs.score(other)
    for cav in cavs:
        expected = pooled(other, cav.site) @ cav.vector
        np.testing.assert_allclose(found.of(cav.concept, cav.site), expected, rtol=1e-6, atol=1e-4)
    assert found.to_pandas()["id"].tolist() == other.ids
    assert roc_auc_score(topics(other) == "net", found.of("topic=net", "layers.1:out")) > 0.8


def test_a_file_that_others_read(run: Run, tmp_path: Path) -> None:
    cavs = fit_cavs(run, concepts="example/topic=net", null=5)
    cavs.save(tmp_path / "cavs")
    assert CAVs.load(tmp_path / "cavs") == cavs
    arrays = load_file(tmp_path / "cavs.safetensors")
    assert np.array_equal(arrays["/cavs/topic=net/layers.1:out/vector"], cavs["topic=net", "layers.1:out"].vector)
    assert CAVs.load(tmp_path / "cavs").score(run) == cavs.score(run)


@pytest.mark.parametrize("kind", ["lda", "logistic"])
def test_the_same_bits_from_processes(run: Run, kind: Any) -> None:
    here = fit_cavs(run, concepts=["example/topic=net", "example/topic=gui"], kind=kind, null=3, keep=False)
    with ProcessPoolExecutor(2) as pool:
        assert (
            fit_cavs(run, concepts=["example/topic=net", "example/topic=gui"], kind=kind, null=3, keep=False, executor=pool) == here
        )


def test_what_is_kept_in_the_run_changes_nothing(run: Run) -> None:
    first = fit_cavs(run, concepts="example/topic=gui", null=3)
    assert (
        fit_cavs(run, concepts="example/topic=gui", null=3)
        == first
        == fit_cavs(run, concepts="example/topic=gui", null=3, keep=False)
    )


def test_the_table_and_the_plot(run: Run) -> None:
    cavs = fit_cavs(run, concepts=["example/topic=net", "example/topic=gui"], null=0)
    frame = cavs.to_pandas()
    assert list(zip(frame["concept"], frame["layer"], strict=True)) == [
        ("topic=net", 0), ("topic=gui", 0), ("topic=net", 1), ("topic=gui", 1),
    ]  # fmt: skip
    legend = cavs.plot().axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["topic=net", "topic=gui", "chance"]
    assert len(cavs.score(run).plot().axes[0].get_yticklabels()) == 4
    assert "held-out AUC" in repr(cavs)


# --- errors ----------------------------------------------------------------------------------------------------------------------


def test_a_class_that_there_is_not_lists_those_there_are(run: Run) -> None:
    with pytest.raises(LabelError, match="'example/topic=gui', 'example/topic=mail', 'example/topic=net'"):
        fit_cavs(run, concepts="example/topic=nett")


def test_a_column_of_classes_needs_one(run: Run) -> None:
    with pytest.raises(LabelError, match="name one of them, as in 'example/topic=gui'"):
        fit_cavs(run, concepts="example/topic")


def test_labels_of_tokens_are_none_of_examples(run: Run) -> None:
    with pytest.raises(LabelError, match="level='token'"):
        fit_cavs(run, concepts="token/early", level="example")


def test_a_concept_that_is_everything(run: Run) -> None:
    with pytest.raises(LabelError, match="rows of both"):
        fit_cavs(with_label(run, "all", np.ones(EXAMPLES)), concepts="example/all")


def test_a_concept_against_itself(run: Run) -> None:
    with pytest.raises(LabelError, match="rows in common"):
        fit_cavs(run, concepts="example/topic=net", against="example/is_net")


def test_a_site_without_a_difference(tmp_path: Path) -> None:
    flat = write_rows(tmp_path / "flat.zarr", np.ones((8, 3)), y=np.arange(8) % 2)
    with pytest.raises(CAVError, match=r"no direction at 'layers\.0:out'"):
        fit_cavs(flat, concepts="example/y", null=0)


def test_mean_gradients_need_a_target_and_no_other_kind_takes_one(run: Run) -> None:
    for more in ({"kind": "mean_gradient"}, {"target": "logit"}):
        with pytest.raises(CAVError, match="need each other"):
            fit_cavs(run, concepts="example/is_net", **more)


@pytest.mark.parametrize(
    "given",
    [{"kind": "svm"}, {"pool": "max"}, {"null": -1}, {"test_share": 1.0}, {"strength": -1.0}],
    ids=lambda given: next(iter(given)),
)
def test_options_that_are_none(run: Run, given: Any) -> None:
    with pytest.raises(CAVError, match=next(iter(given))):
        fit_cavs(run, concepts="example/is_net", **given)


def test_an_undeclared_reduction_is_refused(tmp_path: Path) -> None:
    undeclared = write_topics(tmp_path / "undeclared.zarr", seed=0, reduction=None)
    with pytest.raises(GradientError, match="assume='sum'"):
        fit_cavs(undeclared, concepts="example/is_net", kind="mean_gradient", target="logit")
    assert len(fit_cavs(undeclared, concepts="example/is_net", kind="mean_gradient", target="logit", assume="sum")) == 2


def test_names_and_widths_that_do_not_fit(run: Run) -> None:
    cavs = fit_cavs(run, concepts="example/is_net", null=0)
    first = next(iter(cavs))
    with pytest.raises(UnknownColumnError, match=r"layers\.7:out"):
        replace(cavs, cavs={"is_net/layers.7:out": replace(first, site="layers.7:out")}).score(run)
    with pytest.raises(CAVError, match="is it the same model"):
        replace(cavs, cavs={"is_net/layers.0:out": replace(first, vector=np.ones(3))}).score(run)
    with pytest.raises(CAVError, match=r"there are is_net/layers\.0:out"):
        cavs["is_net", "layers.3:out"]
