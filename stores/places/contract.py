"""What a run needs of the place it lives in. Paths are relative to the run's root, with `/`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..dtypes import Array

Buffers = Sequence["Array | bytes"]


class Place(Protocol):
    """A folder or an object-store prefix. Objects appear whole or not at all; nothing is changed in place."""

    def create(self, path: str, buffers: Buffers) -> None:
        """Write a new object; FileExistsError if there is one already, which then stays as it is."""

    def replace(self, path: str, buffers: Buffers) -> None:
        """Write an object, new or not, in one atomic step."""

    def remove(self, path: str) -> None:
        """Remove an object; FileNotFoundError without one."""

    def settle(self) -> None:
        """Return when everything written so far survives a power loss (as far as the place's durability goes)."""

    def read(self, path: str) -> bytes:
        """The whole object; FileNotFoundError without one."""

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""

    def size(self, path: str) -> int:
        """Bytes of the object; FileNotFoundError without one."""

    def view(self, path: str, *, stays: bool) -> Any:
        """The object as a read-only buffer; where it `stays` as it is for good, a memory map if the place has them."""

    def names(self, path: str) -> list[str]:
        """The names directly below a folder, sorted; none if there is no such folder. Unfinished objects are not among them."""

    def unfinished(self, path: str) -> list[str]:
        """The names directly below a folder of objects that a writer of ours was killed in the middle of."""
