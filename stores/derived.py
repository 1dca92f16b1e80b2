"""Numbers computed from a run that are kept in it, so that they need not be computed again. Losing them loses nothing."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

import numpy as np

from .dtypes import Array
from .errors import DamagedError
from .places import Place

FOLDER = "derived"
MOST_BYTES = 4 << 30
_log = logging.getLogger(__name__)


class Derived:
    """What is kept under a key, which says what the numbers are of and how they were computed.

    One safetensors file each, which states its key and the SHA-256 of its values. One that is damaged counts as absent.
    """

    def __init__(self, place: Place) -> None:
        self._place = place

    def load(self, key: str) -> dict[str, Array] | None:
        """What is kept under a key; None without it."""
        path = _path(key)
        if not self._place.exists(path):
            return None
        try:
            return _read(self._place.read(path, MOST_BYTES), key)
        except DamagedError as error:
            _log.warning("%s: %s; it is computed again", path, error)
            return None

    def save(self, key: str, arrays: Mapping[str, Array]) -> None:
        """Keep arrays under a key, in place of what was kept under it. Where nothing may be written, nothing is kept."""
        from safetensors.numpy import save

        found = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        try:
            self._place.replace(_path(key), [save(found, {"key": key, "sha256": _digest(found)})])
        except PermissionError as error:
            _log.warning("what was computed of %s is not kept with it: %s", self._place.root, error)

    def remove(self, key: str) -> None:
        """Forget what is kept under a key, if anything is."""
        if self._place.exists(_path(key)):
            self._place.remove(_path(key))


def _path(key: str) -> str:
    return f"{FOLDER}/{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _read(content: bytes, key: str) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        found = load(content)
    except SafetensorError as error:
        raise DamagedError(str(error)) from None
    if _stated(content) != {"key": key, "sha256": _digest(found)}:
        raise DamagedError("the values are not those that were written")
    return found


def _stated(content: bytes) -> object:
    """The metadata of a safetensors file: its header is JSON behind its length."""
    import json

    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__")


def _digest(arrays: Mapping[str, Array]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()
