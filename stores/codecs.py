"""Codecs of chunks: the frame that stands in a shard in place of a chunk's bytes.

A frame is expanded only if what it says of itself is what the chunk must be. So no frame grows into more than its chunk, and no
decoder is given fewer bytes than its frame claims to have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs import Blosc, Zstd

from .dtypes import Array
from .errors import DamagedError, SchemaError

NONE = "none"
LARGEST_CHUNK = 256 << 20
_BLOSC_HEADER = 16
_HEAD = 18  # the longest head that is looked at: zstd's
_ZSTD_MAGIC = bytes.fromhex("28b52ffd")


@dataclass(frozen=True)
class Codec:
    """What encodes and decodes, its name and settings in Zarr's metadata, and what the head of a frame says.

    `stated` gives (bytes when expanded, bytes of the frame); None for what a frame does not say.
    """

    coder: Any
    name: str
    settings: dict[str, Any]
    stated: Callable[[bytes], tuple[int | None, int | None]]


def _stated_by_blosc(head: bytes) -> tuple[int | None, int | None]:
    """Bytes 4 to 8 and 12 to 16 of the header, unsigned."""
    if len(head) < _BLOSC_HEADER:
        return None, None
    return int.from_bytes(head[4:8], "little"), int.from_bytes(head[12:16], "little")


def _stated_by_zstd(head: bytes) -> tuple[int | None, int | None]:
    """RFC 8878, 3.1.1.1: the content size stands after the magic number, descriptor, window and dictionary; it may be left out."""
    if len(head) < 5 or not head.startswith(_ZSTD_MAGIC):
        return None, None
    flag, single, dictionary = head[4] >> 6, head[4] >> 5 & 1, (0, 1, 2, 4)[head[4] & 3]
    size = (single, 2, 4, 8)[flag]
    start = 5 + (1 - single) + dictionary
    content = head[start : start + size]
    if not size or len(content) < size:
        return None, None
    return int.from_bytes(content, "little") + (256 if flag == 1 else 0), None


_LZ4 = {"cname": "lz4", "clevel": 5, "blocksize": 0}
_ZSTD = {"level": 1, "checksum": False}
CODECS = {
    "lz4": Codec(Blosc(shuffle=Blosc.BITSHUFFLE, **_LZ4), "blosc", {**_LZ4, "shuffle": "bitshuffle"}, _stated_by_blosc),
    "zstd": Codec(Zstd(**_ZSTD), "zstd", _ZSTD, _stated_by_zstd),
}
NAMES = (NONE, *CODECS)


def check(name: str | None) -> None:
    """SchemaError for a name that is no codec's; None leaves the choice to somebody else."""
    if name is not None and name not in NAMES:
        raise SchemaError(f"compress is one of {', '.join(NAMES)}, not {name!r}")


def zarr_codecs(name: str, itemsize: int) -> list[dict[str, Any]]:
    """The codec as Zarr's metadata names it, for values of `itemsize` bytes; none for none."""
    if name == NONE:
        return []
    codec = CODECS[name]
    width = {"typesize": itemsize} if codec.name == "blosc" else {}
    return [{"name": codec.name, "configuration": {**codec.settings, **width}}]


def compress(chunk: Array, name: str) -> bytes:
    """The frame of a chunk, C-contiguous and of its stored dtype (the width of which blosc shuffles by)."""
    frame: bytes = CODECS[name].coder.encode(chunk)
    return frame


def expand(frame: Array, name: str, nbytes: int) -> Array:
    """The bytes of a chunk of `nbytes`, uint8; DamagedError for a frame of anything else."""
    codec = CODECS[name]
    content, own = codec.stated(frame[:_HEAD].tobytes())
    if content != nbytes:
        raise DamagedError(f"a {name} frame of {len(frame)} bytes states {content} bytes of content, where a chunk has {nbytes}")
    if own not in (None, len(frame)):
        raise DamagedError(f"a {name} frame of {len(frame)} bytes states that it has {own}")
    out = np.empty(nbytes, np.uint8)
    try:
        codec.coder.decode(frame, out)
    except (RuntimeError, ValueError) as error:
        raise DamagedError(f"a {name} frame of {len(frame)} bytes cannot be expanded: {error}") from None
    return out
