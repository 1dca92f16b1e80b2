"""Probes against scikit-learn called by hand, and baselines against plain counting."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score
from sklearn.preprocessing import LabelBinarizer, StandardScaler

from tensortape.analyses import ProbeReport, fit_probes
from tensortape.analyses.controls import control_labels
from tensortape.analyses.errors import LabelError, ResultFileError
from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores.errors import UnknownColumnError

EXAMPLES, FEATURES = 12, 5
SITE = {"path": "layers.0", "port": "out", "call": 1, "aliases": [["", "resid_post", 0, 1]], "layout": "example token ..."}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Labels that a direction of the features gives away, with some missing; documents of three examples each."""
    random = np.random.default_rng(0)
    lengths = random.integers(20, 40, EXAMPLES)
    states = [random.normal(size=(length, FEATURES)) for length in lengths]
    tags = [["" if random.random() < 0.1 else "ab"[int(row[0] + row[1] > 0)] for row in rows] for rows in states]
    with RunWriter(tmp_path / "run.zarr", durability="rename") as writer:
        writer.describe("token/layers.0:out", site=SITE)
        writer.append(
            ids=[f"e{number}" for number in range(EXAMPLES)],
            columns={
                "token/layers.0:out": [rows.astype(np.float32) for rows in states],
                "token/input_ids": [random.integers(0, 6, length) for length in lengths],
                "token/tag": tags,
                "token/constant": [np.zeros(length, np.int64) for length in lengths],
                "example/document": [f"d{number // 3}" for number in range(EXAMPLES)],
            },
        )
    return open_run(tmp_path / "run.zarr")


