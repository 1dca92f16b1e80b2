"""The one layer between a run and its disk: every call that changes something below a folder, before it is made."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

OF_PATHS = ("open", "link", "replace", "rename", "unlink", "mkdir")
OF_HANDLES = ("writev", "fsync", "close")


@dataclass(frozen=True)
class Operation:
    """A call that is about to be made, and the paths it is about: those it names, or the one that its handle was opened at."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    paths: tuple[Path, ...]

    def make(self, *instead: Any) -> Any:
        """Make the call, with other arguments if some are given."""
        return self.call(*(instead or self.arguments), **self.options)


Meet = Callable[[Operation], Any]


@contextmanager
def layer(folder: Path, meet: Meet) -> Iterator[None]:
    """Within the block every call about the folder or what is in it is handed to `meet`, which makes it or does not."""
    handles: dict[int, Path] = {}

    def of_paths(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def through(*arguments: Any, **options: Any) -> Any:
            paths = tuple(Path(one) for one in arguments if isinstance(one, (str, Path)) and str(one).startswith(str(folder)))
            if not paths:
                return call(*arguments, **options)
            result = meet(Operation(name, call, arguments, options, paths))
            if name == "open":
                handles[result] = paths[0]
            return result

        return through

    def of_handles(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def through(handle: int, *arguments: Any) -> Any:
            if handle not in handles:
                return call(handle, *arguments)
            path = handles.pop(handle) if name == "close" else handles[handle]
            return meet(Operation(name, call, (handle, *arguments), {}, (path,)))

        return through

    with pytest.MonkeyPatch.context() as patch:
        for name in OF_PATHS:
            patch.setattr(os, name, of_paths(name, getattr(os, name)))
        for name in OF_HANDLES:
            patch.setattr(os, name, of_handles(name, getattr(os, name)))
        patch.setattr(io, "open", of_paths("read", io.open))
        yield


def state_of(folder: Path, *more: object) -> str:
    """A digest of every byte below a folder, and of whatever else is to count."""
    digest = hashlib.sha256(repr(more).encode())
    for file in sorted(folder.rglob("*")):
        digest.update(f"{file.relative_to(folder)} ".encode() + (file.read_bytes() if file.is_file() else b""))
    return digest.hexdigest()
