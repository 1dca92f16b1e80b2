"""Promises about the code itself: what imports what, who registers hooks, what is packaged."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import gpt2

from tensortape.instrument.families import FAMILIES, Family, family_of

ROOT = Path(__file__).parents[2]
_LOOPS = {"trainer": "transformers", "lightning": "lightning"}
FILES = sorted((ROOT / "instrument").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in it."""
    package = ["tensortape", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            yield ".".join(part for part in (parent, node.module or "") if part)


def test_there_is_something_to_look_at() -> None:
    """Guards the tests below against looking at an empty folder."""
    assert len(FILES) > 25
    assert ROOT / "instrument" / "taps.py" in FILES
    assert any(name.startswith("tensortape.stores") for path in FILES for name in imports(path))


def test_one_file_registers_hooks() -> None:
    """Only taps.py names a function that registers a hook."""
    found = {
        path.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        for name in [getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "value", None)]
        if isinstance(name, str) and name.startswith("register_") and name.endswith("hook")
    }
    assert found == {"taps.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_instrument_imports_only_stores(path: Path) -> None:
    """Dependencies point one way: never to analyses or app, nor to transformers, which a torch user may not have wanted."""
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("tensortape.")}
    assert ours <= {"instrument", "stores"}
    own = path.stem if path.parent.name == "loops" else ""  # the library that a loop's recorder is for
    others = {"transformers", "lightning", "accelerate", "analyses", "app", "stores", "instrument"}
    assert not {name.partition(".")[0] for name in imports(path)} & others - {_LOOPS.get(own, "")}


def test_every_family_table_is_listed() -> None:
    """A table that is not in families/tables.py would never be used."""
    folder = ROOT / "instrument" / "families"
    tables = {path.stem for path in folder.glob("*.py")} - {"__init__", "family", "tables"}
    listed = {
        alias.name
        for node in ast.walk(ast.parse((folder / "tables.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is None
        for alias in node.names
    }
    assert tables == listed
    assert len(FAMILIES) == len(tables)
    assert all(isinstance(family, Family) for family in FAMILIES)


def test_no_model_type_is_in_two_tables() -> None:
    """A model goes by one table, which family_of finds."""
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(kinds) == len(set(kinds))
    assert all(kind in family_of(kind).model_types for kind in kinds)
    assert family_of("gpt2") is not family_of("llama")
    assert family_of("no such model") is family_of("") is None
    assert family_of(gpt2().config.model_type) is not None


def test_packages_are_the_folders() -> None:
    """The list in pyproject.toml equals the folders that are packages, and maps to them."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        f"tensortape.{path.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for top in ("instrument", "stores", "analyses", "app")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == folders
    assert setuptools["package-dir"] == {f"tensortape.{top}": top for top in ("instrument", "stores", "analyses", "app")}
