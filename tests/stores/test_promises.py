"""Structure of stores: what it imports and what it leaves alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tensortape.stores
from tensortape.stores import errors

FOLDER = Path(__file__).parents[2] / "stores"
FILES = sorted(FOLDER.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Absolute names of the modules a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_there_are_files_to_look_at():
    assert {"writer.py", "reader.py", "shards.py"} <= {file.name for file in FILES}


@pytest.mark.parametrize("module", ["tensortape.stores", "tensortape.stores.dtypes"])
def test_importing_stores_does_not_import_torch(module):
    code = f'import sys, {module}; assert "torch" not in sys.modules; assert "transformers" not in sys.modules'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(FOLDER).as_posix())
def test_stores_imports_nothing_else_of_ours(file):
    """Dependencies point one way: no absolute import of the package, no relative one out of the folder."""
    depth = len(file.relative_to(FOLDER).parts)
    for name in imported(file):
        assert not name.startswith("tensortape")
        assert len(name) - len(name.lstrip(".")) <= depth


def test_a_run_is_written_and_read_without_torch(tmp_path):
    """An analysis machine may have no torch at all."""
    code = """
import sys
sys.modules["torch"] = None  # any import of it fails
import numpy as np
from tensortape.stores import RunWriter, open_run
with RunWriter(sys.argv[1], durability="rename") as writer:
    writer.append(ids=["a"], columns={"token/h": [np.ones((3, 2), np.float16)], "example/t": ["x"]})
run = open_run(sys.argv[1])
run.add_column("token/tag", [[1, 2, 3]])
assert run["token/h"].rows().sum() == 6 and run.tokens["tag"].tolist() == [1, 2, 3] and run.verify().ok
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.zarr")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_in_stores_can_execute_what_a_run_holds():
    """P13: no pickle, no eval: reading an untrusted run executes no code."""
    for file in FILES:
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__"}, file.name
        assert not imported(file) & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, file.name


def test_public_names():
    public = ["Column", "Damage", "Run", "RunWriter", "StoreError", "Table", "Verification", "open_run"]
    assert sorted(tensortape.stores.__all__) == public
    assert all(hasattr(tensortape.stores, name) for name in public)


def test_every_error_is_a_store_error_and_one_of_pythons_own():
    """Whoever catches FileExistsError, KeyError, ValueError, ... catches ours too."""
    builtin = {
        "RunExistsError": FileExistsError,
        "OutputExistsError": FileExistsError,
        "NotARunError": FileNotFoundError,
        "FormatVersionError": ValueError,
        "DamagedError": OSError,
        "LostPartError": RuntimeError,
        "RunEndedError": RuntimeError,
        "BrokenWriterError": RuntimeError,
        "DiskShortError": OSError,
        "UnsafePlaceError": RuntimeError,
        "ForkedError": RuntimeError,
        "BudgetError": MemoryError,
        "SchemaError": ValueError,
        "KeyRepeatedError": ValueError,
        "UnknownColumnError": KeyError,
        "AttentionNotRecordedError": KeyError,
        "GradientError": RuntimeError,
        "MissingExampleError": KeyError,
    }
    ours = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and kind is not errors.StoreError}
    assert ours.keys() == builtin.keys()
    for name, kind in ours.items():
        assert issubclass(kind, errors.StoreError)
        assert issubclass(kind, builtin[name])
        assert str(kind("what happened")) == "what happened"
