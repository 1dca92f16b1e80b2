"""Coordinates in principal components, against scikit-learn over the full recording."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as Reference
from tiny_models import BATCH, HIDDEN, LENGTHS, batch, llama, llama_lm, minilm, random_tokens

from tensortape.instrument import PCA, Recorder, Site, record
from tensortape.instrument.errors import BatchError
from tensortape.instrument.pca import fitted
from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores.errors import RunExistsError, SchemaError
from tensortape.stores.projected import ProjectedColumn

IDS = [f"e{number}" for number in range(BATCH)]
TEXTS = [
    "a tape is recorded once",
    "and read",
    "for as long as anybody cares",
    "unbelievably",
    "the second of three",
    "end",
    "it is",
]
K = 3
Recorded = Callable[..., Run]
Make = Callable[..., Recorder]


def projected(run: Run, name: str) -> ProjectedColumn:
    column = run[name]
    assert isinstance(column, ProjectedColumn)
    return column


def same_up_to_sign(one: np.ndarray, other: np.ndarray, tolerance: float = 1e-5) -> bool:
    """Rows of unit length that agree but for their sign."""
    return np.allclose(np.abs((one * other).sum(1)), 1, atol=tolerance)


@pytest.mark.parametrize(("rows", "width", "k"), [(97, 11, 4), (97, 11, 11), (23, 37, 5)])
def test_components_are_those_of_scikit_learn(rows: int, width: int, k: int) -> None:
    """Whichever way they are computed; in float64, whatever the rows are."""
    random = np.random.default_rng(rows)
    found = (random.normal(size=(rows, width)) * np.arange(1, width + 1) + 50).astype(np.float32)
    basis, reference = fitted(found, k, "rows"), Reference(k, svd_solver="full").fit(found.astype(np.float64))
    assert same_up_to_sign(basis.components, reference.components_)
    assert np.allclose(basis.variance, reference.explained_variance_, rtol=1e-6)
    assert basis.explained == pytest.approx(reference.explained_variance_ratio_.sum())
    assert np.allclose(basis.mean, reference.mean_, rtol=1e-6)
    assert (basis.tokens, basis.components.dtype) == (rows, np.float32)


def test_rows_without_a_number_are_left_out() -> None:
    rows = np.random.default_rng(0).normal(size=(31, 7))
    rows[[3, 17], [0, 2]] = np.nan, np.inf
    basis = fitted(rows, 2, "rows")
    assert basis.tokens == 29
    assert same_up_to_sign(basis.components, Reference(2).fit(np.delete(rows, [3, 17], 0)).components_)


def test_too_few_rows_or_features() -> None:
    for shape, k in (((5, 7), 5), ((50, 3), 4)):
        with pytest.raises(ValueError, match=f"PCA\\({k}\\) of rows needs more than {k} rows of at least {k} features"):
            fitted(np.zeros(shape), k, "rows")
    with pytest.raises(ValueError, match="more fit_tokens than components"):
        PCA(5, fit_tokens=5)


def test_features_of_several_axes(tmp_path: Path) -> None:
    """Flattened for the components, and whole again in what is reconstructed."""
    rows = np.random.default_rng(0).normal(size=(41, 3, 5))
    with RunWriter(tmp_path / "r.zarr") as writer:
        writer.describe("token/m:out", site={"path": "m", "port": "out", "call": 1})
        writer.append(ids=[0], columns={"token/m:out": [rows]})
    pca = PCA.from_run(open_run(tmp_path / "r.zarr")["token/m:out"], 4)
    found = pca.coordinates("m:out", torch.from_numpy(rows)).numpy()
    reference = Reference(4).fit(rows.reshape(41, 15))
    assert np.allclose(np.abs(found[:, :4]), np.abs(reference.transform(rows.reshape(41, 15))), atol=1e-5)
    back = reference.inverse_transform(reference.transform(rows.reshape(41, 15))).reshape(41, 3, 5)
    assert np.allclose(pca.bases["m:out"].reconstructed(found[:, :4]), back, atol=1e-5)
    with pytest.raises(BatchError, match=r"rows of shape \[5, 3\], but was fitted on rows of \[3, 5\]"):
        pca.coordinates("m:out", torch.zeros(2, 5, 3))


def test_coordinates_residuals_and_reconstructions(recorded: Recorded) -> None:
    """Fitted on a recording of some tokens, used on others, beside the whole rows."""
    first = recorded(llama(), "resid_post", batch(seed=1, lengths=(6, 11, 4)), [*"abc"])
    pca = PCA.from_run(first.select("resid_post"), K)
    assert set(pca.bases) == {f"layers.{layer}:out" for layer in range(3)}
    run = recorded(llama(), ["resid_post", Site("resid_post", project=pca)], batch("left"), IDS)
    for layer in range(3):
        reference = Reference(K).fit(first[f"layers.{layer}:out"].rows().astype(np.float64))
        column = projected(run, f"layers.{layer}:out|pca3")
        signs = np.sign((column.basis.components * reference.components_).sum(1))
        for example in range(BATCH):
            whole = run[f"layers.{layer}:out"][example].astype(np.float64)
            expected = reference.transform(whole)
            back = reference.inverse_transform(expected)
            assert np.allclose(column[example], expected * signs, atol=1e-5)
            assert np.allclose(column.reconstructed(example), back, atol=1e-5)
            assert np.allclose(column.residual[example], np.linalg.norm(whole - back, axis=1), atol=1e-5)
        assert column.site is not None
        assert column.site["projection"]["tokens"] == 21
        assert column.basis.asset in run.assets
    assert run.verify().ok
    assert [column.name for column in run.select("resid_post[0]")] == ["token/layers.0:out", "token/layers.0:out|pca3"]


@pytest.mark.parametrize(
    ("computed", "asked", "stored"),
    [
        (torch.bfloat16, None, "bfloat16"),
        (torch.float16, None, "float32"),
        (torch.float16, "float16", "float16"),
        (torch.float32, "bfloat16", "bfloat16"),
    ],
)
def test_dtypes(recorded: Recorded, computed: torch.dtype, asked: str | None, stored: str) -> None:
    """As the model computes, but for float16, whose largest number a coordinate may exceed; the residual in float32."""
    model = llama().to(computed)
    pca = PCA.from_run(recorded(model, "resid_post[1]", batch(), IDS)["layers.1:out"], K)
    run = recorded(model, ["resid_post[1]", Site("resid_post[1]", project=pca, dtype=asked)], batch(), IDS)
    column = projected(run, "layers.1:out|pca3")
    assert (column.dtype.name, column.residual.dtype.name, run["layers.1:out"].dtype.name) == (
        stored,
        "float32",
        str(computed).removeprefix("torch."),
    )
    centred = run["layers.1:out"].rows().astype(np.float64) - column.basis.mean
    expected = centred @ column.basis.components.astype(np.float64).T
    assert np.allclose(column.rows().astype(np.float64), expected, rtol=2**-7, atol=2**-7 * np.abs(expected).max())


def texts(to: Path, count: int = len(TEXTS), **options: Any) -> Run:
    """A recording of texts with components fitted on the first tokens."""
    model, tokenizer = minilm()
    sites = options.pop("sites", [Site("resid_post[1:3]", project=PCA(K, fit_tokens=10))])
    return record(model, TEXTS[:count], tokenizer=tokenizer, to=to, sites=sites, batch_size=2, durability="rename", **options)


def test_record_fits_on_the_first_tokens(tmp_path: Path) -> None:
    """The first batch has 10 tokens at least; nothing of the first look is left."""
    run = texts(tmp_path / "r.zarr")
    whole = texts(tmp_path / "whole.zarr", sites="resid_post[1:3]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.zarr", "whole.zarr"]
    assert run.ids == list(range(len(TEXTS)))
    first = sum(run.tables["token"].lengths[:2])
    for layer in (1, 2):
        column, rows = projected(run, f"encoder.layer.{layer}:out|pca3"), whole[f"encoder.layer.{layer}:out"].rows()
        assert column.basis.tokens == 10 <= first
        assert np.allclose(column.rows(), (rows - column.basis.mean) @ column.basis.components.T, atol=1e-5)


def test_a_resumed_recording_keeps_its_components(tmp_path: Path) -> None:
    """Also if it is told to fit some; other ones are refused."""
    once, twice = texts(tmp_path / "once.zarr"), tmp_path / "twice.zarr"
    before = projected(texts(twice, count=3), "encoder.layer.1:out").basis
    run = texts(twice, mode="resume")
    column = projected(run, "encoder.layer.1:out")
    assert len(run.parts) == 2
    assert column.basis.digest == before.digest == projected(once, "encoder.layer.1:out").basis.digest
    assert np.allclose(column.rows(), once["encoder.layer.1:out"].rows(), atol=1e-5)
    assert len([name for name in run.assets if name.startswith("basis.")]) == 2
    other = PCA.from_run(texts(tmp_path / "other.zarr", sites="resid_post[1:3]").select("resid_post[1:3]"), K)
    with pytest.raises(SchemaError, match="other components"):
        texts(twice, mode="resume", sites=[Site("resid_post[1:3]", project=other)])


@pytest.mark.parametrize("kind", [list, iter])
def test_a_loader_is_read_from_its_beginning(tmp_path: Path, kind: Any) -> None:
    """Also one that can be read once only: what the first look has read comes again."""
    batches = [{"id": [2 * n, 2 * n + 1], "input_ids": random_tokens(2, 5, seed=n)} for n in range(5)]
    sites = [Site("resid_post[0]", project=PCA(K, fit_tokens=23))]
    run = record(llama(), kind(batches), to=tmp_path / "r.zarr", sites=sites, ids="id", durability="rename")
    assert run.ids == list(range(10))
    assert projected(run, "layers.0:out").basis.tokens == 23
    assert projected(run, "layers.0:out").shape == (50, K)


def test_a_sample_of_coordinates(recorded: Recorded) -> None:
    model = llama()
    pca = PCA.from_run(recorded(model, "resid_post[1]", batch(), IDS)["layers.1:out"], K)
    sites = [Site("resid_post[1]", project=pca), Site("resid_post[1]", project=pca, sample_tokens=0.5)]
    run = recorded(model, sites, batch(), IDS)
    whole, sampled = (projected(run, column.name) for column in run.select("resid_post[1]"))
    assert sampled.name == "token.sample0.5.seed0/layers.1:out|pca3|sample0.5.seed0"
    for example in range(BATCH):
        places = run.tables["token.sample0.5.seed0"]["position"][example]
        assert np.array_equal(sampled[example], whole[example][places])
        assert np.array_equal(sampled.residual[example], whole.residual[example][places])


def test_forwards_that_continue_a_cache(make: Make, opened: Callable[[Recorder], Run]) -> None:
    model = llama_lm()
    first = make(model, "resid_post[1]")
    with torch.no_grad(), first.batch(ids=[*"abc"]):
        model(random_tokens(3, 17))
    recorder = make(model, ["resid_post[1]", Site("resid_post[1]", project=PCA.from_run(opened(first).select("resid_post[1]"), K))])
    with torch.no_grad(), recorder.batch(ids=[*"abc"], forwards="generate"):
        model.generate(random_tokens(3, 5), max_new_tokens=6, do_sample=False, eos_token_id=None)
    run = opened(recorder)
    column = projected(run, "model.layers.1:out|pca3")
    expected = (run["token/model.layers.1:out"].rows() - column.basis.mean) @ column.basis.components.T
    assert column.shape == (3 * 10, K)
    assert np.allclose(column.rows(), expected, atol=1e-5)


def test_a_recorder_needs_fitted_components(make: Make, recorded: Recorded) -> None:
    with pytest.raises(ValueError, match=r"PCA\(3\) at 'resid_post' is not fitted: record\(...\) fits it .*PCA.from_run"):
        make(llama(), Site("resid_post", project=PCA(K)))
    pca = PCA.from_run(recorded(llama(), "resid_post[1]", batch(), IDS)["layers.1:out"], K)
    with pytest.raises(BatchError, match=r"PCA\(3\) is not fitted for site layers\.0:out; it is for layers\.1:out"):
        recorded(llama(), Site("resid_post[0]", project=pca), batch(), IDS)


def test_what_cannot_be_projected() -> None:
    for pattern, options in (
        ("resid_post", {"reduce": "mean"}),
        ("resid_post", {"positions": [0]}),
        ("attention", {}),
        ("resid_post:out.grad", {}),
    ):
        with pytest.raises(ValueError, match="project="):
            Site(pattern, project=PCA(K), **options)


def test_a_site_that_does_not_always_run(recorded: Recorded) -> None:
    """In a table of its own, residual and all."""
    model = llama()
    pca = PCA.from_run(recorded(model, "resid_post[1]", batch(), IDS)["layers.1:out"], K)
    run = recorded(model, Site("resid_post[1]", project=pca, missing="absent"), batch(), IDS)
    column = projected(run, "layers.1:out")
    assert column.name == "token.layers.1/layers.1:out|pca3"
    assert column.residual.shape == (sum(LENGTHS),)
    assert column.basis.components.shape == (K, HIDDEN)


def test_a_path_that_is_taken_is_refused_before_the_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts(tmp_path / "r.zarr", sites="resid_post")
    monkeypatch.setattr("tensortape.instrument.recording._with_components", lambda *_: pytest.fail("looked"))
    with pytest.raises(RunExistsError):
        texts(tmp_path / "r.zarr")
