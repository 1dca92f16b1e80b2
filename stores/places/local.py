"""A folder of the local file system.

Objects are written under a temporary name, synced, and then renamed (replace) or hard-linked (create), so that a final name never
holds part of an object. With `durability="rename"` nothing is synced: a killed process loses nothing, a power loss may.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from ..errors import DamagedError
from .contract import PARTIAL, Buffers, R, T, check_size, raw
from .loaded import Loaded

Durability = Literal["fsync", "rename"]
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.partial")
_BUFFERS_PER_CALL = 1024  # IOV_MAX on Linux and macOS


class LocalPlace:
    """A run's folder."""

    fetched = 0

    def __init__(self, root: Path, durability: Durability = "fsync") -> None:
        if durability not in ("fsync", "rename"):
            raise ValueError(f"durability is 'fsync' or 'rename', not {durability!r}")
        self.root = root
        self._sync = durability == "fsync"
        self._unsettled: set[Path] = set()
        self._folders: set[str] = set()  # that are no links

    def create(self, path: str, buffers: Buffers) -> None:
        """Write a new object; FileExistsError if there is one already.

        Others go by what is created (a run, a claim, a record): what was written before it is settled first, and it is at once.
        """
        final = self._at(path)
        self.settle()
        with self._partial(final, buffers) as partial:
            os.link(partial, final)
            partial.unlink()
        self.settle()

    def replace(self, path: str, buffers: Buffers) -> None:
        """Write an object in one atomic step."""
        final = self._at(path)
        with self._partial(final, buffers) as partial:
            partial.replace(final)

    def remove(self, path: str) -> None:
        """Remove an object, if it is there."""
        self._at(path).unlink(missing_ok=True)
        self._note(self._at(path).parent)

    def settle(self) -> None:
        """Sync the folders in which names have changed."""
        for folder in sorted(self._unsettled):
            _sync_folder(folder)
        self._unsettled.clear()

    def read(self, path: str, most: int | None = None) -> bytes:
        """The whole object."""
        check_size(path, self.size(path), most)
        return self._at(path).read_bytes()

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        return os.path.lexists(self._at(path))

    def size(self, path: str) -> int:
        """Bytes of the object."""
        found = self._at(path).lstat()
        if not stat.S_ISREG(found.st_mode):  # a link may lead anywhere, and reading a pipe never ends
            raise IsADirectoryError(f"{path}: a folder") if stat.S_ISDIR(found.st_mode) else _no_file(path)
        return found.st_size

    def free(self) -> int:
        """Bytes that can still be written."""
        for folder in (self.root, *self.root.parents):
            with suppress(FileNotFoundError, NotADirectoryError):  # another writer may rename the root at any moment
                return shutil.disk_usage(folder).free
        raise FileNotFoundError(f"{self.root}: there is no folder above it")

    def view(self, path: str, *, expected: int, stays: bool) -> Loaded:
        """A memory map where the object stays as it is, else its bytes."""
        if not stays or not self.size(path):  # an empty file cannot be mapped
            return Loaded(self.read(path))
        with self._at(path).open("rb") as file:
            return Loaded(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def names(self, path: str) -> list[str]:
        """The names directly below a folder, sorted, without unfinished ones."""
        found = _below(self._folder(path))
        return sorted(name for name in found if not name.endswith(PARTIAL))

    def unfinished(self, path: str) -> list[str]:
        """The names of unfinished objects directly below a folder, sorted."""
        found = _below(self._folder(path))
        return sorted(name for name in found if _UNFINISHED.fullmatch(name))

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """What a function gives for each item, one after another: a disk answers at once."""
        return [function(item) for item in items]

    def _at(self, path: str) -> Path:
        """Where an object lies: below the root, whatever a document of somebody else's run says."""
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise DamagedError(f"{path}: the path leads out of the run")
        self._check_folder(path.rpartition("/")[0])
        return self.root / path

    def _folder(self, path: str) -> Path:
        folder = self._at(path)
        self._check_folder(path)
        return folder

    def _check_folder(self, folder: str) -> None:
        """DamagedError if a folder, or one above it in the run, is a symbolic link. Asked once of each; the root may be one."""
        if not folder or folder in self._folders:
            return
        self._check_folder(folder.rpartition("/")[0])
        if (self.root / folder).is_symlink():
            raise _no_file(folder)
        self._folders.add(folder)

    @contextmanager
    def _partial(self, final: Path, buffers: Buffers) -> Iterator[Path]:
        folder = final.parent
        self._make_folder(folder)
        partial = folder / f".{final.name[:100]}.{uuid.uuid4().hex}{PARTIAL}"
        try:
            _write(partial, buffers, sync=self._sync)
            yield partial
        except BaseException:
            with suppress(FileNotFoundError):
                partial.unlink()
            raise
        self._note(folder)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            self._note(folder.parent)

    def _note(self, folder: Path) -> None:
        if self._sync:
            self._unsettled.add(folder)


def _below(folder: Path) -> list[str]:
    """The names in a folder, which another writer may rename at any moment; none if there is no such folder."""
    try:
        return [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _no_file(path: str) -> DamagedError:
    return DamagedError(
        f"{path}: a symbolic link, a pipe or the like, which may lead out of the run and is not followed; copy the run with its "
        "links resolved (cp -rL) if you trust it"
    )


def _write(path: Path, buffers: Buffers, *, sync: bool) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(handle, raw(buffers))
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, views: list[memoryview]) -> None:
    sizes = list(map(len, views))
    done = 0
    while done < len(views):
        written = os.writev(handle, views[done : done + _BUFFERS_PER_CALL])
        while done < len(views) and written >= sizes[done]:
            written -= sizes[done]
            done += 1
        if written:
            views[done], sizes[done] = views[done][written:], sizes[done] - written


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
