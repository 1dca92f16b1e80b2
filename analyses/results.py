"""Results: frozen values with a table, a picture and a file."""

from __future__ import annotations

import importlib
import json
import math
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from tensortape.stores.dtypes import Array

from .errors import ResultFileError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FORMAT = "tensortape result 1"


class Result:
    """What every result can do. Results are frozen dataclasses of numbers, text, arrays, tuples, dicts, and of one another."""

    def to_pandas(self) -> pd.DataFrame:
        """The numbers as a table."""
        raise NotImplementedError

    def plot(self) -> Figure:
        """A picture; needs the extra `plots`."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same, NaN like NaN."""
        mine, theirs = dict[str, Array](), dict[str, Array]()
        same = type(other) is type(self) and _to_json(self, "", mine) == _to_json(other, "", theirs)
        return same and all(np.array_equal(mine[name], theirs[name], equal_nan=mine[name].dtype.kind == "f") for name in mine)

    __hash__ = object.__hash__

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `PATH.json` and, if there are arrays, `PATH.safetensors`; the path without endings."""
        from safetensors.numpy import save_file

        stem = _stem(path)
        arrays: dict[str, Array] = {}
        said = {"format": FORMAT, "result": _to_json(self, "", arrays)}
        stem.parent.mkdir(parents=True, exist_ok=True)
        if arrays:
            save_file(arrays, _beside(stem, ".safetensors"))
        _beside(stem, ".json").write_text(json.dumps(said, indent=1), encoding="utf-8")
        return stem

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The result that was saved under a path; ResultFileError if it is of another kind."""
        from safetensors.numpy import load_file

        stem = _stem(path)
        said = json.loads(_beside(stem, ".json").read_text(encoding="utf-8"))
        arrays = load_file(_beside(stem, ".safetensors")) if _beside(stem, ".safetensors").exists() else {}
        found = _from_json(said["result"], arrays) if said.get("format") == FORMAT else None
        if not isinstance(found, cls):
            raise ResultFileError(f"{_beside(stem, '.json')} holds a {type(found).__name__}, not a {cls.__name__}")
        return found


def _stem(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    return found.with_suffix("") if found.suffix in (".json", ".safetensors") else found


def _beside(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _to_json(value: Any, name: str, arrays: dict[str, Array]) -> Any:
    """A value as JSON; arrays are put aside under the names of the fields they are in."""
    if isinstance(value, np.ndarray):
        arrays[name] = np.asarray(value, order="C")
        return {"array": name}
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: _to_json(getattr(value, field.name), f"{name}/{field.name}", arrays) for field in fields(value)}
        return {"kind": f"{type(value).__module__}.{type(value).__qualname__}", "fields": held}
    if isinstance(value, (tuple, list)):
        return [_to_json(one, f"{name}/{number}", arrays) for number, one in enumerate(value)]
    if isinstance(value, dict):
        return {"dict": {key: _to_json(one, f"{name}/{key}", arrays) for key, one in value.items()}}
    plain = value.item() if isinstance(value, np.generic) else value
    return {"float": repr(plain)} if isinstance(plain, float) and not math.isfinite(plain) else plain  # JSON has no such numbers


def _from_json(said: Any, arrays: dict[str, Array]) -> Any:
    if isinstance(said, list):
        return tuple(_from_json(one, arrays) for one in said)
    if not isinstance(said, dict):
        return said
    if "array" in said:
        return arrays[said["array"]]
    if "float" in said:
        return float(said["float"])
    if "dict" in said:
        return {key: _from_json(one, arrays) for key, one in said["dict"].items()}
    return _kind(said["kind"])(**{name: _from_json(one, arrays) for name, one in said["fields"].items()})


def _kind(name: str) -> Any:
    """A class of ours by its full name; nothing else is ever looked up."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("tensortape.analyses."):
        raise ResultFileError(f"a file of results names {name!r}, which is none of ours")
    found = getattr(importlib.import_module(module), kind, None)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ResultFileError(f"a file of results names {name!r}, which is no result")
    return found
