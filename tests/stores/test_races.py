"""Writers that begin at the same moment, in threads of one process: exactly one of strangers proceeds, all of one session do."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from strategies import writer_at

from tensortape.stores import open_run
from tensortape.stores.errors import RunExistsError

WRITERS = 8


def race(path: Path, mode: str, sessions: list[str]) -> list[Exception | None]:
    """Each writer appends one example and closes; all begin their first append at once. What each failed with."""
    together = threading.Barrier(WRITERS)
    found: list[Exception | None] = [None] * WRITERS
    writers = [writer_at(path, mode, session=session, rank=rank) for rank, session in enumerate(sessions)]

    def run(rank: int) -> None:
        together.wait()
        try:
            writers[rank].append(ids=[rank], columns={"token/h": [np.full((3, 2), rank, np.float32)]})
            writers[rank].close()
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("attempt", range(5))
def test_of_strangers_that_create_one_run_one_proceeds(path, attempt):
    found = race(path, "create", [f"{rank}" for rank in range(WRITERS)])
    won = [rank for rank, error in enumerate(found) if error is None]
    assert len(won) == 1
    assert all(isinstance(error, RunExistsError) for error in found if error is not None)
    assert open_run(path).ids == won
    assert open_run(path).verify().ok


@pytest.mark.parametrize("mode", ["create", "resume", "overwrite"])
@pytest.mark.parametrize("attempt", range(5))
def test_of_one_session_all_proceed(path, mode, attempt):
    """Also where there was a run, which is renamed aside once."""
    if mode == "overwrite":
        with writer_at(path) as writer:
            writer.append(ids=["old"], columns={"token/h": [np.ones((3, 2), np.float32)]})
    assert race(path, mode, ["one"] * WRITERS) == [None] * WRITERS
    run = open_run(path)
    assert sorted(run.ids) == list(range(WRITERS))
    assert len(run.parts) == WRITERS
    assert run.verify().ok
    aside = [found for found in path.parent.iterdir() if ".old-" in found.name]
    assert len(aside) == (mode == "overwrite")
    assert all(open_run(found).ids == ["old"] for found in aside)
