"""Columns of coordinates and their basis: together, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores.basis import Basis
from tensortape.stores.errors import DamagedError, SchemaError, StoreError, UnknownColumnError
from tensortape.stores.projected import ProjectedColumn
from tensortape.stores.verify import verify_run

NAME = "token/m:out|pca2"


def basis(seed: int = 0, k: int = 2) -> Basis:
    components = np.linalg.qr(np.random.default_rng(seed).normal(size=(5, k)))[0].T.astype(np.float32)
    return Basis(np.arange(5, dtype=np.float32), np.ascontiguousarray(components), np.arange(k, 0.0, -1), 7.5, 1234)


def write(path: Path, found: Basis, ids: list[str], *, mode: str = "create", said: object = None, keep: bool = True) -> None:
    """Two coordinates per token of some examples."""
    with RunWriter(path, mode=mode, durability="rename") as writer:  # type: ignore[arg-type]
        stated = {"asset": found.asset, "digest": found.digest} if said is None else said
        site = {"path": "m", "port": "out", "call": 1, "reduce": "pca2", "projection": stated}
        writer.describe(NAME, site=site)
        if keep:
            writer.add_asset(found.asset, found.content)
        rows = [np.full((3, 2), len(id_), np.float32) for id_ in ids]
        writer.append(ids=ids, columns={NAME: rows, f"{NAME}|residual": [row[:, 0] for row in rows]})


def column(path: Path) -> ProjectedColumn:
    found = open_run(path)[NAME]
    assert isinstance(found, ProjectedColumn)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    write(tmp_path / "r.zarr", basis(), ["a", "bb"])
    return open_run(tmp_path / "r.zarr")


def test_a_basis_is_a_safetensors_file(run: Run) -> None:
    """Which safetensors itself reads."""
    found, expected = safetensors.numpy.load(run.asset(basis().asset)), basis()
    assert np.array_equal(found["mean"], expected.mean)
    assert np.array_equal(found["components"], expected.components)
    assert (found["total"].tolist(), found["tokens"].tolist()) == ([7.5], [1234])


def test_a_basis_comes_back(run: Run) -> None:
    found = column(run.path)
    assert found.basis.digest == basis().digest
    assert (found.basis.total, found.basis.tokens, found.basis.explained) == (7.5, 1234, 3 / 7.5)
    assert np.allclose(found.reconstructed(1), 2 * basis().components.sum(0) + np.arange(5))
    assert found.residual[1].tolist() == [2, 2, 2]
    assert "40.0% of the variance of 1234 tokens" in repr(found.basis)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm", [Path.unlink, _flip, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(basis(1).content)]
)
def test_a_lost_or_damaged_basis_is_no_basis(run: Run, harm: object) -> None:
    """Every way to read a value says so, and verify() names the file and the examples; the rest of the run is as it was."""
    harm(run.path / "assets" / basis().asset)  # type: ignore[operator]
    found = column(run.path)
    for reading in (
        lambda: found[0],
        lambda: found.rows([0, 1]),
        lambda: found.rows(),
        lambda: list(found.blocks()),
        lambda: found.within(0, 0, 1),
        lambda: found.to_torch(),
        lambda: found.reconstructed(0),
        lambda: found.basis,
    ):
        with pytest.raises(DamagedError, match=f"assets/{basis().asset}"):
            reading()  # type: ignore[no-untyped-call]
    (damage,) = open_run(run.path).verify().damaged
    assert (damage.path, damage.first, damage.last) == (f"assets/{basis().asset}", "a", "bb")
    assert open_run(run.path)[f"{NAME}|residual"][0].tolist() == [1, 1, 1]


def test_parts_with_one_basis_and_with_several(run: Run) -> None:
    write(run.path, basis(), ["ccc"], mode="resume")
    assert [rows[0, 0] for rows in column(run.path)[:]] == [1, 2, 3]
    with pytest.raises(SchemaError, match="recorded in another way before: projection was"):
        write(run.path, basis(1), ["dddd"], mode="resume")
    assert open_run(run.path).verify().ok


def test_a_basis_that_is_not_of_the_column(tmp_path: Path) -> None:
    write(tmp_path / "r.zarr", basis(k=3), ["a"])
    with pytest.raises(DamagedError, match="does not fit"):
        column(tmp_path / "r.zarr")[0]


def test_a_residual_that_is_not_there(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "r.zarr", durability="rename") as writer:
        writer.describe(NAME, site={"path": "m", "port": "out", "call": 1, "projection": {"asset": "a", "digest": "b"}})
        writer.append(ids=["a"], columns={NAME: [np.zeros((1, 2))]})
    with pytest.raises(UnknownColumnError, match="residual"):
        column(tmp_path / "r.zarr").residual  # noqa: B018


@pytest.mark.parametrize("said", ["x", ["asset"], {"asset": "../../etc/passwd", "digest": ""}, {"digest": 3}, 7])
def test_hostile_metadata(tmp_path: Path, said: object) -> None:
    write(tmp_path / "r.zarr", basis(), ["a"], said=said)
    with pytest.raises(DamagedError):
        column(tmp_path / "r.zarr")[0]
    assert not verify_run(tmp_path / "r.zarr").ok


@given(st.binary(max_size=200))
def test_any_bytes_for_a_basis(content: bytes) -> None:
    """Even under their own digest: an error of ours, or a basis."""
    import hashlib

    with pytest.raises(StoreError):
        Basis.from_content(content, hashlib.sha256(content).hexdigest(), "assets/x")
