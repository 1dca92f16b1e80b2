"""Random sequences of what a user may do with a run, compared with a plain dict."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from strategies import random_values, same_bits, seeds, small_chunks, writer_at

from tensortape.stores import Run, RunWriter, open_run

lengths = st.lists(st.integers(0, 25), min_size=1, max_size=4)

DTYPES = {"token/h": ("bfloat16", (3,)), "token/tag": ("int64", ()), "example/y": ("float32", (2,))}


class RunMachine(RuleBasedStateMachine):
    """A run of one writer at a time; readers come at any moment. `cells` holds column -> id -> value of all committed examples."""

    @initialize(seed=seeds)
    def start(self, seed: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "run.zarr"
        self.rng = np.random.default_rng(seed)
        self.writer: RunWriter | None = None
        self.held: tuple[Run, list[str], dict[str, dict[str, Any]]] | None = None
        self.ids: list[str] = []
        self.cells: dict[str, dict[str, Any]] = {}
        self.pending: list[str] = []
        self.pending_cells: dict[str, dict[str, Any]] = {}
        self.count = self.added = 0

    def teardown(self) -> None:
        if self.writer is not None:
            self.writer.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Writing.

    @rule(lengths=lengths, packed=st.booleans())
    def append(self, lengths: list[int], packed: bool) -> None:
        ids = [f"x{self.count + number}" for number in range(len(lengths))]
        self.count += len(ids)
        columns: dict[str, Any] = {"example/text": [f"text of {id_}" for id_ in ids]}
        for name, (dtype, shape) in DTYPES.items():
            ragged = name.startswith("token/")
            columns[name] = [random_values(self.rng, dtype, (length, *shape) if ragged else shape) for length in lengths]
        for name, values in columns.items():
            self.pending_cells.setdefault(name, {}).update(zip(ids, values, strict=True))
        self.pending += ids
        if packed:
            columns |= {name: np.concatenate(columns[name]) for name in ("token/h", "token/tag")}
        with small_chunks():
            self._writer().append(ids=ids, columns=columns, lengths={"token": lengths} if packed else None)
        self._note_automatic_commit()

    @precondition(lambda self: self.writer is not None)
    @rule()
    def commit(self) -> None:
        self.writer.commit()
        self._acknowledge()

    @precondition(lambda self: self.writer is not None)
    @rule()
    def close(self) -> None:
        self.writer.close()
        self._acknowledge()
        self.writer = None

    @precondition(lambda self: self.writer is not None)
    @rule()
    def abandon(self) -> None:
        """The process of the writer ends without a word; a new session will come."""
        self.writer._broken = RuntimeError("abandoned by the test")
        self.writer, self.pending, self.pending_cells = None, [], {}

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), everyone=st.booleans())
    def add_column(self, data: st.DataObject, everyone: bool) -> None:
        name = f"{data.draw(st.sampled_from(['token', 'example']))}/added{self.added}"
        self.added += 1
        ids = self.ids if everyone else data.draw(st.lists(st.sampled_from(self.ids), unique=True, min_size=1))
        ragged = name.startswith("token/")
        values = [random_values(self.rng, "float16", (len(self.cells["token/tag"][id_]),) if ragged else ()) for id_ in ids]
        run = open_run(self.path)
        run.add_column(name, values if ragged else np.stack(values), ids=None if everyone else ids)
        self.cells[name] = dict(zip(ids, values, strict=True))

    # Reading.

    @rule()
    def open_and_hold(self) -> None:
        """A snapshot that is looked at again after anything else has happened."""
        if self.ids:
            self.held = open_run(self.path), list(self.ids), {name: dict(cells) for name, cells in self.cells.items()}

    @precondition(lambda self: self.held is not None)
    @rule()
    def read_what_is_held(self) -> None:
        self._compare(*self.held)

    @precondition(lambda self: self.ids)
    @rule()
    def open_and_read_everything(self) -> None:
        self._compare(open_run(self.path), self.ids, self.cells)

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def read_some_rows(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.cells) - {"example/text"})))
        column = open_run(self.path)[name]
        expected = self._rows(name)
        assert len(column) == len(expected)
        if len(expected):
            picked = data.draw(st.slices(len(expected)))
            assert same_bits(column.rows(picked), expected[picked])
            numbers = data.draw(st.lists(st.integers(-len(expected), len(expected) - 1), min_size=1, max_size=20))
            assert same_bits(column.rows(numbers), expected[numbers])
            start = data.draw(st.integers(0, len(expected)))
            assert same_bits(column.rows(slice(start, start + 9)), expected[start : start + 9])

    @precondition(lambda self: self.ids)
    @rule()
    def verify(self) -> None:
        report = open_run(self.path).verify()
        assert report.ok, report

    @invariant()
    def committed_ids_are_those_of_the_model(self) -> None:
        if getattr(self, "writer", None) is not None:
            assert len(self.writer.committed_ids) == len(self.ids)
            assert all(id_ in self.writer.committed_ids for id_ in self.ids)
            assert not any(id_ in self.writer.committed_ids for id_ in self.pending)

    # Help.

    def _writer(self) -> RunWriter:
        if self.writer is None:
            self.writer = writer_at(self.path, "resume")
        return self.writer

    def _note_automatic_commit(self) -> None:
        if self.pending[-1] in self.writer.committed_ids:
            self._acknowledge()

    def _acknowledge(self) -> None:
        self.ids += self.pending
        for name, cells in self.pending_cells.items():
            self.cells.setdefault(name, {}).update(cells)
        self.pending, self.pending_cells = [], {}

    def _rows(self, name: str) -> np.ndarray:
        values = [self.cells[name][id_] for id_ in self.ids if id_ in self.cells[name]]
        return np.concatenate(values) if name.startswith("token/") else np.stack(values)

    def _compare(self, run: Run, ids: list[str], cells: dict[str, dict[str, Any]]) -> None:
        assert run.ids == ids
        assert {column.name for table in run.tables.values() for column in table.values() if not _is_own(column.name)} == set(cells)
        for name, expected in cells.items():
            column = run[name]
            assert column.present.tolist() == [id_ in expected for id_ in ids]
            for number, id_ in enumerate(ids):
                if id_ in expected:
                    assert column[number] == expected[id_] if name == "example/text" else same_bits(column[number], expected[id_])


def _is_own(name: str) -> bool:
    return name in ("example/id", "example/phase", "example/step") or name.startswith(("example/start.", "example/length."))


TestRunMachine = pytest.mark.slow(RunMachine.TestCase)
TestRunMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