def by_hand(run: Run, documents: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and token types of the labelled tokens of some documents."""
    chosen = [number for number in range(len(run)) if run["example/document"][number] in documents]
    x, y, types = (np.concatenate([run[name][n] for n in chosen]) for name in ("layers.0:out", "token/tag", "token/input_ids"))
    return x[y != ""], y[y != ""], types[y != ""]


def held_out_documents(run: Run, report: object) -> list[str]:
    """The one document in four whose labelled tokens are as many as the report's test rows."""
    counts = {document: len(by_hand(run, [document])[1]) for document in ("d0", "d1", "d2", "d3")}
    return [document for document, count in counts.items() if count == report.sets[0].test_rows]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Five classes that overlap, of features of which two are far from zero; words of one to three tokens; a topic per example."""
    random = np.random.default_rng(1)
    lengths = random.integers(30, 60, 40)
    shift = np.zeros(11)
    shift[[2, 8]] = 3000, -800
    truth = random.normal(size=(11, 5))
    states = [random.normal(size=(length, 11)) for length in lengths]
    words = [np.sort(random.integers(0, length // 2, length)) - (random.random(length) < 0.05) for length in lengths]
    path = tmp_path_factory.mktemp("wide") / "run.zarr"
    with RunWriter(path, durability="rename") as writer:
        writer.describe("token/layers.0:out", site=SITE)
        writer.append(
            ids=list(range(40)),
            columns={
                "token/layers.0:out": [(rows + shift).astype(np.float32) for rows in states],
                "token/input_ids": [random.integers(0, 30, length) for length in lengths],
                "token/tag": [(rows @ truth + 3 * random.gumbel(size=(len(rows), 5))).argmax(1) for rows in states],
                "token/sign": [(rows[:, 2] + random.normal(size=len(rows)) > 0).astype(np.int64) for rows in states],
                "token/word": words,
                "example/topic": [["x", "y"][int(rows[:, 5].mean() > 0)] for rows in states],
                "example/document": [f"d{number // 2}" for number in range(40)],
            },
        )
    return open_run(path)


class Sides:
    """Rows of a run, cut into training and test as a report cut them, in float64."""

    def __init__(self, run: Run, report: ProbeReport, labels: str, seed: int) -> None:
        from tensortape.analyses.spaces import space
        from tensortape.analyses.splits import split

        rows = space(run, run.select("resid_post"), [run[labels]], None)
        parts = split(rows.groups(None), rows.owner, test_share=0.25, folds=None, blocks=False, seed=seed)
        x, y = run["layers.0:out"].rows().astype(np.float64), run[labels].rows()
        train = parts.of_row == 0
        documents = np.array(run["example/document"].rows())[rows.owner]
        assert not set(documents[train]) & set(documents[~train])
        assert (train.sum(), (~train).sum()) == (report.sets[0].train_rows, report.sets[0].test_rows)
        self.train, self.y, self.x_test, self.y_test = x[train], y[train], x[~train], y[~train]
        self.scaler = StandardScaler().fit(self.train)

    def objective(self, model: LogisticRegression) -> float:
        """What ours minimises, at scikit-learn's solution."""
        own = model.predict_log_proba(self.scaler.transform(self.train))[
            np.arange(len(self.y)), np.searchsorted(model.classes_, self.y)
        ]
        return float(-own.mean() + 0.5 * (model.coef_**2).sum() / len(self.y) / model.C)


@pytest.mark.parametrize("labels", ["token/tag", "token/sign"])
@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_exact_is_the_optimum_that_scikit_learn_finds(wide: Run, labels: str, strength: float) -> None:
    report = fit_probes(wide, labels=labels, strength=strength, seed=5)
    sides, score = Sides(wide, report, labels, 5), report.scores[0]
    model = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=5000).fit(sides.scaler.transform(sides.train), sides.y)
    assert score.probe.objective == pytest.approx(sides.objective(model), rel=1e-6)
    assert score.probe.objective - sides.objective(model) <= score.probe.gap
    assert score.probe.converged
    predicted = model.predict(sides.scaler.transform(sides.x_test))
    assert np.mean(score.probe.predict(sides.x_test) == predicted) >= 0.995
    assert score.accuracy == pytest.approx(model.score(sides.scaler.transform(sides.x_test), sides.y_test), abs=0.005)
    assert score.macro_f1 == pytest.approx(f1_score(sides.y_test, predicted, average="macro"), abs=0.01)
    expected = model.predict_log_proba(sides.scaler.transform(sides.x_test))[np.arange(len(sides.y_test)), sides.y_test]
    assert score.cross_entropy == pytest.approx(-expected.mean() / np.log(2), rel=1e-3)


def test_lda_predicts_what_scikit_learn_predicts(wide: Run) -> None:
    report = fit_probes(wide, labels="token/tag", fit="lda", seed=5)
    sides = Sides(wide, report, "token/tag", 5)
    model = LinearDiscriminantAnalysis(solver="lsqr").fit(sides.train, sides.y)
    assert (report.scores[0].probe.predict(sides.x_test) == model.predict(sides.x_test)).all()
    assert report.scores[0].accuracy == model.score(sides.x_test, sides.y_test)


def test_ridge_has_the_weights_of_scikit_learn(wide: Run) -> None:
    report = fit_probes(wide, labels="token/tag", fit="ridge", strength=7.0, seed=5)
    sides = Sides(wide, report, "token/tag", 5)
    targets = LabelBinarizer(neg_label=-1).fit_transform(sides.y)
    model = Ridge(alpha=7.0).fit(sides.scaler.transform(sides.train), targets)
    probe = report.scores[0].probe
    np.testing.assert_allclose(probe.weights * sides.scaler.scale_[:, None], model.coef_.T, atol=1e-5)
    np.testing.assert_allclose(probe.scores(sides.x_test), model.predict(sides.scaler.transform(sides.x_test)), atol=2e-3)


