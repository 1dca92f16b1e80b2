"""The examples that train with libraries of Hugging Face: each runs, and goes on from its checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tensortape.stores import open_run

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.mark.parametrize("name", ["train_with_trainer", "train_with_accelerate"])
def test_an_example_trains_and_goes_on(name: str, example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, options = example(name), ["--out", str(tmp_path / "out"), "--every", "4"]
    program.main([*options, "--steps", "6"])
    assert "steps 1 to 6: loss 7." in capsys.readouterr().out
    before = open_run(tmp_path / "out" / "run.zarr")
    program.main([*options, "--steps", "9"])
    assert "steps 1 to 9: loss 7." in capsys.readouterr().out
    run = open_run(tmp_path / "out" / "run.zarr")
    assert run.uid == before.uid
    assert run.verify().ok
    assert run.steps["step"].tolist() == list(range(1, 10))
    assert sorted({key[1:] for key in run.keys}) == [
        *(("probe", step) for step in (0, 4, 6, 8, 9)),
        *(("train", step) for step in (1, 5, 9)),
    ]
    assert run.steps["loss"].iloc[-1] < run.steps["loss"].iloc[0]
    assert run["step/param.transformer.h.0.mlp.c_fc.weight.grad|norm"].rows().min() > 0
