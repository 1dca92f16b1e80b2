"""Columns as dask and xarray arrays: the same rows, read by threads or processes, in blocks that are whole shards."""

from __future__ import annotations

import sys
from pathlib import Path

import dask
import dask.array
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, Feature, feature_shapes, same_bits, seeds, small_chunks, writer_at

from tensortape.stores import Run, lazy_arrays, open_run


def written(path: Path, features: list[Feature], sessions: list[list[int]], seed: int = 0) -> Run:
    """A run of one part per session."""
    rng = np.random.default_rng(seed)
    for number, lengths in enumerate(sessions):
        columns = {feature.name: feature.values(rng, lengths) for feature in features}
        with small_chunks(), writer_at(path, "resume") as writer:
            writer.append(ids=[f"{number}.{i}" for i in range(len(lengths))], columns=columns)
    return open_run(path)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Shards of these tests hold a kilobyte; blocks are to hold few of them."""
    monkeypatch.setattr(lazy_arrays, "BLOCK_BYTES", 1024)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Two parts of 71 and 41 rows in shards of 32, and a column of three examples in another order."""
    features = [Feature("token/h", "bfloat16", (3, 5)), Feature("example/y", "float32", (7,))]
    found = written(tmp_path_factory.mktemp("dask") / "run.zarr", features, [[19, 0, 52], [41]])
    with small_chunks():
        found.add_column("token/late", [found["token/h"][3], found["token/h"][0]], ids=["1.0", "0.0"])
    return open_run(found.path)


sessions = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=4), min_size=1, max_size=3)
features = st.builds(Feature, st.sampled_from(["token/h", "example/h", "pair/h"]), st.sampled_from(sorted(DTYPES)), feature_shapes)


@settings(deadline=None, max_examples=25)
@given(features, sessions, seeds, st.data())
def test_dask_computes_the_rows_of_the_column(tmp_path_factory, feature, sessions, seed, data):
    column = written(tmp_path_factory.mktemp("dask") / "run.zarr", [feature], sessions, seed)[feature.name]
    lazy = column.to_dask()
    assert (lazy.shape, lazy.dtype) == (column.shape, column.dtype)
    with dask.config.set(scheduler="sync"):
        assert same_bits(lazy.compute(), column.rows())
        part = data.draw(st.slices(len(column))) if len(column) else slice(None)
        assert same_bits(lazy[part].compute(), column.rows()[part])
        if len(column):
            number = data.draw(st.integers(0, len(column) - 1))
            assert same_bits(lazy[number].compute(), column.rows(number))
            assert same_bits(lazy[[number, 0]].compute(), column.rows([number, 0]))


def test_blocks_are_whole_shards_and_small_ones_are_joined(run):
    lazy = run["token/h"].to_dask()
    edges = np.cumsum([0, *lazy.chunks[0]])
    assert set(edges) <= set(run["token/h"].edges("shard").tolist())
    assert lazy.chunks[1:] == ((3,), (5,))
    assert 2 < lazy.npartitions <= run["token/h"].nbytes // 1024 + 1


@pytest.mark.parametrize("name", ["token/h", "token/late", "token/h|last"])
def test_threads_and_processes_read_the_same(run, name):
    lazy = run[name].to_dask()
    assert same_bits(lazy.compute(scheduler="threads"), run[name].rows())
    if name == "token/late":
        context = {"scheduler": "processes", "num_workers": 1}
        assert same_bits(lazy.compute(**context), run[name].rows())


def test_nothing_is_read_before_it_is_computed_and_then_only_what_is_needed(run, monkeypatch):
    read: list[tuple[int, int]] = []
    column = open_run(run.path)["token/h"]
    rows = type(column).rows
    monkeypatch.setattr(type(column), "rows", lambda self, chosen: read.append((chosen.start, chosen.stop)) or rows(self, chosen))
    lazy = column.to_dask()
    assert not read
    lazy[3:5].compute(scheduler="sync")
    assert read == [(3, 5)]


def test_the_same_column_is_the_same_array_to_dask(run):
    assert run["token/h"].to_dask().name == run["token/h"].to_dask().name
    assert run["token/h"].to_dask().name != run["token/late"].to_dask().name


def test_xarray_names_axes_and_examples(run):
    found = run["token/h"].to_xarray()
    assert (found.dims, found.name) == (("token", "feature.0", "feature.1"), "h")
    assert isinstance(found.data, dask.array.Array)
    assert found.example.values.tolist() == [0] * 19 + [2] * 52 + [3] * 41
    assert same_bits(found[(found.example == 2).values].compute(scheduler="sync").values, run["token/h"][2])
    late = run["token/late"].to_xarray()
    assert late.example.values.tolist() == [0] * 19 + [3] * 41
    assert same_bits(run["example/y"].to_xarray().sel(example=2).values, run["example/y"][2])


@pytest.mark.parametrize(("method", "missing", "extra"), [("to_dask", "dask.array", "dask"), ("to_xarray", "xarray", "xarray")])
def test_without_the_extra_the_error_names_it(run, monkeypatch, method, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"pip install 'tensortape\[{extra}\]'"):
        getattr(run["token/h"], method)()