def test_an_online_code_has_the_length_that_scikit_learn_gives(wide: Run) -> None:
    """The bias is penalised there, so a constant feature stands for it; of standardised features of the whole training set."""
    from tensortape.analyses.spaces import space
    from tensortape.analyses.splits import split

    report = fit_probes(wide, labels="token/sign", mdl=True, seed=5)
    rows = space(wide, wide.select("resid_post"), [wide["token/sign"]], None)
    parts = split(rows.groups(None), rows.owner, test_share=0.25, folds=None, blocks=True, seed=5)
    x, y = wide["layers.0:out"].rows().astype(np.float64), wide["token/sign"].rows()
    scaled = StandardScaler().fit(x[parts.of_row >= 0]).transform(x)
    features = np.concatenate([scaled, np.ones((len(x), 1))], 1)
    bits = float((parts.of_row == parts.blocks[0]).sum())  # log2(2) each
    for done, block in enumerate(parts.blocks[1:], 1):
        known, new = np.isin(parts.of_row, parts.blocks[:done]), parts.of_row == block
        model = LogisticRegression(fit_intercept=False, tol=1e-10, max_iter=5000).fit(features[known], y[known])
        bits -= model.predict_log_proba(features[new])[np.arange(new.sum()), y[new]].sum() / np.log(2)
    score = report.scores[0]
    assert score.bits == pytest.approx(bits, rel=0.01)
    assert score.compression == pytest.approx((parts.of_row >= 0).sum() / bits, rel=0.01)
    assert len(parts.blocks) > 4


def test_folds_are_tested_once_each(wide: Run) -> None:
    report = fit_probes(wide, labels="token/tag", folds=4, fit="lda", seed=2)
    assert report.sets[0].test_rows == len(wide["token/tag"])
    from sklearn.model_selection import PredefinedSplit, cross_val_score

    from tensortape.analyses.spaces import space
    from tensortape.analyses.splits import split

    rows = space(wide, wide.select("resid_post"), [wide["token/tag"]], None)
    parts = split(rows.groups(None), rows.owner, test_share=0.25, folds=4, blocks=False, seed=2)
    model = LinearDiscriminantAnalysis(solver="lsqr")
    x, y = wide["layers.0:out"].rows().astype(np.float64), wide["token/tag"].rows()
    accuracies = cross_val_score(model, x, y, cv=PredefinedSplit(parts.of_row))
    assert report.scores[0].accuracy == pytest.approx(np.average(accuracies, weights=np.bincount(parts.of_row)), abs=1e-12)


def test_words_are_merged_from_their_tokens(wide: Run) -> None:
    """One row per run of equal numbers within an example, negative numbers left out; its label is that of its first token."""
    report = fit_probes(wide, labels="token/tag", level="token/word", pool="mean", fit="lda", seed=2)
    words = [
        (number, word, rows.index[0])
        for (number, _, word), rows in wide.tokens.assign(
            run=lambda frame: (frame.word.diff().ne(0) | frame.example.diff().ne(0)).cumsum()
        ).groupby(["example", "run", "word"])
        if word >= 0
    ]
    assert report.sets[0].train_rows + report.sets[0].test_rows == len(words)
    assert report.level == "token/word"
    assert fit_probes(wide, labels="token/tag", level="token/word", pool="first", fit="lda", seed=2) != report


def test_examples_are_pooled_for_labels_of_examples(wide: Run) -> None:
    report = fit_probes(wide, labels="example/topic", fit="ridge", strength=30.0, seed=4)
    assert report.level == "example"
    assert report.sets[0].train_rows + report.sets[0].test_rows == len(wide)
    assert report.sets[0].classes == ("x", "y")
    reduced = [wide["layers.0:out"][number].astype(np.float64).mean(0) for number in range(len(wide))]
    probe = report.scores[0].probe
    predicted = np.array(report.sets[0].classes)[probe.predict(np.array(reduced))]
    assert np.mean(predicted == np.array(wide["example/topic"].rows())) > 0.8


