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
from strategies import FAULTS, flip, random_values, same_bits, seeds, small_chunks, writer_at

from tensortape.stores import Run, RunWriter, StoreError, open_run
from tensortape.stores.leftovers import remove_leftovers
from tensortape.stores.repair import repair_run
from tensortape.stores.verify import verify_run

lengths = st.lists(st.integers(0, 25), min_size=1, max_size=4)

SIZES = {"quick": (8, 25), "long": (200, 50), "endless": (1000, 500)}  # examples, steps
DTYPES = {"token/h": ("bfloat16", (3,)), "token/tag": ("int64", ()), "example/y": ("float32", (2,))}
BASE = frozenset({*DTYPES, "example/text"})
TOP_UP = "token/top"


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
        self.lost: dict[str, dict[str, Any]] = {}  # id -> column -> value: what a repair gave up
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
        self._expect(ids, columns)
        if packed:
            columns |= {name: np.concatenate(columns[name]) for name in ("token/h", "token/tag")}
        with small_chunks():
            self._writer().append(ids=ids, columns=columns, lengths={"token": lengths} if packed else None)
        self._note_automatic_commit()

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def top_up(self, data: st.DataObject) -> None:
        """Another column for examples that the run has."""
        without = [id_ for id_ in self.ids if id_ not in self.cells.get(TOP_UP, {}) and id_ in self.cells.get("token/tag", {})]
        without = [id_ for id_ in without if id_ not in self.pending]
        if without:
            ids = data.draw(st.lists(st.sampled_from(without), unique=True, min_size=1, max_size=4))
            columns = {TOP_UP: [random_values(self.rng, "float16", (len(self.cells["token/tag"][id_]), 2)) for id_ in ids]}
            self._expect(ids, columns)
            with small_chunks():
                self._writer().append(ids=ids, columns=columns)
            self._note_automatic_commit()

    @precondition(lambda self: self.lost)
    @rule()
    def record_again(self) -> None:
        """What a repair gave up; a resumed writer knows what is missing."""
        writer = self._writer()
        for id_, cells in self.lost.items():
            base = {name: [value] for name, value in cells.items() if name in BASE}
            if base:
                assert writer.missing(BASE, id_) == BASE
                self._expect([id_], base)
                with small_chunks():
                    writer.append(ids=[id_], columns=base)
        self.lost = {}
        self.commit()

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

    @precondition(lambda self: self.ids and self.writer is None)
    @rule(data=st.data())
    def damage_and_repair(self, data: st.DataObject) -> None:
        """One byte of any file: reads are right or refused, and a repair gives up nothing without saying so."""
        self.held = None
        files = [file for file in sorted(self.path.rglob("*")) if file.is_file() and "quarantine" not in file.parts]
        file = data.draw(st.sampled_from(files), label="file")
        flip(file, data.draw(st.integers(0, file.stat().st_size - 1)), 1 << data.draw(st.integers(0, 7)))
        if verify_run(self.path).ok:
            self._compare(open_run(self.path), self.ids, self.cells)
        else:
            self._assert_nothing_wrong_is_read()
        done = repair_run(self.path)
        assert verify_run(self.path).ok
        assert not repair_run(self.path).changed
        self._give_up(open_run(self.path), [str(name) for name in done.withdrawn])
        self._compare(open_run(self.path), self.ids, self.cells)

    @rule()
    def remove_leftovers(self) -> None:
        if self.path.exists():
            remove_leftovers(self.path)

    @precondition(lambda self: {id_ for id_ in self.ids if id_ in self.cells.get("token/tag", {})} == set(self.ids) != set())
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

    @precondition(lambda self: set(self.cells) - {"example/text"})
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
            assert not any(id_ in self.writer.committed_ids for id_ in self.pending if id_ not in self.ids)

    # Help.

    def _writer(self) -> RunWriter:
        if self.writer is None:
            self.writer = writer_at(self.path, "resume")
        return self.writer

    def _expect(self, ids: list[str], columns: dict[str, Any]) -> None:
        for name, values in columns.items():
            self.pending_cells.setdefault(name, {}).update(zip(ids, values, strict=True))
        self.pending += ids

    def _note_automatic_commit(self) -> None:
        if not self.writer._uncommitted:
            self._acknowledge()

    def _assert_nothing_wrong_is_read(self) -> None:
        try:
            run = open_run(self.path)
            ids = run.ids
        except StoreError:
            return
        for name, cells in self.cells.items():
            for number, id_ in enumerate(ids):
                try:
                    found = run[name][number]
                except StoreError:
                    continue
                assert found == cells[id_] if name == "example/text" else same_bits(found, cells[id_])

    def _give_up(self, run: Run, named: list[str]) -> None:
        """Take out of the model what the run has no more; all of it must have been named, by id or by number."""
        there = {name: dict(zip(run.ids, run[name].present.tolist(), strict=True)) for name in self.cells if _has(run, name)}
        for name, cells in list(self.cells.items()):
            gone = [id_ for id_ in cells if not there.get(name, {}).get(id_, False)]
            for id_ in gone:
                assert id_ in named or any(one.startswith("number ") for one in named), (id_, name, named)
                self.lost.setdefault(id_, {})[name] = cells.pop(id_)
            if name not in there:
                del self.cells[name]
        assert set(run.ids) == {id_ for cells in self.cells.values() for id_ in cells}
        self.ids = run.ids

    def _acknowledge(self) -> None:
        self.ids += [id_ for id_ in self.pending if id_ not in self.ids]
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


def _has(run: Run, name: str) -> bool:
    table, _, short = name.partition("/")
    return short in run.tables.get(table, {})


def _is_own(name: str) -> bool:
    return name in ("example/id", "example/phase", "example/step") or name.startswith(("example/start.", "example/length."))


TestRunMachine = pytest.mark.slow(RunMachine.TestCase)
TestRunMachine.settings = settings(max_examples=SIZES[FAULTS][0], stateful_step_count=SIZES[FAULTS][1], deadline=None)
