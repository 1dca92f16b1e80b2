"""What the tests of `instrument` share: recorders and runs in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tensortape.instrument import Recorder
from tensortape.stores import Run, open_run


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Recorder]]:
    """Makes recorders, each with a run of its own unless told `to`; closes them at the end."""
    made: list[Recorder] = []
    numbers = count()

    def new(model: Any, sites: Any, **options: Any) -> Recorder:
        to = options.pop("to", None) or tmp_path / f"made{next(numbers)}.zarr"
        made.append(Recorder(model, sites=sites, to=to, durability="rename", **options))
        return made[-1]

    yield new
    for recorder in made:
        recorder.close()


@pytest.fixture
def opened() -> Callable[[Recorder], Run]:
    """Opens the run of a recorder, which is closed first."""

    def run_of(recorder: Recorder) -> Run:
        recorder.close()
        return open_run(recorder.writer.path)

    return run_of


@pytest.fixture
def recorded(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> Callable[..., Run]:
    """Records one forward of a model and opens the run."""

    def one(model: Any, sites: Any, inputs: dict[str, Any], ids: Any = None, **given: Any) -> Run:
        recorder = make(model, sites)
        first = next(iter(inputs.values()))
        with torch.no_grad(), recorder.batch(ids=list(range(len(first))) if ids is None else ids, **given):
            model(**inputs)
        return opened(recorder)

    return one
