"""Texts from files, folders and data sets, each with an id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import typer

Source = tuple[str, str]


def from_files(paths: list[Path], *, lines: bool, text_column: str) -> list[Source]:
    """(id, text) of every file, folder of files, or line. Ids are paths relative to what was given, with `:line` for lines."""
    return [source for path in paths for source in _read(path, lines=lines, text_column=text_column)]


def from_dataset(name: str, split: str, text_column: str) -> list[Source]:
    """(id, text) of a Hugging Face data set; needs the extra `datasets`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise typer.BadParameter("--dataset needs the datasets package: pip install 'tensortape[datasets]'") from None
    rows = load_dataset(name, split=split)
    if text_column not in rows.column_names:
        raise typer.BadParameter(f"the data set has no column {text_column!r}; it has {', '.join(rows.column_names)}")
    return [(str(number), text) for number, text in enumerate(rows[text_column])]


def _read(path: Path, *, lines: bool, text_column: str) -> Iterator[Source]:
    if not path.exists():
        raise typer.BadParameter(f"there is no file or folder {path}")
    found = sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]
    for file in found:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        yield from _texts(file, name, lines=lines, text_column=text_column)


def _texts(file: Path, name: str, *, lines: bool, text_column: str) -> Iterator[Source]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{file} is not UTF-8 text") from None
    numbered = [(f"{name}:{number}", line) for number, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if file.suffix == ".jsonl":
        yield from ((id_, _field(json.loads(line), text_column, id_)) for id_, line in numbered)
    elif lines:
        yield from numbered
    elif content.strip():
        yield name, content


def _field(row: dict[str, str], column: str, id_: str) -> str:
    if column not in row:
        raise typer.BadParameter(f"{id_} has no field {column!r}; it has {', '.join(row)}")
    return row[column]
