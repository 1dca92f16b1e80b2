"""Some tokens, or one row per example: while recording, and on reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch

from tensortape.instrument import Recorder, Site
from tensortape.stores import Run, open_run
from tensortape.stores.errors import UnknownColumnError


def recorded(path: Path, *sites: str | Site, dtype: torch.dtype = torch.float32) -> Run:
    model = tiny.llama().to(dtype)
    recorder = Recorder(model, sites=sites, to=path / "r.zarr", durability="rename")
    with torch.no_grad(), recorder, recorder.batch(ids=list("abcde")):
        model(**tiny.batch("left"))
    return open_run(path / "r.zarr")


def test_chosen_positions(tmp_path: Path) -> None:
    """Rows of the named tokens, NaN where an example is too short for them."""
    run = recorded(tmp_path, "resid_post[1]", Site("resid_post[1]", positions=[0, -1, 4]))
    column = run["layers.1:out|positions=0,-1,4"]
    assert column.shape == (5, 3, tiny.HIDDEN)
    for example, length in enumerate(tiny.LENGTHS):
        whole = run["layers.1:out"][example]
        assert np.array_equal(column[example][:2], whole[[0, -1]])
        assert np.array_equal(column[example][2], whole[4]) if length > 4 else np.isnan(column[example][2]).all()


def test_positions_go_without_a_reduction() -> None:
    with pytest.raises(ValueError, match="positions="):
        Site("resid_post", positions=[0], reduce="mean")
    with pytest.raises(ValueError, match="positions="):
        Site("attention", positions=[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mean", "max", "first", "last"])
def test_reductions_on_reading_are_those_of_recording(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """`run["site|mean"]` is what Site(reduce="mean") stores."""
    run = recorded(tmp_path, "resid_post[0]", Site("resid_post[2]", reduce=kind), "resid_post[2]", dtype=dtype)
    stored = run[f"example/layers.2:out|{kind}"]
    computed = run[f"token/layers.2:out|{kind}"]
    assert computed.shape == stored.shape
    step = 2**-7 if dtype == torch.bfloat16 else 1e-6  # sums may be taken in another order
    assert np.allclose(computed.rows().astype(np.float32), stored.rows().astype(np.float32), rtol=step, atol=step)
    assert run[f"resid_post[2]|{kind}"].name.startswith("example/")
    assert run[f"resid_post[0]|{kind}"][3].shape == (tiny.HIDDEN,)
    assert np.array_equal(run[f"resid_post[0]|{kind}"].rows([1, 0]), run[f"resid_post[0]|{kind}"].rows()[[1, 0]])


def test_unknown_reductions(tmp_path: Path) -> None:
    run = recorded(tmp_path, "resid_post[0]")
    with pytest.raises(UnknownColumnError):
        run["resid_post[0]|median"]
    with pytest.raises(UnknownColumnError):
        run["resid_post[2]|mean"]