def test_a_control_task_gives_each_type_one_label(wide: Run) -> None:
    from tensortape.analyses.spaces import read_labels, space

    rows = space(wide, wide.select("resid_post"), [wide["token/tag"]], None)
    labels, types = read_labels(rows, wide["token/tag"]), rows.types()
    assert types is not None
    drawn = control_labels(labels, types, seed=3)
    assert all(len(set(drawn[types == kind].tolist())) == 1 for kind in set(types.tolist()))
    assert (drawn == control_labels(labels, types, seed=3)).all()
    assert (drawn != control_labels(labels, types, seed=4)).any()
    report = fit_probes(wide, labels="token/tag", control=True, seed=3)
    score = report.scores[0]
    assert score.selectivity == pytest.approx(score.accuracy - score.control)
    assert score.control < score.accuracy  # nothing about types is in these features


def test_several_sets_share_a_report(wide: Run) -> None:
    both = fit_probes(wide, labels=["token/sign", "token/tag"], control=True, seed=3, keep=False)
    alone = fit_probes(wide, labels="token/tag", control=True, seed=3, keep=False)
    assert [score.labels for score in both.scores] == ["token/sign", "token/tag"]
    assert both.scores[1].accuracy == pytest.approx(alone.scores[0].accuracy, abs=1e-3)
    assert both.sets[1] == alone.sets[0]


