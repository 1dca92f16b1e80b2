"""TCAV against captum on a live model, against plain numpy, and its test against concepts that are none."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.concept import TCAV as CaptumTCAV
from captum.concept import Classifier, Concept
from concept_runs import FEATURES, cosine, gradient, pooled, site, topics, write_rows, write_topics
from scipy.stats import false_discovery_control
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from tensortape.analyses import TCAV, CAVs, fit_cavs, tcav
from tensortape.analyses.errors import CAVError, DegenerateGradientsError, LabelError
from tensortape.analyses.significance import permutation_p
from tensortape.instrument import record
from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores.errors import GradientError, UnknownColumnError

BATCH, WIDTH, INNER, VOCABULARY, PAD = 43, 11, 13, 29, 0


# --- captum, on a live model -----------------------------------------------------------------------------------------------------


class Pool(nn.Module):
    """The mean over real tokens."""

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Reader(nn.Module):
    """Tokens, one layer on each, their mean, and a head that is not linear; in float64, so that rounding hides no difference."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, INNER)
        self.states = nn.Sequential(nn.Linear(INNER, INNER), nn.Tanh())
        self.pool = Pool()
        self.head = nn.Sequential(nn.Linear(INNER, 17), nn.Tanh(), nn.Linear(17, 3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        mask = (input_ids != PAD).double() if attention_mask is None else attention_mask.double()
        return self.head(self.pool(self.states(self.embed(input_ids)), mask))


class Exact(Classifier):
    """Logistic regression at its optimum, of standardised features; the vectors have length 1."""

    def __init__(self) -> None:
        self.vector = torch.zeros(0)

    def train_and_eval(self, dataloader: Any, **kwargs: Any) -> dict[str, Any]:
        x, y = (torch.cat(parts).numpy() for parts in zip(*dataloader, strict=True))
        scaler = StandardScaler().fit(x)
        fitted = LogisticRegression(tol=1e-10, max_iter=10_000).fit(scaler.transform(x), y)
        vector = fitted.coef_[0] / scaler.scale_
        self.vector = torch.tensor(vector / np.linalg.norm(vector)).float()
        return {}

    def weights(self) -> torch.Tensor:
        return torch.stack([-self.vector, self.vector])

    def classes(self) -> list[int]:
        return [0, 1]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reader, torch.Tensor, np.ndarray, Run]:
    """A model, ragged tokens for it, which of them have a concept (a token that is frequent in them), and a run of both."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Reader().double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.7)
        lengths = torch.randint(2, WIDTH + 1, (BATCH,))
        tokens = torch.randint(1, VOCABULARY, (BATCH, WIDTH))
        concept = torch.rand(BATCH) < 0.4
        tokens = torch.where((torch.rand(BATCH, WIDTH) < 0.5) & concept[:, None], 5, tokens)
        tokens[torch.arange(WIDTH) >= lengths[:, None]] = PAD
    batches = [
        {
            "input_ids": tokens[here],
            "attention_mask": (tokens[here] != PAD).long(),
            "id": [f"e{number}" for number in range(BATCH)[here]],
            "concept": concept[here].long(),
        }
        for here in (slice(0, 19), slice(19, BATCH))
    ]
    run = record(
        model,
        batches,
        to=tmp_path_factory.mktemp("live") / "run.zarr",
        sites=["states", "states:out.grad", "pool", "pool:out.grad"],
        ids="id",
        labels={"example/concept": "concept"},
        targets={"logit": lambda outputs, batch: outputs[:, 1], "steep": lambda outputs, batch: 3 * outputs[:, 2]},
    )
    return model, tokens, concept.numpy(), run


@pytest.mark.filterwarnings("ignore")  # captum's
@pytest.mark.parametrize("place", ["states:out", "pool:out"])
def test_scores_are_those_of_captum(
    place: str, live: tuple[Reader, torch.Tensor, np.ndarray, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the mean, and at the tokens it is taken of: there, states are averaged and gradients added up."""
    model, tokens, concept, run = live
    monkeypatch.chdir(tmp_path)
    sets = [Concept(0, "rest", [tokens[~concept]]), Concept(1, "concept", [tokens[concept]])]
    theirs = CaptumTCAV(model, ["pool"], classifier=Exact(), save_path="./cavs/")
    examples = np.arange(0, BATCH, 2)
    expected = theirs.interpret(tokens[examples], [sets], target=1)["0-1"]["pool"]
    cavs = fit_cavs(run, concepts="example/concept", sites=place, kind="logistic", test_share=0, null=0)
    found = tcav(run, cavs, target="logit", examples=examples).of("concept", place)
    assert cosine(cavs["concept", place].vector, theirs.cavs["0-1"]["pool"].stats["weights"][1].numpy()) >= 0.9999
    assert found.sign_count == pytest.approx(float(expected["sign_count"][1]), abs=1e-7)
    assert found.mean == pytest.approx(float(expected["magnitude"][1]), rel=1e-4)
    assert 0 < found.sign_count < 1


def test_mean_gradients_are_those_of_autograd(live: tuple[Reader, torch.Tensor, np.ndarray, Run]) -> None:
    model, tokens, concept, run = live
    states = model.pool(model.states(model.embed(tokens)), (tokens != PAD).double()).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(3 * model.head(states)[:, 2].sum(), states)
    for place in ("states:out", "pool:out"):
        cav = fit_cavs(run, concepts="example/concept", sites=place, kind="mean_gradient", target="steep", null=0)["concept", place]
        np.testing.assert_allclose(cav.vector * cav.raw_norm, slopes[torch.tensor(concept)].mean(0).numpy(), rtol=1e-9, atol=1e-12)


# --- plain numpy -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_topics(tmp_path_factory.mktemp("tcav") / "run.zarr", seed=0)


@pytest.fixture(scope="module")
def cavs(run: Run) -> CAVs:
    return fit_cavs(run, concepts=["example/topic=net", "example/topic=gui"], null=20)


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_scores_of_pooled_vectors(run: Run, pool: Any) -> None:
    """Of a mean, gradients are added up over the tokens; of one token, only its own counts."""
    cavs = fit_cavs(run, concepts="example/topic=net", pool=pool, null=20)
    found = tcav(run, cavs, target="logit", examples="example/topic=mail").of("topic=net", "layers.1:out")
    cav = cavs["topic=net", "layers.1:out"]
    joined = {"mean": lambda rows: rows.sum(0), "first": lambda rows: rows[0], "last": lambda rows: rows[-1]}[pool]
    rows = run["layers.1:out.grad@logit"][:]
    slopes = np.stack([joined(one.astype(np.float64)) for one, topic in zip(rows, topics(run), strict=True) if topic == "mail"])
    dots = slopes @ cav.vector
    np.testing.assert_allclose(found.per_example, dots, rtol=1e-4, atol=1e-5)
    assert found.n == len(dots)
    assert found.sign_count == np.mean(dots > 0)
    assert found.mean == pytest.approx(dots.mean(), rel=1e-4, abs=1e-6)
    assert found.relu_ratio == pytest.approx(np.maximum(dots, 0).sum() / abs(dots).sum(), rel=1e-5)
    null = slopes @ cav.null.T.astype(np.float64)
    np.testing.assert_allclose(found.null_sign_count, (null > 0).mean(0), atol=1e-9)
    np.testing.assert_allclose(found.null_mean, null.mean(0), rtol=1e-4, atol=1e-5)
    far = abs(np.append((null > 0).mean(0), found.sign_count) - 0.5)
    assert found.p == np.mean(far >= far[-1])


def test_each_token_is_a_row_of_its_own(run: Run) -> None:
    cavs = fit_cavs(run, concepts="token/early", null=0)
    found = tcav(run, cavs, target="logit", examples="token/early").of("early", "layers.0:out")
    here = run["token/early"].rows() == 1
    dots = run["layers.0:out.grad@logit"].rows()[here] @ cavs["early", "layers.0:out"].vector
    np.testing.assert_allclose(found.per_example, dots, rtol=1e-4, atol=1e-5)
    assert np.isnan(found.p)


def test_gradients_that_were_joined_when_recording(run: Run, tmp_path: Path) -> None:
    """What was averaged over tokens is multiplied with how many there were."""
    with RunWriter(tmp_path / "joined.zarr", durability="rename") as writer:
        writer.describe("example/layers.1:out|mean", site=site(1, reduce="mean"))
        writer.describe("example/layers.1:out.grad@logit|mean", site=gradient(1, reduce="mean"))
        columns = {
            "example/layers.1:out|mean": pooled(run).astype(np.float32),
            "example/layers.1:out.grad@logit|mean": pooled(run, "layers.1:out.grad@logit").astype(np.float32),
            "token/early": run["token/early"][:],
            "example/topic": topics(run).tolist(),
            "example/document": run["example/document"].rows().tolist(),
        }
        writer.append(ids=run.ids, columns=columns)
    joined = open_run(tmp_path / "joined.zarr")
    whole = fit_cavs(run, concepts="example/topic=net", null=20, sites="resid_post[1]")
    short = fit_cavs(joined, concepts="example/topic=net", null=20)
    expected = tcav(run, whole, target="logit").scores[0]
    for given, vectors in ((joined, short), (run, short), (joined, whole)):
        found = tcav(given, vectors, target="logit").scores[0]
        np.testing.assert_allclose(found.per_example, expected.per_example, rtol=1e-3, atol=1e-3)
    a, b = (
        fit_cavs(one, concepts="example/topic=net", kind="mean_gradient", target="logit", sites="resid_post[1]", null=0)
        for one in (run, joined)
    )
    assert next(iter(b)).raw_norm == pytest.approx(next(iter(a)).raw_norm, rel=1e-4)


def test_gradients_of_another_run(cavs: CAVs, tmp_path: Path) -> None:
    """Concept examples and class examples need not be in one run, nor the states beside the gradients."""
    other = write_topics(tmp_path / "other.zarr", seed=9)
    found = tcav(other, cavs, target="logit").of("topic=gui", "layers.0:out")
    slopes = np.stack([rows.sum(0) for rows in other["layers.0:out.grad@logit"][:]])
    np.testing.assert_allclose(found.per_example, slopes @ cavs["topic=gui", "layers.0:out"].vector, rtol=1e-4, atol=1e-4)


def test_the_same_bits_from_processes(run: Run, cavs: CAVs) -> None:
    with ProcessPoolExecutor(2) as pool:
        assert tcav(run, cavs, target="logit", executor=pool) == tcav(run, cavs, target="logit")


def test_discovery_rates_are_over_concepts_and_sites(run: Run, cavs: CAVs) -> None:
    found = tcav(run, cavs, target="logit")
    assert len(found.scores) == 4
    np.testing.assert_allclose([one.p_fdr for one in found], false_discovery_control([one.p for one in found]))
    np.testing.assert_allclose([one.p_mean_fdr for one in found], false_discovery_control([one.p_mean for one in found]))


def test_p_counts_what_is_as_far_on_both_sides() -> None:
    null = np.array([0.1, 0.5, 0.4, 0.95])
    assert permutation_p(0.9, null, 0.5) == 3 / 5
    assert permutation_p(1.0, null, 0.5) == 1 / 5
    assert permutation_p(0.5, null, 0.5) == 1


def test_only_some_sites(run: Run, cavs: CAVs) -> None:
    for sites in ("resid_post[1]", "layers.1:out", ["layers.1:out"]):
        assert {one.site for one in tcav(run, cavs, target="logit", sites=sites)} == {"layers.1:out"}
    with pytest.raises(CAVError, match=r"there are CAVs at layers\.1:out"):
        tcav(run, cavs.only(sites=["layers.1:out"]), target="logit", sites="resid_post[0]")


def test_several_kinds_in_one_table(run: Run, cavs: CAVs) -> None:
    more = fit_cavs(run, concepts="example/topic=net", kind="mean_difference", null=10)
    assert [one.kind for one in tcav(run, [cavs, more], target="logit")] == ["lda", "lda", "mean_difference"] * 2


def test_the_table_the_plot_and_the_file(run: Run, cavs: CAVs, tmp_path: Path) -> None:
    found = tcav(run, cavs, target="logit")
    frame = found.to_pandas()
    assert frame["concept"].tolist() == ["topic=net", "topic=gui"] * 2
    assert (frame["random_sets"] == 20).all()
    counts = found.plot().axes[:2]
    assert [axes.get_title() for axes in counts] == ["topic=net", "topic=gui"]
    assert counts[1].lines[1].get_ydata().tolist() == [score.sign_count for score in found if score.concept == "topic=gui"]
    assert "of 'logit' over 101 rows of all examples" in repr(found)
    found.save(tmp_path / "tcav")
    assert TCAV.load(tmp_path / "tcav") == found


# --- the test itself -------------------------------------------------------------------------------------------------------------

DIMENSIONS, SETS, SIZE = 13, 200, 15


def far_states(random: np.random.Generator, rows: int, groups: int | None = None) -> np.ndarray:
    """Correlated features, two of which lie far from 0; rows of a group have something in common."""
    mixing = np.eye(DIMENSIONS) + 0.3 * np.random.default_rng(1).normal(size=(DIMENSIONS, DIMENSIONS))
    found = random.normal(size=(rows, DIMENSIONS))
    if groups is not None:
        found += 2 * random.normal(size=(groups, DIMENSIONS))[np.arange(rows) // (rows // groups)]
    shift = np.zeros(DIMENSIONS)
    shift[:2] = 3000, -800
    return (found @ mixing + shift).astype(np.float32)


@pytest.mark.parametrize("in_documents", [False, True])
@pytest.mark.parametrize("kind", ["lda", "mean_difference"])
def test_few_random_sets_are_called_significant(kind: Any, in_documents: bool, tmp_path: Path) -> None:
    """200 concepts that are none. Where these are whole documents, whose rows have much in common, documents are shuffled."""
    random = np.random.default_rng(3)
    rows = SETS * SIZE
    states = far_states(random, rows, rows // 5 if in_documents else None)
    slopes = random.normal(size=(rows, DIMENSIONS)) + 0.5 * random.normal(size=DIMENSIONS)
    shuffled = np.arange(rows) // SIZE if in_documents else random.permutation(np.arange(rows) // SIZE)
    documents = [f"d{number // 5}" if in_documents else f"d{number}" for number in range(rows)]
    run = write_rows(tmp_path / "random.zarr", states, slopes.astype(np.float32), none=shuffled, document=documents)
    cavs = fit_cavs(run, concepts=[f"example/none={one}" for one in range(SETS)], kind=kind, null=100, test_share=0)
    found = tcav(run, cavs, target="logit", examples=np.arange(97))
    assert {cav.shuffled for cav in cavs} == {len(set(documents))}
    for name in ("p", "p_mean"):
        called = np.mean([getattr(score, name) < 0.05 for score in found])
        assert 0 < called <= 0.09
    assert not found.significant()


@pytest.mark.parametrize("kind", ["lda", "logistic", "mean_difference"])
def test_a_concept_that_the_target_uses_is_found(kind: Any, tmp_path: Path) -> None:
    """Among two that it does not use."""
    random = np.random.default_rng(4)
    rows, direction = 361, np.random.default_rng(5).normal(size=DIMENSIONS)
    direction /= np.linalg.norm(direction)
    used = np.arange(rows) % 3 == 0
    states = far_states(random, rows) + np.where(used, 3, 0)[:, None] * direction
    slopes = random.normal(size=(rows, DIMENSIONS)) + 2.5 * direction
    none = {f"none{number}": random.permutation(used).astype(int) for number in range(2)}
    run = write_rows(tmp_path / "used.zarr", states.astype(np.float32), slopes.astype(np.float32), used=used, **none)
    cavs = fit_cavs(run, concepts=["example/used", *(f"example/{name}" for name in none)], kind=kind, null=100, seed=1)
    found = tcav(run, cavs, target="logit", examples=np.arange(1, rows, 3))
    score = found.of("used", "layers.0:out")
    assert score.sign_count > 0.85
    assert score.p_mean == 1 / 101
    # Means of random halves differ most along the concept itself, where the rows differ most: a harder test.
    assert kind == "mean_difference" or score in found.significant()


# --- errors ----------------------------------------------------------------------------------------------------------------------


def test_an_undeclared_reduction_is_refused(cavs: CAVs, tmp_path: Path) -> None:
    undeclared = write_topics(tmp_path / "undeclared.zarr", seed=0, reduction=None)
    with pytest.raises(GradientError, match="nobody has said"):
        tcav(undeclared, cavs, target="logit")
    declared = write_topics(tmp_path / "declared.zarr", seed=0)
    found = tcav(undeclared, cavs, target="logit", assume="sum")
    assert [one.mean for one in found] == [one.mean for one in tcav(declared, cavs, target="logit")]


def test_a_target_that_was_not_recorded(run: Run, cavs: CAVs) -> None:
    with pytest.raises(UnknownColumnError, match=r"'layers\.0:out\.grad@logit'"):
        tcav(run, cavs, target="loss")


@pytest.mark.parametrize(
    ("slope", "kind", "cause"),
    [
        (np.arange(1.0, 6.0), DegenerateGradientsError, "has the same gradient"),
        (np.zeros(5), DegenerateGradientsError, "all gradients of .* are 0"),
        (np.array([0, np.nan, 1, 2, 3]), CAVError, "not finite"),
    ],
)
def test_gradients_that_say_nothing(slope: np.ndarray, kind: type[Exception], cause: str, tmp_path: Path) -> None:
    """As at the mean that a linear head reads, where sign counts would be 0 or 1; but for rounding."""
    random = np.random.default_rng(0)
    slopes = (slope * (1 + 1e-6 * random.normal(size=(31, 1)))).astype(np.float32)
    run = write_rows(tmp_path / "same.zarr", random.normal(size=(31, 5)), slopes, y=np.arange(31) % 2)
    with pytest.raises(kind, match=cause):
        tcav(run, fit_cavs(run, concepts="example/y", null=5), target="logit")


def test_mean_gradients_go_into_tables_of_their_own(run: Run, cavs: CAVs) -> None:
    means = fit_cavs(run, concepts="example/topic=net", kind="mean_gradient", target="logit", null=5)
    with pytest.raises(CAVError, match="tables of their own"):
        tcav(run, [cavs, means], target="logit")
    assert len(tcav(run, means, target="logit").scores) == 2


def test_vectors_of_other_rows_do_not_go_into_one_table(run: Run, cavs: CAVs) -> None:
    with pytest.raises(CAVError, match="different rows"):
        tcav(run, [cavs, fit_cavs(run, concepts="token/early", null=0)], target="logit")


def test_one_row_is_too_few(run: Run, cavs: CAVs) -> None:
    with pytest.raises(LabelError, match="at least 2"):
        tcav(run, cavs, target="logit", examples=[3])


def test_another_width(cavs: CAVs, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    other = write_rows(tmp_path / "wide.zarr", random.normal(size=(9, FEATURES + 2)), random.normal(size=(9, FEATURES + 2)))
    with pytest.raises(CAVError, match="same model"):
        tcav(other, cavs.only(sites=["layers.0:out"]), target="logit")
