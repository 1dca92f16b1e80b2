"""Probes against scikit-learn called by hand, and baselines against plain counting."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tensortape.analyses import fit_probes
from tensortape.analyses.errors import LabelError
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


def test_accuracy_is_that_of_scikit_learn_on_the_same_split(run: Run) -> None:
    report = fit_probes(run, labels="token/tag", sites="resid_post", seed=3)
    (held_out,) = held_out_documents(run, report)
    x, y, _ = by_hand(run, [document for document in ("d0", "d1", "d2", "d3") if document != held_out])
    x_test, y_test, _ = by_hand(run, [held_out])
    scaler = StandardScaler().fit(x)
    expected = LogisticRegression(tol=1e-10, max_iter=1000).fit(scaler.transform(x), y).score(scaler.transform(x_test), y_test)
    assert report.scores[0].accuracy == pytest.approx(expected, abs=1e-12)
    assert report.scores[0].accuracy > 0.9


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
