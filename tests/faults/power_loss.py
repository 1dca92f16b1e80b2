"""A power loss after every operation of a recording: what was not synced is kept, cut or gone, and the rest is checked.

The disk that is modelled promises only what POSIX does: bytes of a file are there once the file was synced, a name in a folder once
the folder was. Whatever was not synced is there or not, each change by itself.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from strategies import small_chunks

from .layer import Operation, layer, state_of
from .promises import broken, broken_after_resuming, changed
from .recipe import Recipe, record

RECIPE = Recipe(21, 3, 12, ("token/h", "example/title"))


# What was done.


@dataclass(frozen=True)
class Step:
    """One operation that was made, with paths relative to the disk; or one acknowledgement."""

    name: str
    paths: tuple[Path, ...] = ()
    content: bytes = b""
    acknowledged: int | str | None = None


def logged(folder: Path, durability: str) -> list[Step]:
    """Every operation of a recording into a run in the folder, and when it acknowledged what."""
    log: list[Step] = []

    def meet(operation: Operation) -> Any:
        result = operation.make()
        log.extend(_steps(operation, result, folder))
        return result

    with layer(folder, meet), small_chunks(shard_bytes=256):
        record(folder / "run.zarr", RECIPE, lambda what: log.append(Step("acknowledge", acknowledged=what)), durability=durability)
    return log


def _steps(operation: Operation, result: Any, folder: Path) -> Iterator[Step]:
    paths = tuple(path.relative_to(folder) for path in operation.paths)
    if operation.name == "writev":
        yield Step("write", paths, b"".join(map(bytes, operation.arguments[1]))[:result])
    elif operation.name == "open" and operation.arguments[1] & os.O_CREAT:
        yield Step("create", paths)
    elif operation.name in ("fsync", "link", "replace", "unlink", "mkdir"):
        yield Step(operation.name, paths)


# What a disk makes of it.


class Fate(Protocol):
    """What becomes, in a power loss, of what was not synced."""

    def keeps_change(self) -> bool:
        """Whether a name that was added, changed or removed stays so."""

    def bytes_of(self, synced: bytes, written: bytes) -> bytes:
        """What is there of a file."""


class Kept:
    """Everything is there: only the process was killed, the system lives."""

    def keeps_change(self) -> bool:
        """Always."""
        return True

    def bytes_of(self, synced: bytes, written: bytes) -> bytes:
        """All of them."""
        return written


class Lost:
    """Nothing is there that was not synced."""

    def keeps_change(self) -> bool:
        """Never."""
        return False

    def bytes_of(self, synced: bytes, written: bytes) -> bytes:
        """As of the last sync."""
        return synced


class Dice:
    """Each change by itself; of a file all, nothing, a beginning, or zeros in place of what was written."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._keeps = (0.98, 0.9, 0.5)[seed % 3]

    def keeps_change(self) -> bool:
        """Mostly, or one in two."""
        return self._dice.random() < self._keeps

    def bytes_of(self, synced: bytes, written: bytes) -> bytes:
        """One in four each."""
        cut = written[: self._dice.randrange(len(written))]
        return self._dice.choice([written, synced, cut, bytes(len(written))])


@dataclass(eq=False)
class File:
    """Bytes as written, and as of the last sync."""

    written: bytes = b""
    synced: bytes = b""

    def sync(self) -> None:
        """Make the bytes durable."""
        self.synced = self.written

    def put(self, target: Path, fate: Fate) -> None:
        """Make the file as it is after a power loss."""
        target.write_bytes(self.synced if self.synced == self.written else fate.bytes_of(self.synced, self.written))


@dataclass(eq=False)
class Folder:
    """Names as they are, as of the last sync, and the changes since."""

    names: dict[str, Node] = field(default_factory=dict)
    synced: dict[str, Node] = field(default_factory=dict)
    changes: list[dict[str, Node | None]] = field(default_factory=list)

    def change(self, names: dict[str, Node | None]) -> None:
        """Add, change and remove names in one step."""
        self.names = _changed(self.names, names)
        self.changes.append(names)

    def sync(self) -> None:
        """Make the names durable."""
        self.synced, self.changes = self.names, []

    def put(self, target: Path, fate: Fate) -> None:
        """Make the folder and all in it as they are after a power loss."""
        target.mkdir()
        names = self.synced
        for change in self.changes:
            names = _changed(names, change) if fate.keeps_change() else names
        for name, node in names.items():
            node.put(target / name, fate)


Node = File | Folder


def _changed(names: dict[str, Node], change: dict[str, Node | None]) -> dict[str, Node]:
    return {name: node for name, node in {**names, **change}.items() if node is not None}


class Disk:
    """A folder that steps are done to."""

    def __init__(self) -> None:
        self.root = Folder()

    def do(self, step: Step) -> None:
        """Do one step."""
        match step.name, *step.paths:
            case "create", path:
                self._change(path, File())
            case "mkdir", path:
                self._change(path, Folder())
            case "write", path:
                self._at(path).written += step.content
            case "fsync", path:
                self._at(path).sync()
            case "link", source, target:
                self._change(target, self._at(source))
            case "replace", source, target:
                self._at(target.parent).change({source.name: None, target.name: self._at(source)})
            case "unlink", path:
                self._change(path, None)

    def _change(self, path: Path, node: Node | None) -> None:
        self._at(path.parent).change({path.name: node})

    def _at(self, path: Path) -> Any:
        node: Any = self.root
        for name in path.parts:
            node = node.names[name]
        return node


# What must hold.


def power_loss(folder: Path, fates: int, every: int = 1) -> Iterator[list[str]]:
    """With `fsync` every promise holds: one trial per step (of every so many) and fate, those apart that leave the same bytes."""
    for path, acknowledged in _disks(folder, "fsync", [Lost(), *map(Dice, range(fates))], every):
        yield [*broken(path, RECIPE, acknowledged), *broken_after_resuming(path, RECIPE)]


def killed(folder: Path, every: int = 1) -> Iterator[list[str]]:
    """With `rename` every promise holds if the process is killed, whichever step is its last."""
    for path, acknowledged in _disks(folder, "rename", [Kept()], every):
        yield [*broken(path, RECIPE, acknowledged), *broken_after_resuming(path, RECIPE)]


def power_loss_without_fsync(folder: Path, fates: int, every: int = 1) -> Iterator[list[str]]:
    """With `rename` what was acknowledged may be gone after a power loss, but nothing else is ever read in its place."""
    for path, _ in _disks(folder, "rename", [Lost(), *map(Dice, range(fates))], every):
        yield changed(path, RECIPE)


def _disks(folder: Path, durability: str, fates: list[Fate], every: int) -> Iterator[tuple[Path, list[int | str]]]:
    """The run as each fate leaves it after each step, no two the same, and what was acknowledged by then."""
    disk, acknowledged, seen, after = Disk(), list[int | str](), set[str](), folder / "after"
    for number, step in enumerate(_logged_below(folder / "recorded", durability)):
        disk.do(step)
        acknowledged += [] if step.acknowledged is None else [step.acknowledged]
        for fate in fates if number % every == 0 else ():
            disk.root.put(after, fate)
            state = state_of(after, acknowledged)
            if state not in seen:
                seen.add(state)
                yield after / "run.zarr", acknowledged
            shutil.rmtree(after)


def _logged_below(folder: Path, durability: str) -> list[Step]:
    folder.mkdir()
    log = logged(folder, durability)
    shutil.rmtree(folder)
    return log
