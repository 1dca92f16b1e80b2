"""Site(compress=, quantize=): what is recorded is what it would have been, in fewer bytes, and says what that cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch

from tensortape.instrument import Recorder, Site
from tensortape.stores import Run, open_run
from tensortape.stores.errors import SchemaError


def recorded(path: Path, *sites: str | Site, dtype: torch.dtype = torch.float32, batches: int = 2) -> Run:
    """Batches of five examples of a small Llama; a run that is there already is continued."""
    model = tiny.llama().to(dtype)
    first = len(open_run(path)) if path.exists() else 0
    with torch.no_grad(), Recorder(model, sites=sites, to=path, mode="resume", durability="rename") as recorder:
        for number in range(batches):
            with recorder.batch(ids=list(range(first + 5 * number, first + 5 * number + 5))):
                model(**tiny.batch("left"))
    return open_run(path)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_sites_hold_the_same_bits(tmp_path: Path, codec: str) -> None:
    plain = recorded(tmp_path / "plain.zarr", "resid_post")
    sites = (Site("resid_post[0]", compress=codec), "resid_post[1]", Site("resid_post[2]", compress="none"))
    run = recorded(tmp_path / "run.zarr", *sites)
    assert [column.compress for column in run.select("resid_post")] == [codec, "none", "none"]
    for name in (column.name for column in run.select("resid_post")):
        assert np.array_equal(run[name].rows(), plain[name].rows())
    assert run.verify().ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_sites_read_as_what_the_model_computed_and_state_their_error(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = recorded(tmp_path / "plain.zarr", "resid_post[0]", dtype=dtype)
    run = recorded(tmp_path / "run.zarr", Site("resid_post[0]", quantize="int8", compress="zstd"), dtype=dtype)
    exact, column = plain["resid_post[0]"], run["resid_post[0]"]
    assert (column.dtype, column.shape, column.compress) == (exact.dtype, exact.shape, "zstd")
    assert column.site == exact.site
    values, read = exact.rows().astype(np.float64), column.rows().astype(np.float64)
    relative = np.sqrt(((read - values) ** 2).sum() / (values**2).sum())
    assert 0 < relative < 0.02
    assert column.quantization is not None
    assert column.quantization.relative_rms == pytest.approx(relative, rel=1e-3)  # no outliers in so small a model
    assert exact.quantization is None
    computed = run["resid_post[0]|last"]
    assert (computed.quantization, computed.compress, computed.paths) == (column.quantization, "zstd", column.paths)
    assert computed.stored_bytes == column.stored_bytes


def test_a_resumed_recording_goes_on_in_the_same_way(tmp_path: Path) -> None:
    site = Site("resid_post[0]", quantize="int8", compress="lz4")
    recorded(tmp_path / "run.zarr", site)
    run = recorded(tmp_path / "run.zarr", site)
    column = run["resid_post[0]"]
    assert [path.split("/")[1] for path in column.paths] == ["p000000", "p000001"]
    assert np.array_equal(column[0], column[10])  # the same batch again, under other ids


def test_what_only_goes_with_a_site_stays_exact(tmp_path: Path) -> None:
    """Which keys a query sees is no activation; nor are scales and checks."""
    run = recorded(tmp_path / "run.zarr", Site("attention", quantize="int8", compress="lz4"))
    plain = recorded(tmp_path / "plain.zarr", "attention")
    kept = {column.name.rpartition(":")[2]: column for column in run.sites}
    assert {port: (column.quantization is None, column.compress) for port, column in kept.items()} == {
        "q": (False, "lz4"),
        "k": (False, "lz4"),
        "keys": (True, "none"),
    }
    for layer in range(3):
        assert np.abs(run.attention(layer)[3] - plain.attention(layer)[3]).max() < 0.02


def test_rows_that_lack_a_position_stay_missing(tmp_path: Path) -> None:
    """NaN is what an example without that token has."""
    run = recorded(tmp_path / "run.zarr", Site("resid_post[0]", positions=[4, -1], quantize="int8"))
    column = run["layers.0:out|positions=4,-1"]
    for example, length in enumerate(tiny.LENGTHS):
        assert np.isnan(column[example][0]).all() == (length <= 4)
        assert not np.isnan(column[example][1]).any()


def test_scaled_gradients_are_quantised_and_scaled_back(tmp_path: Path) -> None:
    """A float16 gradient stands beside a scale per example; both are undone on reading."""
    gradients = {}
    for kind in ("int8", None):
        model = tiny.llama()
        sites = Site("resid_post[1]:out.grad", dtype="float16", quantize=kind)
        recorder = Recorder(model, sites=sites, to=tmp_path / f"{kind}.zarr", durability="rename")
        with recorder, recorder.batch(ids=list(range(5))), recorder.target("loss", reduction="sum"):
            model(**tiny.batch("left")).last_hidden_state.square().sum().mul(1e-6).backward()
        gradients[kind] = open_run(tmp_path / f"{kind}.zarr")["resid_post[1]:out.grad"]
    exact, read = gradients[None].rows(), gradients["int8"].rows()
    assert read.dtype == np.float32
    assert np.abs(read - exact).max() < 0.01 * np.abs(exact).max()
    assert gradients["int8"].quantization is not None


def test_a_site_of_integers_cannot_be_quantised(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="is int64, but quantize='int8' is for float16"):
        recorded(tmp_path / "run.zarr", Site("embed_tokens:in[input]", layout="example token ...", quantize="int8"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compress": "gzip"}, "compress is one of none, lz4, zstd, not 'gzip'"),
        ({"quantize": "int4"}, "quantize is one of int8, or None, not 'int4'"),
    ],
)
def test_wrong_names_are_refused_where_they_are_written(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Site("resid_post", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"compress": "lz4"}, {"quantize": "int8"}])
def test_one_site_is_not_kept_in_two_ways(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="selected twice with different options"):
        recorded(tmp_path / "run.zarr", "resid_post", Site("resid_post[0]", **options))  # type: ignore[arg-type]
