"""A part is written in an order that shows every reader whole examples only, wherever writing stops (P1, P2)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from strategies import small_chunks, writer_at

from tensortape.stores import RunWriter, open_run
from tensortape.stores import writer as writer_module
from tensortape.stores.errors import BrokenWriterError
from tensortape.stores.part_state import read_parts
from tensortape.stores.parts import claim
from tensortape.stores.places import LocalPlace
from tensortape.stores.schema import PartDocument

LENGTHS = [3, 0, 31, 1, 20, 7]


def example(number: int) -> dict[str, Any]:
    """Values that tell their example."""
    rows = np.arange(LENGTHS[number])
    columns = {"token/h": [np.full((len(rows), 3), number) + rows[:, None] / 64], "token/tag": [rows + 100 * number]}
    return {**columns, "example/y": [number / 2], "example/topic": [f"topic {number}"]}


class Stopped(BaseException):
    """What a test raises instead of killing the process."""


class LoggedPlace(LocalPlace):
    """A folder that lists what was done to it, and stops before one operation of them, like a process that is killed there."""

    def __init__(self, root: Path, durability: Any = "rename", *, stop_at: int | None = None) -> None:
        super().__init__(root, durability)
        self.log: list[str] = []
        self.stop_at = stop_at

    def create(self, path: str, buffers: Any) -> None:
        self._begin(path)
        super().create(path, buffers)

    def replace(self, path: str, buffers: Any) -> None:
        self._begin(path)
        super().replace(path, buffers)

    def settle(self) -> None:
        self._begin("settle")
        super().settle()

    def _begin(self, name: str) -> None:
        self.log.append(name)
        if len(self.log) - 1 == self.stop_at:
            if name != "settle":  # a kill leaves the folder and an unfinished file
                self._make_folder((self.root / name).parent)
                (self.root / name).with_name(f".{Path(name).name}.0123.partial").write_bytes(b"half")
            raise Stopped


def write(path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> tuple[LoggedPlace, list[int]]:
    """Six examples in two commits, until writing stops. Returns the place and the examples whose commit returned."""
    place = LoggedPlace(path, stop_at=stop_at)
    monkeypatch.setattr(writer_module, "place_at", lambda *_, **__: place)
    writer, acknowledged = RunWriter(path), []
    with suppress(Stopped), small_chunks(shard_bytes=256):
        for number in range(6):
            writer.append(ids=[f"x{number}"], columns=example(number))
            if number % 3 == 2:
                writer.commit()
                acknowledged = list(range(number + 1))
        writer.close()
    with suppress(BrokenWriterError):
        writer.close()
    return place, acknowledged


def kind(path: str) -> str:
    """Which step of a commit an operation belongs to."""
    if path == "settle":
        return "settle"
    table_and_column = path.removeprefix("parts/p000000/")
    if "/commits/" in path:
        return "list" if path.endswith(".shards") else "record"
    if not path.endswith("zarr.json"):
        return "shard"
    if table_and_column in ("example/id/end/zarr.json", "example/id/zarr.json"):
        return "ids"
    return "bounds" if table_and_column.startswith(("example/start.", "example/length.", "example/id/utf8")) else "shapes"


def test_a_commit_is_written_shards_first_and_record_last(tmp_path, monkeypatch):
    """Data, shapes of columns, bounds of examples, ids, record: each step is settled before the next begins."""
    place, _ = write(tmp_path / "run.zarr", monkeypatch)
    begin = next(number for number, path in enumerate(place.log) if kind(path) == "shard")
    steps = [kind(path) for path in place.log[begin:]]
    assert steps.count("record") == 3
    once = [step for number, step in enumerate(steps) if number == 0 or step != steps[number - 1]]
    for commit in "".join(f"{step} " for step in once).split("record settle ")[:-1]:
        assert commit.split() in (
            ["shard", "settle", "shapes", "settle", "bounds", "settle", "ids", "settle"],
            ["shapes", "settle", "bounds", "settle", "ids", "settle", "list", "settle"],
        )


def examples_of_zarr(path: Path) -> int:
    """A plain Zarr reader's view of the part: every example that its ids list is complete and right in every column. How many."""
    part = path / "parts/p000000"
    if not (part / "example/id/end/zarr.json").exists():
        return 0

    def read(name: str) -> np.ndarray:
        return zarr.open_array(part / name, mode="r")[...]

    ends = read("example/id/end")
    if not len(ends):
        return 0
    text = read("example/id/utf8").tobytes()
    ids = [text[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    starts, lengths = read("example/start.token"), read("example/length.token")
    h, tag, y, topics = read("token/h"), read("token/tag"), read("example/y"), read("example/topic/end")
    assert min(map(len, (starts, lengths, y, topics))) >= len(ids)
    for number, id_ in enumerate(ids):
        expected, rows = example(number), slice(starts[number], starts[number] + lengths[number])
        assert id_ == f"x{number}"
        assert np.array_equal(h[rows], expected["token/h"][0])
        assert np.array_equal(tag[rows], expected["token/tag"][0])
        assert y[number] == expected["example/y"][0]
    return len(ids)


def assert_holds(path: Path, count: int) -> None:
    run = open_run(path)
    assert run.ids == [f"x{number}" for number in range(count)]
    for number in range(count):
        expected = example(number)
        assert np.array_equal(run["token/h"][number], expected["token/h"][0])
        assert np.array_equal(run["token/tag"][number], expected["token/tag"][0])
        assert (run["example/y"][number], run["example/topic"][number]) == (expected["example/y"][0], expected["example/topic"][0])
    assert run.verify().ok


def operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    return len(write(tmp_path / "whole.zarr", monkeypatch)[0].log)


@pytest.mark.slow
def test_p1_p2_wherever_writing_stops_acknowledged_commits_are_whole_and_nothing_else_is_seen(tmp_path, monkeypatch):
    """Stopped before every single operation in turn, which leaves its folder and an unfinished file, as a kill does.

    Our reader shows the acknowledged examples, or one commit more (if only its acknowledgement was lost). A plain Zarr reader that
    goes by `example/id` finds every example it lists complete. A new session goes on from there.
    """
    count = operations(tmp_path, monkeypatch)
    assert count > 80
    unreadable = []
    for stop_at in range(count):
        path = tmp_path / f"{stop_at}.zarr"
        place, acknowledged = write(path, monkeypatch, stop_at)
        monkeypatch.undo()
        assert len(place.log) == stop_at + 1, "nothing is written after the failure"
        if not (path / "zarr.json").exists():
            assert not acknowledged
            continue
        try:
            shown = len(open_run(path))
        except OSError as error:
            unreadable.append((stop_at, place.log[-1], str(error)))
            continue
        assert len(acknowledged) <= shown <= len(acknowledged) + 3
        assert shown % 3 == 0
        assert_holds(path, shown)
        assert examples_of_zarr(path) >= shown
    assert unreadable == []


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_stopped_run_is_resumed_without_a_trace(tmp_path, monkeypatch, share):
    """What was lost is appended again: the run then holds every example once."""
    stop_at = int(operations(tmp_path, monkeypatch) * share)
    write(tmp_path / "run.zarr", monkeypatch, stop_at)
    monkeypatch.undo()
    with writer_at(tmp_path / "run.zarr", "resume") as writer:
        for number in range(6):
            if f"x{number}" not in writer.committed_ids:
                writer.append(ids=[f"x{number}"], columns=example(number))
    assert_holds(tmp_path / "run.zarr", 6)


@pytest.mark.parametrize("stop_at", [0, 1, 2])
@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_a_start_that_was_interrupted_can_be_made_again(tmp_path, monkeypatch, stop_at, mode):
    """A job that is started again and again with mode="resume" must not stop for good because it was killed in its first moment."""
    path = tmp_path / "run.zarr"
    write(path, monkeypatch, stop_at)
    monkeypatch.undo()
    with writer_at(path, mode) as writer:
        for number in range(6):
            writer.append(ids=[f"x{number}"], columns=example(number))
    assert_holds(path, 6)


class ClosingPlace(LocalPlace):
    """A folder in which the writer closes its part just after its commit records were listed."""

    def __init__(self, root: Path, writer: RunWriter) -> None:
        super().__init__(root, "rename")
        self._writer = writer

    def names(self, path: str) -> list[str]:
        found = super().names(path)
        if path.endswith("/commits"):
            self._writer.close()
        return found


def test_p2_a_part_that_is_closed_while_it_is_being_read_is_no_damage(tmp_path):
    """A reader that comes at that moment sees the part before closing, or after."""
    path = tmp_path / "run.zarr"
    writer = writer_at(path)
    for number in range(3):
        writer.append(ids=[f"x{number}"], columns=example(number))
        writer.commit()
    [part] = read_parts(ClosingPlace(path, writer), writer.uid)
    assert part.examples == 3
    assert_holds(path, 3)


def test_every_claim_gets_a_part_of_its_own(tmp_path):
    """P6: whoever claims at the same moment: threads that start together never share a part."""
    place = LocalPlace(tmp_path, "rename")
    place.create("zarr.json", [b"the run document, of which parts keep a copy"])
    together = threading.Barrier(8)

    def claim_some() -> list[str]:
        together.wait()
        return [claim(place, PartDocument("run", "session")).name for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        claims = [claimed.result() for claimed in [pool.submit(claim_some) for _ in range(8)]]
    names = sorted(name for some in claims for name in some)
    assert names == [f"p{number:06d}" for number in range(80)]
    assert all(some == sorted(some) for some in claims)
    assert place.names("parts") == names


def test_what_stands_beside_the_parts_does_not_disturb(tmp_path):
    """A file browser leaves files of its own in every folder it shows."""
    path = tmp_path / "run.zarr"
    with writer_at(path) as writer:
        writer.append(ids=["x0"], columns=example(0))
    for folder in (path, path / "parts", path / "parts/p000000", path / "parts/p000000/commits"):
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    with writer_at(path, "resume") as writer:
        writer.append(ids=["x1"], columns=example(1))
    assert_holds(path, 2)