def test_an_untrained_model_is_reported_beside(wide: Run, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with RunWriter(tmp_path / "other.zarr", durability="rename") as writer:
        writer.describe("token/layers.0:out", site=SITE)
        noise = [random.normal(size=(length, 11)).astype(np.float32) for length in wide.tables["token"].lengths]
        names = ["token/tag", "token/input_ids", "example/document"]
        writer.append(ids=wide.ids, columns={"token/layers.0:out": noise, **{name: wide[name][:] for name in names}})
    report = fit_probes(wide, labels="token/tag", baseline=open_run(tmp_path / "other.zarr"), fit="lda")
    assert report.scores[0].random_init < 0.35 < report.scores[0].accuracy
    assert "random_init" in report.to_pandas()


def test_the_interval_is_a_bootstrap_over_documents(wide: Run) -> None:
    """Against scipy's, drawing documents."""
    from scipy.stats import bootstrap

    report = fit_probes(wide, labels="token/tag", fit="lda", seed=5, bootstrap=4000)
    sides, score = Sides(wide, report, "token/tag", 5), report.scores[0]
    right = score.probe.predict(sides.x_test) == sides.y_test
    from tensortape.analyses.spaces import space
    from tensortape.analyses.splits import split

    rows = space(wide, wide.select("resid_post"), [wide["token/tag"]], None)
    parts = split(rows.groups(None), rows.owner, test_share=0.25, folds=None, blocks=False, seed=5)
    documents = np.array(wide["example/document"].rows())[rows.owner][parts.of_row < 0]
    counts = [(right[documents == name].sum(), (documents == name).sum()) for name in sorted(set(documents.tolist()))]
    found = bootstrap(
        tuple(zip(*counts, strict=True)), lambda r, n, axis: r.sum(axis) / n.sum(axis), paired=True, method="percentile",
        n_resamples=4000, vectorized=True, rng=np.random.default_rng(0),
    )  # fmt: skip
    np.testing.assert_allclose((score.low, score.high), found.confidence_interval, atol=0.006)


def test_a_report_is_saved_and_loaded(wide: Run, tmp_path: Path) -> None:
    report = fit_probes(wide, labels=["token/sign", "token/tag"], control=True, mdl=True)
    assert ProbeReport.load(report.save(tmp_path / "probes")) == report
    assert {file.name for file in tmp_path.iterdir()} == {"probes.json", "probes.safetensors"}
    (tmp_path / "probes.json").write_text((tmp_path / "probes.json").read_text().replace("tensortape.analyses.", "os."))
    with pytest.raises(ResultFileError, match="none of ours"):
        ProbeReport.load(tmp_path / "probes")


def test_the_second_report_reads_no_more_for_its_sums(wide: Run) -> None:
    kept = fit_probes(wide, labels="token/tag", seed=9)
    assert list((Path(wide.path) / "derived").iterdir())
    assert fit_probes(wide, labels="token/tag", seed=9) == kept
    assert wide.verify().ok


def test_baselines_are_plain_counting(run: Run) -> None:
    report = fit_probes(run, labels="token/tag", seed=3)
    (held_out,) = held_out_documents(run, report)
    _, y, types = by_hand(run, [document for document in ("d0", "d1", "d2", "d3") if document != held_out])
    _, y_test, types_test = by_hand(run, [held_out])
    majority = Counter(y).most_common(1)[0][0]
    lookup = {kind: Counter(y[types == kind]).most_common(1)[0][0] for kind in set(types.tolist())}
    assert report.sets[0].majority == np.mean(y_test == majority)
    assert report.sets[0].type_lookup == np.mean(
        [lookup.get(kind, majority) == label for kind, label in zip(types_test, y_test, strict=True)]
    )


def test_documents_are_never_split(run: Run) -> None:
    for seed in range(5):
        assert len(held_out_documents(run, fit_probes(run, labels="token/tag", seed=seed))) == 1


def test_the_same_seed_gives_the_same_report(run: Run) -> None:
    assert fit_probes(run, labels="token/tag", seed=1) == fit_probes(run, labels="token/tag", seed=1, keep=False)


def test_the_table_has_a_row_per_site(run: Run) -> None:
    frame = fit_probes(run, labels="token/tag").to_pandas()
    assert frame["site"].tolist() == ["layers.0:out"]
    assert frame["layer"].tolist() == [0]


def test_the_plot_shows_probe_and_baselines(run: Run) -> None:
    axes = fit_probes(run, labels="token/tag").plot().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["linear probe", "type look-up", "majority class"]


def test_one_class_is_an_error(run: Run) -> None:
    with pytest.raises(LabelError, match="at least 2"):
        fit_probes(run, labels="token/constant")


def test_one_group_is_an_error(run: Run) -> None:
    run.add_column("example/all", ["same"] * EXAMPLES)
    with pytest.raises(LabelError, match="1 groups"):
        fit_probes(run, labels="token/tag", groups="example/all")


def test_unknown_labels_are_an_error_that_lists_the_known(run: Run) -> None:
    with pytest.raises(UnknownColumnError, match="token/nothing"):
        fit_probes(run, labels="token/nothing")


def test_sites_on_other_rows_than_the_labels(run: Run) -> None:
    """A sample of tokens has labels of its own; those of all tokens do not fit it."""
    name = "token.sample0.5.seed0/layers.0:out|sample0.5.seed0"
    lengths = run.tables["token"].lengths
    halves = [run["layers.0:out"][number][: length // 2] for number, length in enumerate(lengths)]
    tags = [run["token/tag"][number][: length // 2] for number, length in enumerate(lengths)]
    with RunWriter(run.path.with_name("sampled.zarr"), durability="rename") as writer:
        writer.describe(name, site={**SITE, "reduce": "sample0.5.seed0"})
        columns = {name: halves, "token.sample0.5.seed0/tag": tags, "token/tag": run["token/tag"][:]}
        writer.append(ids=run.ids, columns={**columns, "example/document": run["example/document"].rows()})
    sampled = open_run(run.path.with_name("sampled.zarr"))
    with pytest.raises(LabelError, match=r"give labels of 'token.sample0.5.seed0'"):
        fit_probes(sampled, labels="token/tag")
    report = fit_probes(sampled, labels="token.sample0.5.seed0/tag")
    assert report.sets[0].train_rows + report.sets[0].test_rows == sum(int((tag != "").sum()) for tag in map(np.asarray, tags))
    assert report.scores[0].accuracy > 0.9
