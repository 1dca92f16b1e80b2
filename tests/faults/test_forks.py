"""A forked child never commits, wherever in a recording it was forked and however it ends; the parent records on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tensortape.stores import open_run

SCRIPT = """
import os, pathlib, sys
import torch
from tensortape.instrument import Recorder
from tensortape.stores.errors import BrokenWriterError

torch.set_num_threads(1)
path = pathlib.Path(sys.argv[1])
files = lambda: {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}
model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
recorder = Recorder(model, sites=["resid_post"], to=path, durability="rename", background=False)  # whose thread writes on


def forked(end):
    '''Fork; the child uses what it has inherited, then ends in one of three ways.'''
    before, child = files(), os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if end == "exit" else 1 if end == "error" else -9)
        assert files() == before, "the child has written something"
        return
    try:
        recorder.commit()
    except BrokenWriterError as error:
        assert "belongs to the parent process" in str(error)
    else:
        os._exit(77)
    if end == "killed":
        os.kill(os.getpid(), 9)
    if end == "error":
        sys.stderr.close()  # its traceback is of no interest
        raise RuntimeError
    sys.exit(0)  # with its atexit hooks


with torch.no_grad(), recorder:
    for number, states in enumerate(torch.arange(5 * 3 * 5 * 8, dtype=torch.float32).reshape(5, 3, 5, 8)):
        with recorder.batch(ids=[f"{number}-{row}" for row in range(3)]):
            if number == 1:
                forked("exit")
            model(states)
            if number == 2:
                forked("error")
        if number in (3, 4):
            forked(["exit", "killed"][number - 3])
            recorder.commit()
"""


def test_a_forked_child_of_a_recording_writes_nothing(tmp_path: Path) -> None:
    """Within a batch, before and after the forward, and between batches."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "run.zarr")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = open_run(tmp_path / "run.zarr")
    assert run.ids == [f"{number}-{row}" for number in range(5) for row in range(3)]
    assert all(len(rows) == 5 for rows in run["resid_post[1]"][:])
    assert run.verify().ok
