"""Runs made to do harm. Whatever their documents and rows say, reading them leaves no run, takes no time and no memory to speak of.

Checksums are right throughout: who makes such a run computes them too.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # noqa: F401 - the first import would count as time of the first trial
import pytest
from strategies import put, small_chunks

from tensortape.app import show
from tensortape.stores import Run, StoreError, commits, open_run, parts
from tensortape.stores.ragged import Cells

from .recipe import Recipe, append, writing

RECIPE = Recipe(51, 2, 9)
SECONDS, BYTES = 2.0, 256 << 20
RECORD, ROOT, PART = commits.path_of("p000000", 1), "zarr.json", "parts/p000000/zarr.json"
Json = dict[str, Any]


# Documents.


def rewritten(path: Path, name: str, change: Callable[[Json], object]) -> None:
    """Change what a document says, and put right whatever vouches for it."""
    content = (path / name).read_bytes()
    document = json.loads(content)["record"] if name == RECORD else json.loads(content)
    change(document)
    text = json.dumps(document).encode()
    put(path / name, commits._framed(text) if name == RECORD else text)
    if name == PART:
        rewritten(path, RECORD, lambda record: record.update(document=commits.digest(text)))


def _of_h(**changes: Any) -> Callable[[Json], object]:
    """Change the schema of one array."""
    return lambda record: record["columns"]["token/h"]["arrays"]["values"].update(changes)


def _rows(count: int) -> Callable[[Json], object]:
    def change(record: Json) -> None:
        record["rows"]["example"] = count
        for array in record["arrays"].values():
            array["rows"] = count

    return change


def _nested(document: Json) -> None:
    document["attributes"] = json.loads("[" * 900 + "]" * 900)


def _said(document: Json) -> Json:
    said: Json = document["attributes"]["tensortape"]
    return said


def _outside(path: Path, name: str) -> Path:
    """What used to be in the run is outside of it now, and a link leads there."""
    there = path.parent / "outside" / "moved"
    (path / name).rename(there)
    (path / name).symlink_to(there)
    return there


def _pipe(path: Path, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)


def _sparse(path: Path, name: str) -> None:
    """A file of 1 TiB that takes no room."""
    content = (path / name).read_bytes()
    (path / name).unlink()
    with (path / name).open("wb") as file:
        file.write(content)
        file.truncate(1 << 40)


def _text(path: Path, name: str, found: bytes, instead: bytes) -> None:
    put(path / name, (path / name).read_bytes().replace(found, instead, 1))


SHARD = "parts/p000000/token/h/c.0.0"
FILES: dict[str, Callable[[Path], object]] = {
    "a shard that is a link": lambda path: _outside(path, SHARD),
    "a record that is a link": lambda path: _outside(path, RECORD),
    "a column that is a link": lambda path: _outside(path, "parts/p000000/token/h"),
    "parts that are a link": lambda path: _outside(path, "parts"),
    "a root document that is a link": lambda path: _outside(path, ROOT),
    "a shard that is a pipe": lambda path: _pipe(path, SHARD),
    "a root document that is a pipe": lambda path: _pipe(path, ROOT),
    "a root document of 1 TiB": lambda path: _sparse(path, ROOT),
    "a record of 1 TiB": lambda path: _sparse(path, RECORD),
    "a shard of 1 TiB": lambda path: _sparse(path, SHARD),
    "an array document of 1 TiB": lambda path: _sparse(path, "parts/p000000/token/h/zarr.json"),
    "a member twice": lambda path: _text(path, ROOT, b'"attributes"', b'"attributes": {}, "attributes"'),
    "NaN": lambda path: _text(path, ROOT, b'"attributes"', b'"x": NaN, "attributes"'),
    "100,000 nested lists": lambda path: put(path / ROOT, b"[" * 100_000),
    "a million lists": lambda path: put(path / ROOT, b"[" + b"[]," * (5 << 20) + b"[]]"),
    "a number of a million digits": lambda path: put(path / ROOT, b"1" * 1_000_000),
    "UTF-16": lambda path: put(path / ROOT, (path / ROOT).read_text().encode("utf-16")),
}


DOCUMENTS: dict[str, tuple[str, Callable[[Json], object]]] = {
    "a path out of the run": (RECORD, _of_h(path="../../../outside/secret")),
    "an absolute path": (RECORD, _of_h(path="/outside/secret")),
    "the path of the root": (RECORD, _of_h(path="../..")),
    "2^62 rows": (RECORD, _rows(1 << 62)),
    "-1 rows": (RECORD, _rows(-1)),
    "chunks without rows": (RECORD, _of_h(chunk=[0, 7])),
    "chunks of 2^40 rows": (RECORD, _of_h(chunk=[1 << 40, 7], shard=[1 << 40, 7])),
    "shards of 2^40 chunks": (RECORD, _of_h(chunk=[1, 7], shard=[1 << 40, 7])),
    "rows of 2^40 values": (RECORD, _of_h(shape=[1 << 40], chunk=[1, 1 << 40], shard=[1, 1 << 40])),
    "a dtype that is code": (RECORD, _of_h(dtype="__import__('os')")),
    "900 nested lists": (ROOT, _nested),
    "a shape below zero": (RECORD, _of_h(shape=[-7])),
    "a shape of 2^62 values": (RECORD, lambda record: record["columns"]["token/h"].update(shape=[1 << 62])),
    "a pickle codec": (RECORD, _of_h(codec="pickle")),
    "the dtype of objects": (RECORD, lambda record: record["columns"]["token/h"].update(dtype="object")),
    "another column's array": (RECORD, _of_h(path="token/u")),
    "shards without number": (RECORD, lambda record: record["arrays"]["token/h"].update(shards={"x": [1, "00000000"]})),
    "a shard too many": (RECORD, lambda record: record["arrays"]["token/h"]["shards"].update({"99": [1, "00000000"]})),
    "a text where a number is due": (RECORD, lambda record: record["rows"].update(token="7")),
    "true for a number": (RECORD, lambda record: record["rows"].update(example=True)),
    "withdrawn to 2^62": (RECORD, lambda record: record.update(withdrawn=[[0, 1 << 62]])),
    "in line with itself": (RECORD, lambda record: record.update(aligned=[["p000000", 0, 10]])),
    "a list of shards elsewhere": (RECORD, lambda record: record.update(checkpoint={"file": "../../x", "arrays": {}})),
    "an asset elsewhere": (RECORD, lambda record: record.update(assets={"../../outside/secret": "0" * 64})),
    "a copy of something else": (RECORD, lambda record: record.update(copies={"../outside/secret": ""})),
    "a name that drives a terminal": (ROOT, lambda document: _said(document).update(model={"class": "\x1b]0;x\x07"})),
    "a part of another kind": (PART, lambda document: document["attributes"]["tensortape"]["part"].update(kind=["x"])),
}


def hostile_documents(folder: Path) -> Iterator[list[str]]:
    """One trial per attack on a document."""
    for attack, (name, change) in DOCUMENTS.items():
        yield from _trial(folder, attack, lambda path, name=name, change=change: rewritten(path, name, change))


def hostile_files(folder: Path) -> Iterator[list[str]]:
    """One trial per attack on files themselves."""
    for attack, change in FILES.items():
        yield from _trial(folder, attack, change)
        shutil.rmtree(folder / "outside")


def mutated_documents(folder: Path, count: int, seed: int) -> Iterator[list[str]]:
    """One trial per seed: some node of a document is something else, or gone."""
    for number in range(seed, seed + count):
        dice = random.Random(number)
        name = dice.choice([RECORD, RECORD, RECORD, ROOT, PART])
        mutate = lambda path, name=name, dice=dice: rewritten(path, name, lambda document: _mutate(document, dice))  # noqa: E731
        yield from _trial(folder, f"mutation {number} of {name}", mutate)


def _mutate(document: Json, dice: random.Random) -> None:
    holder, key = dice.choice(list(_nodes(document)))
    if isinstance(holder, dict) and dice.random() < 0.2:
        del holder[key]
        return
    plain = [None, True, -1, 0, 1 << 62, 1 << 200, 1.5, float("nan"), "", "x", "../../../outside/secret", "\0", [], {}]
    holder[key] = dice.choice([*plain, [1 << 40, 1 << 40], ["x", -1], {"x": 1}])


def _nodes(document: Any) -> Iterator[tuple[Any, Any]]:
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in list(items):
        yield document, key
        yield from _nodes(value)


# Rows.


def _starts(value: int) -> Callable[..., dict[str, Cells]]:
    """`start` and `length` that say other rows than there are."""

    def columns(lengths: Any, rows: Any) -> dict[str, Cells]:
        name, length = "example/{}.token", next(iter(lengths.values()))
        said = {"start": np.full(len(length), value), "length": np.full(len(length), abs(value))}
        return {name.format(kind): Cells("int64", (), [values], None) for kind, values in said.items()}

    return columns


def _texts(ends: Callable[[Any], Any], content: bytes = b"a" * 40) -> Callable[..., tuple[Any, Any]]:
    """Texts whose ends, or bytes, are not those of texts."""
    return lambda block, offset: (np.frombuffer(content, np.uint8), ends(np.arange(len(block), dtype=np.int64)))


ROWS: dict[str, tuple[str, Callable[..., Any]]] = {
    "examples that begin before the table": ("start_columns", _starts(-(1 << 40))),
    "examples of 2^60 rows": ("start_columns", _starts(1 << 60)),
    "texts that end at 2^60": ("text_bytes", _texts(lambda at: at + (1 << 60))),
    "texts that end before they begin": ("text_bytes", _texts(lambda at: 30 - at)),
    "texts that end before the first": ("text_bytes", _texts(lambda at: -at - 7)),
    "examples that all have all rows": ("start_columns", _starts(0)),
    "texts that are no UTF-8": ("text_bytes", _texts(lambda at: at + 1, b"\xff" * 40)),
}


def hostile_rows(folder: Path) -> Iterator[list[str]]:
    """One trial per attack on what rows say of other rows."""
    for attack, (name, instead) in ROWS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, name, instead)
            yield from _trial(folder, attack, lambda path: None)


# What must hold.


def _trial(folder: Path, attack: str, change: Callable[[Path], object]) -> Iterator[list[str]]:
    path = folder / "run.zarr"
    (folder / "outside").mkdir(exist_ok=True)
    with small_chunks(shard_bytes=256), writing(path) as writer:
        append(writer, RECIPE, lambda number: None, RECIPE.appends)
    for name in (commits.path_of("p000000", 2), commits.end_path("p000000")):  # an open part of one record, which is rewritten
        (path / name).unlink()
    change(path)
    with watched(folder / "outside") as harm:
        harm += read_everything(path)
    yield [f"{attack}: {what}" for what in harm]
    shutil.rmtree(path)


def read_everything(path: Path) -> Iterator[str]:
    """Read all that a run has, in every way; what was raised that is no error of ours."""
    try:
        with suppress(StoreError):
            run = open_run(path)
            for read in (run.verify, lambda: run.keys, lambda: repr(run), lambda: run.examples, lambda: info_of(run)):
                with suppress(StoreError):
                    read()
            for read in _column_reads(run):
                with suppress(StoreError, IndexError):
                    read()
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        yield f"another error than ours: {error!r:.200} at {Path(at.filename).name}:{at.lineno}"


def info_of(run: Run) -> list[str]:
    """What the command line prints of it."""
    return [line.encode() and line for line in show.info_lines(show.info(run))]


def _column_reads(run: Run) -> Iterator[Callable[[], Any]]:
    for table in run.tables.values():
        for column in table.values():
            yield column.rows
            yield from (lambda column=column, n=number: column[n] for number in (0, 4, 9))


@contextmanager
def watched(outside: Path) -> Iterator[list[str]]:
    """What happens besides: files opened outside of the run, seconds, bytes."""
    harm, opened = list[str](), list[str]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    _WATCHERS.append(opened)
    began, before = time.perf_counter(), _peak()
    yield harm
    _WATCHERS.remove(opened)
    if time.perf_counter() - began > SECONDS:
        harm.append("it took too long")
    if _peak() - before > BYTES:
        harm.append("it took too much memory")
    if any(Path(name).resolve().is_relative_to(outside) for name in opened):
        harm.append("a file outside the run was opened")


_WATCHERS: list[list[str]] = []


def _opening(event: str, arguments: Any) -> None:
    if event == "open" and _WATCHERS and isinstance(arguments[0], str):
        _WATCHERS[-1].append(arguments[0])


sys.addaudithook(_opening)


def _peak() -> int:
    """The largest memory the process has had since the peak began anew, as Linux counts it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
