"""What a run needs of the place it lives in. Paths are relative to the run's root, with `/`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from ..dtypes import Array
from ..errors import DamagedError

Buffers = Sequence["Array | bytes"]
Span = tuple[int, int]
T = TypeVar("T")
R = TypeVar("R")

PARTIAL = ".partial"  # names that end so are of no object


class View(Protocol):
    """An object for reading. Where its bytes have to be fetched, those of a span are right only once it is loaded."""

    @property
    def content(self) -> Array:
        """Its bytes; uint8, read-only."""

    @property
    def held(self) -> int:
        """How many of them take memory that is given back only with the view."""

    def load(self, spans: Iterable[Span]) -> None:
        """Bring the bytes of spans [start, stop) here, unless they are."""


class Place(Protocol):
    """A folder or an object-store prefix. Objects appear whole or not at all; nothing is changed in place."""

    @property
    def root(self) -> Path | str:
        """The folder, or the URL; never with credentials."""

    @property
    def fetched(self) -> int:
        """Bytes that views have brought into memory so far; always 0 where they are mapped."""

    def create(self, path: str, buffers: Buffers) -> None:
        """Write a new object; FileExistsError if there is one already, which then stays as it is.

        A place that cannot tell a request that was repeated, because its answer got lost, from somebody else's takes one with the
        same bytes for its own. What only one of several writers may create must therefore differ between them.
        """

    def replace(self, path: str, buffers: Buffers) -> None:
        """Write an object, new or not, in one atomic step."""

    def remove(self, path: str) -> None:
        """Remove an object, if it is there."""

    def settle(self) -> None:
        """Return when everything written so far survives a power loss (as far as the place's durability goes)."""

    def read(self, path: str, most: int | None = None) -> bytes:
        """The whole object; FileNotFoundError without one, DamagedError for one of more than `most` bytes."""

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""

    def size(self, path: str) -> int:
        """Bytes of the object; FileNotFoundError without one."""

    def free(self) -> int | None:
        """Bytes that can still be written; None where there is no such limit."""

    def view(self, path: str, *, expected: int, stays: bool) -> View:
        """The object for reading; FileNotFoundError without one.

        Args:
            expected: about how many bytes it has; a small one may be fetched at once.
            stays: whether it stays as it is for good, so that it may be mapped, or fetched bit by bit.
        """

    def names(self, path: str) -> list[str]:
        """The names directly below a folder, sorted; none if there is no such folder. Unfinished objects are not among them."""

    def unfinished(self, path: str) -> list[str]:
        """The names directly below a folder of objects that a writer of ours was killed in the middle of."""

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """What a function gives for each item; at the same time, where it spends its time waiting for the place."""


def check_size(path: str, size: int, most: int | None) -> None:
    """DamagedError for an object of more than `most` bytes, before it takes memory."""
    if most is not None and size > most:
        raise DamagedError(f"{path}: an object of {size} bytes, where one has at most {most}")


def raw(buffers: Buffers) -> list[memoryview]:
    """The bytes of buffers, without those of length 0."""
    return [(memoryview(buffer) if isinstance(buffer, bytes) else buffer.data).cast("B") for buffer in buffers if len(buffer)]
