"""Copies to the host that arrive later. Without an accelerator the streams are torch's own for the CPU, which do nothing beside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tensortape.instrument import Recorder, Site, transfer
from tensortape.instrument.transfer import Transfer
from tensortape.stores import open_run

DEVICES = [torch.device("cpu"), *(torch.device("cuda", number) for number in range(torch.cuda.device_count()))]


@pytest.fixture
def later(monkeypatch):
    """Every device is taken for one whose copies arrive later."""
    monkeypatch.setattr(transfer, "is_asynchronous", lambda device: True)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_values_have_arrived_when_they_are_said_to(later, device, dtype):
    rows = (torch.randn(7, 3, 5, device=device) * 20).to(dtype)
    found = Transfer()
    array = found.bring("token/h", rows)
    assert found.arrived() == {"token/h": 0}
    again = torch.from_numpy(array.view(np.uint8).copy()).view(dtype)
    assert again.tolist() == rows.cpu().tolist()


def test_rows_that_are_not_finite_are_counted(later):
    rows = torch.zeros(5, 3)
    rows[1, 2], rows[3, 0], rows[3, 1] = float("nan"), float("inf"), float("-inf")
    found, now = Transfer(), torch.zeros(0, 3)
    found.bring("token/h", rows)
    found.bring("token/empty", now)
    assert found.arrived() == found.arrived() == {"token/h": 2, "token/empty": 0}


@pytest.mark.parametrize("background", [True, False])
def test_a_recording_is_the_same(later, tmp_path, background, monkeypatch):
    """Also where the values of the first batch decide how a column is coded, and where a resumed run has part of a batch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    batches = torch.randn(4, 2, 5)
    for name, patched in (("later", True), ("now", False)):
        monkeypatch.setattr(transfer, "is_asynchronous", lambda device, patched=patched: patched)
        for mode, first in (("create", 0), ("resume", 1)):
            sites = ["0", Site("1", quantize="int8")]
            to = tmp_path / f"{name}.zarr"
            with Recorder(model, sites=sites, to=to, mode=mode, background=background) as recorder:
                for number, batch in enumerate(batches[:3] if mode == "create" else batches):
                    ids = [2 * number + first, 2 * number + first + 1]
                    with torch.no_grad(), recorder.batch(ids=ids):
                        model(batch)
    assert open_run(tmp_path / "later.zarr").digest() == open_run(tmp_path / "now.zarr").digest()
    assert open_run(tmp_path / "later.zarr").verify().ok
