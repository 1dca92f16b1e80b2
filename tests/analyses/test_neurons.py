"""Numbers of neurons against numpy and scikit-learn on all rows in memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from shifted_runs import CONSTANT, FAR, LENGTHS, LOW, WIDTH, rows_of, site, states, write
from sklearn.metrics import roc_auc_score

from tensortape.analyses import NeuronTable, neuron_table, rows
from tensortape.analyses.errors import LabelError
from tensortape.analyses.highest import Highest
from tensortape.analyses.ranks import Ranks, Sketch, sizes
from tensortape.analyses.sweep import Block
from tensortape.stores import Run
from tensortape.stores.errors import GradientError, UnknownColumnError

SITE = "layers.0:out"
TEXT = "the quick brown fox jumps over the lazy dog, again and again; "
CLASSES = "abc"


class Recorded:
    """What was recorded, in memory."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.states = states(rng)
        self.gradients = [rng.normal(size=rows.shape).astype(np.float32) for rows in self.states]
        self.x, self.g = rows_of(self.states), rows_of(self.gradients)
        every = np.array(["" if rng.random() < 0.1 else CLASSES[int(row[0] > 0) + int(row[1] > 1)] for row in self.x], object)
        self.tags = np.split(every, np.cumsum(LENGTHS)[:-1])
        self.labels = every
        # Tokens of three characters, with one between them that belongs to none.
        self.texts = [(TEXT * 4)[number : number + 4 * length] for number, length in enumerate(LENGTHS)]
        self.starts = [4 * np.arange(length, dtype=np.int32) for length in LENGTHS]
        self.ids = [rng.integers(0, 19, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture(scope="module")
def run(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Run:
    columns = {
        f"token/{SITE}": recorded.states,
        f"token/{SITE}.grad@loss": recorded.gradients,
        f"token/{SITE}.grad@guess": recorded.gradients,
        "token/input_ids": recorded.ids,
        "token/tag": [tags.tolist() for tags in recorded.tags],
        "token/word": [np.arange(length) // 2 for length in LENGTHS],
        "token/char.start": recorded.starts,
        "token/char.end": [starts + 3 for starts in recorded.starts],
        "example/text": recorded.texts,
        "example/topic": ["odd" if number % 2 else "even" for number in range(len(LENGTHS))],
    }
    sites = {
        f"token/{SITE}": site(0),
        f"token/{SITE}.grad@loss": site(0, "out.grad@loss", target={"name": "loss", "reduction": "sum"}),
        f"token/{SITE}.grad@guess": site(0, "out.grad@guess", target={"name": "guess", "reduction": None}),
    }
    return write(tmp_path_factory.mktemp("neurons") / "run.zarr", columns, sites)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces, so that there is something to merge."""
    monkeypatch.setattr(rows, "PIECE_BYTES", 1024)


def tabulate(run: Run, *arguments: object, **options: object) -> NeuronTable:
    return neuron_table(run, "resid_post", *arguments, **options)  # type: ignore[arg-type]


# --- distributions -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pieces")
def test_moments_are_those_of_numpy_however_far_from_zero(run: Run, recorded: Recorded) -> None:
    spread = tabulate(run, top=0).spread
    np.testing.assert_allclose(spread.mean, recorded.x.mean(0), rtol=1e-9, atol=1e-7)
    np.testing.assert_allclose(spread.deviation, recorded.x.std(0), rtol=1e-6)
    np.testing.assert_array_equal(spread.least, recorded.x.min(0))
    np.testing.assert_array_equal(spread.greatest, recorded.x.max(0))
    np.testing.assert_array_equal(spread.zero, (recorded.x == 0).mean(0))
    np.testing.assert_array_equal(spread.positive, (recorded.x > 0).mean(0))
    assert (spread.count, spread.deviation[CONSTANT]) == (sum(LENGTHS), 0)
    assert spread.mean[FAR] == pytest.approx(3000, abs=2)
    assert spread.mean[LOW] == pytest.approx(-800, abs=2)


@pytest.mark.usefixtures("pieces")
def test_quantiles_are_those_of_numpy_where_rows_fit(run: Run, recorded: Recorded) -> None:
    table = tabulate(run, shares=(0.0, 0.01, 0.3, 0.5, 0.9, 1.0), top=0)
    np.testing.assert_array_equal(table.quantiles, np.quantile(recorded.x, table.shares, axis=0, method="inverted_cdf"))
    assert table.rank_error == 0


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("memory", [8 << 10, 4 << 10, 2 << 10])
def test_sketched_quantiles_are_within_what_they_say(run: Run, recorded: Recorded, memory: int) -> None:
    table = tabulate(run, memory=memory, top=0)
    below = np.array([(recorded.x < values).mean(0) for values in table.quantiles])
    upto = np.array([(recorded.x <= values).mean(0) for values in table.quantiles])
    shares = np.array(table.shares)[:, None]
    assert 0 < table.rank_error < 0.5
    assert np.maximum(below - shares, shares - upto).max() <= table.rank_error


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_rank_is_off_by_more_than_a_sketch_says(data: st.DataObject) -> None:
    """Any values, sizes, and ways to cut and merge; weights add up to the rows."""
    size = data.draw(st.integers(2, 20))
    cuts = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=8))
    values = data.draw(arrays.arrays(np.float32, (sum(cuts), 2), elements=st.integers(-9, 9)))
    total = Sketch(size)
    for rows_ in np.split(values, np.cumsum(cuts)[:-1]):
        part = Sketch(size)
        part.add(rows_)
        total.merge(part)
    held, weights = total.weighted()
    assert weights.sum() == len(values)
    assert len(held) <= size * (len(total.levels) + 1)
    for threshold in range(-9, 10):
        known = (weights[:, None] * (held <= threshold)).sum(0)
        assert np.abs(known - (values <= threshold).sum(0)).max() <= total.error
    assert total.error > 0 or len(values) <= size or len(held) == len(values)


@pytest.mark.parametrize(("counts", "memory"), [([0, 7, 1000, 30], 4000), ([10**6], 10**5), ([500, 500, 500], 100_000)])
def test_sketches_share_the_memory(counts: list[int], memory: int) -> None:
    """What a small class leaves goes to the others; those that fit are exact."""
    found = sizes(counts, width=4, memory=memory)
    rooms = sum(
        min(count, size) if count <= size else size * (2 + np.log2(count / size)) for count, size in zip(counts, found, strict=True)
    )
    assert rooms <= 1.5 * memory / 4
    assert all(size >= count for count, size in zip(counts, found, strict=True) if count <= memory / 4 / len(counts))


def test_features_with_nan_are_not_numbers_and_spoil_no_other(tmp_path: Path, recorded: Recorded) -> None:
    bad = [rows_.copy() for rows_ in recorded.states]
    bad[2][5, 1] = np.nan
    broken = write(
        tmp_path / "nan.zarr", {f"token/{SITE}": bad, "token/tag": [t.tolist() for t in recorded.tags]}, {f"token/{SITE}": site(0)}
    )
    table = tabulate(broken, "token/tag", top=4)
    whole = np.arange(WIDTH) != 1
    assert table.selectivity is not None
    assert np.isnan([table.spread.mean[1], *table.quantiles[:, 1], *table.selectivity.auc[:, 1]]).all()
    expected = np.quantile(recorded.x, table.shares, axis=0, method="inverted_cdf")
    np.testing.assert_array_equal(table.quantiles[:, whole], expected[:, whole])
    assert table.ranked("deviation")[-1] == 1
    assert table.top is not None
    assert np.nanmax(rows_of(bad)[:, 1]) == table.top.values[1, 0]


# --- classes -------------------------------------------------------------------------------------------------------------------


def areas(x: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    kept = labels != ""
    return np.array([[roc_auc_score(labels[kept] == name, column[kept]) for column in x.T] for name in classes])


@pytest.mark.usefixtures("pieces")
def test_auc_is_that_of_scikit_learn(run: Run, recorded: Recorded) -> None:
    told = tabulate(run, "token/tag").selectivity
    assert told is not None
    np.testing.assert_allclose(told.auc, areas(recorded.x, recorded.labels, CLASSES), rtol=0, atol=1e-12)
    assert (told.auc_error == 0).all()
    assert told.rows.tolist() == [int((recorded.labels == name).sum()) for name in CLASSES]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("memory", [10 << 10, 6 << 10])
def test_sketched_auc_is_within_what_it_says(run: Run, recorded: Recorded, memory: int) -> None:
    told = tabulate(run, "token/tag", memory=memory).selectivity
    assert told is not None
    off = np.abs(told.auc - areas(recorded.x, recorded.labels, CLASSES)).max(1)
    assert (told.auc_error > 0).any()
    assert (off <= told.auc_error + 1e-12).all()


def test_differences_are_of_means_in_deviations(run: Run, recorded: Recorded) -> None:
    told = tabulate(run, "token/tag").selectivity
    assert told is not None
    for number, name in enumerate(CLASSES):
        mine = recorded.x[recorded.labels == name].mean(0)
        others = recorded.x[(recorded.labels != name) & (recorded.labels != "")].mean(0)
        unit = np.where(np.arange(WIDTH) == CONSTANT, 1, recorded.x.std(0))
        np.testing.assert_allclose(told.difference[number], (mine - others) / unit, atol=1e-6)


def test_probeless_is_the_sum_of_differences_of_means(run: Run, recorded: Recorded) -> None:
    """The published definition, spelled out."""
    told = tabulate(run, "token/tag").selectivity
    assert told is not None
    means = [recorded.x[recorded.labels == name].mean(0) for name in CLASSES]
    expected = abs(means[0] - means[1]) + abs(means[0] - means[2]) + abs(means[1] - means[2])
    np.testing.assert_allclose(told.probeless, expected, atol=1e-6)


def test_labels_of_examples_are_those_of_their_tokens(run: Run, recorded: Recorded) -> None:
    told = tabulate(run, "example/topic").selectivity
    assert told is not None
    labels = np.repeat(["odd" if number % 2 else "even" for number in range(len(LENGTHS))], LENGTHS)
    np.testing.assert_allclose(told.auc, areas(recorded.x, labels, ("even", "odd")), atol=1e-12)


# --- importance ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pieces")
def test_importance_is_mean_activation_times_gradient(run: Run, recorded: Recorded) -> None:
    found = tabulate(run, target="loss").attribution
    assert found is not None
    np.testing.assert_allclose(found.importance, np.abs(recorded.x * recorded.g).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.signed, (recorded.x * recorded.g).mean(0), rtol=1e-6, atol=1e-6 * recorded.x.std())


def test_gradients_of_an_undeclared_reduction_are_refused(run: Run) -> None:
    with pytest.raises(GradientError, match=r"recorder.target\(.*assume='sum'"):
        tabulate(run, target="guess")
    assumed = tabulate(run, target="guess", assume="sum").attribution
    declared = tabulate(run, target="loss").attribution
    assert assumed is not None
    assert declared is not None
    np.testing.assert_array_equal(assumed.importance, declared.importance)


def test_a_target_that_was_not_recorded(run: Run) -> None:
    with pytest.raises(UnknownColumnError, match="nothing"):
        tabulate(run, target="nothing")


def test_importance_of_pooled_rows_is_refused(run: Run) -> None:
    with pytest.raises(LabelError, match="leave out"):
        tabulate(run, target="loss", level="token/word")


# --- highest rows --------------------------------------------------------------------------------------------------------------


def places(table: NeuronTable) -> list[list[tuple[int, int]]]:
    assert table.top is not None
    return [[(one.example, one.token) for one in table.top.of(neuron)] for neuron in range(len(table))]


@pytest.mark.usefixtures("pieces")
def test_highest_rows_are_those_of_argsort(run: Run, recorded: Recorded) -> None:
    """Ties, of which coarse, sparse and constant features have many, go to the first rows."""
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    token = np.concatenate([np.arange(length) for length in LENGTHS])
    order = np.argsort(-recorded.x, axis=0, kind="stable")[:7].T
    table = tabulate(run, top=7)
    assert places(table) == [[(owner[row], token[row]) for row in some] for some in order]
    assert table.top is not None
    np.testing.assert_array_equal(table.top.values, np.take_along_axis(recorded.x.T, order, 1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_highest_rows_of_any_blocks(data: st.DataObject) -> None:
    most = data.draw(st.integers(1, 6))
    cuts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    elements = st.sampled_from([-np.inf, -1.0, 0.0, 1.0, 2.0, np.inf, np.nan])
    values = data.draw(arrays.arrays(np.float32, (sum(cuts), 3), elements=elements))
    total, at = Highest(most).init(), 0
    for count in cuts:
        part = Highest(most).init()
        part.update(Block((values[at : at + count],), np.arange(at, at + count), {}))
        total.merge(part)
        at += count
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values), axis=0, kind="stable")[:most].T
    np.testing.assert_array_equal(total.finalize().rows, order)


def test_passages_are_cut_out_of_the_text(run: Run, recorded: Recorded) -> None:
    top = tabulate(run, top=3, context=6).top
    assert top is not None
    for one in top.passages:
        text, start = recorded.texts[one.example], 4 * one.token
        assert (one.id, one.start, one.end, one.last) == (f"e{one.example}", start, start + 3, one.token + 1)
        assert (one.before, one.text, one.after) == (
            text[max(start - 6, 0) : start],
            text[start : start + 3],
            text[start + 3 :][:6],
        )


def test_passages_of_words_reach_over_their_tokens(run: Run, recorded: Recorded) -> None:
    top = tabulate(run, top=2, level="token/word").top
    assert top is not None
    pooled = np.concatenate([[part.mean(0) for part in np.split(rows_, range(2, len(rows_), 2))] for rows_ in recorded.states])
    np.testing.assert_allclose(top.values[:, 0], pooled.max(0), rtol=1e-6)
    for one in top.passages:
        assert one.last == min(one.token + 2, LENGTHS[one.example])
        assert one.text == recorded.texts[one.example][4 * one.token : 4 * one.last - 1]


def test_passages_are_decoded_where_there_is_no_text(tmp_path: Path, recorded: Recorded) -> None:
    columns = {f"token/{SITE}": recorded.states, "token/input_ids": recorded.ids}
    bare = write(tmp_path / "bare.zarr", columns, {f"token/{SITE}": site(0)})
    top = tabulate(bare, top=2, context=5, decode=lambda ids: "".join(chr(97 + token) for token in ids)).top
    silent = tabulate(bare, top=2).top
    assert top is not None
    assert silent is not None
    for one in top.passages:
        text = "".join(chr(97 + token) for token in recorded.ids[one.example])
        assert (one.before, one.text, one.after) == (
            text[max(one.token - 5, 0) : one.token],
            text[one.token],
            text[one.token + 1 : one.token + 6],
        )
    assert {one.text for one in silent.passages} == {None}


# --- the rest ------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pieces")
def test_every_executor_gives_the_same_bits(run: Run, processes: Executor) -> None:
    """Sketches and heaps are merged in the order of the rows, whoever computed them."""
    options = {"target": "loss", "memory": 6 << 10, "top": 3}
    expected = tabulate(run, "token/tag", **options)
    with ThreadPoolExecutor(3) as threads:
        assert tabulate(run, "token/tag", executor=threads, **options) == expected
    assert tabulate(run, "token/tag", executor=processes, **options) == expected


def test_only_examples_that_have_everything_count(run: Run, recorded: Recorded) -> None:
    kept = [1, 2, 5, 9]
    tags = ["x" if number % 2 else "y" for number in range(len(kept))]
    run.add_column("example/some", tags, ids=[f"e{number}" for number in kept])
    table = tabulate(run, "example/some", top=1)
    np.testing.assert_array_equal(table.spread.greatest, rows_of([recorded.states[number] for number in kept]).max(0))
    assert {one.example for one in table.top.passages} <= set(kept)  # type: ignore[union-attr]


def test_float64_is_not_rounded(tmp_path: Path) -> None:
    values = [np.array([[1.0], [1.0 + 1e-12], [1.0 - 1e-12]])]
    precise = write(tmp_path / "wide.zarr", {f"token/{SITE}": values}, {f"token/{SITE}": site(0)}, ids=["a"])
    table = tabulate(precise, top=1)
    assert table.spread.greatest[0] == 1.0 + 1e-12
    assert places(table) == [[(0, 1)]]


def test_a_table_is_saved_and_loaded(run: Run, tmp_path: Path) -> None:
    table = tabulate(run, "token/tag", target="loss", top=2)
    assert NeuronTable.load(table.save(tmp_path / "table")) == table
    frame = table.to_pandas()
    assert len(frame) == WIDTH
    assert {"mean", "zero", "q0.5", "importance", "auc.a", "difference.c", "probeless"} <= set(frame)
    assert len(table.top.to_pandas()) == 2 * WIDTH  # type: ignore[union-attr]


def test_neurons_are_ranked_by_what_is_known(run: Run) -> None:
    table = tabulate(run, "token/tag", target="loss", top=0)
    assert table.attribution is not None
    assert table.selectivity is not None
    assert table.ranked()[0] == table.attribution.importance.argmax()
    assert table.ranked("selectivity")[0] == np.abs(table.selectivity.auc - 0.5).max(0).argmax()
    assert tabulate(run, top=0).ranked()[0] == table.spread.deviation.argmax()


def test_the_picture_has_a_panel_for_everything_known(run: Run) -> None:
    titles = [axes.get_xlabel() for axes in tabulate(run, "token/tag", target="loss").plot().axes]
    assert titles[:3] == ["neuron, by its median", "importance for loss", "token/tag"]
    assert len(tabulate(run).plot().axes) == 1


def test_ranks_are_told_apart_by_class() -> None:
    """A class of one row among many is exact."""
    values = np.arange(40, dtype=np.float32)[:, None]
    labels = np.where(np.arange(40) == 31, 1, 0)
    found = Ranks([1, 8, 1], "label").init()
    found.update(Block((values,), np.arange(40), {"label": labels}))
    order = found.finalize()
    assert order.areas()[1, 0] == pytest.approx(31 / 39, abs=float(order.area_errors()[1]))
    assert order.area_errors()[1] == order.errors[1] / 39
