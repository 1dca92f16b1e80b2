"""Names on disk.

Lower-case letters, digits and `_ . -` are kept and every other byte of the UTF-8 name becomes `~xx`, so that names survive every
file system and object store and can be turned back. Names that would collide with Zarr's or an operating system's own are escaped
in their first byte; names over 200 bytes are cut and end in a hash. The true name is in the schema.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

from .errors import SchemaError

LIMIT = 200
_KEPT = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_.-")
_ESCAPED = re.compile(rb"~([0-9a-f]{2})")
_RESERVED = re.compile(r"(zarr\.json|c|c[./].*|\..*|__.*|(con|prn|aux|nul|com\d|lpt\d)(\..*)?)")
_ON_DISK = re.compile(r"(?!\.)[a-z0-9_.~-]{1,250}")
KEY_TABLES = ("example", "step")  # a part has either one: its rows have keys, and every other table's rows belong to one of them
_TABLE = re.compile(r"example|step|(token|pair)(\..+)?")


_KEYS = ("example/id", "example/phase", "example/step", "step/step")


@lru_cache(maxsize=1 << 14)
def to_disk(name: str) -> str:
    """The file name of a table or column."""
    escaped = "".join(chr(byte) if byte in _KEPT else f"~{byte:02x}" for byte in name.encode())
    if _RESERVED.fullmatch(escaped):
        escaped = f"~{ord(escaped[0]):02x}{escaped[1:]}"
    if escaped.endswith("."):  # some file systems drop a trailing dot
        escaped = f"{escaped[:-1]}~2e"
    return escaped if len(escaped) <= LIMIT else _cut(escaped, name)


def from_disk(file_name: str) -> str:
    """The true name of a file name that was not cut; ValueError for a cut one."""
    if "~~" in file_name:
        raise ValueError(f"{file_name!r} was cut; its true name is in the schema")
    return _ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), file_name.encode()).decode()


def is_on_disk(file_name: str) -> bool:
    """Whether this may be a file name that `to_disk` gave: one name, of a file that is not hidden."""
    return _ON_DISK.fullmatch(file_name) is not None


def split(name: str) -> tuple[str, str]:
    """`token/layers.3:out` as (table, column); SchemaError for anything else."""
    table, slash, column = name.partition("/")
    check_text(name, f"column {name!r}")
    if not slash or not column or not _TABLE.fullmatch(table):
        raise SchemaError(
            f"column {name!r} names no table; write 'example/<name>', 'token/<name>', 'token.<stream>/<name>', "
            "'pair/<name>' or 'step/<name>'"
        )
    return table, column


def check_text(text: str, what: str) -> None:
    """SchemaError for text that UTF-8 cannot hold: lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SchemaError(f"{what} holds text that is not valid UTF-8 ({error.reason})") from None


def is_bookkeeping(name: str) -> bool:
    """Whether the run itself writes this column, into every part: keys, and where an example's rows lie."""
    return name in _KEYS or name.startswith(("example/start.", "example/length."))


def refuse_bookkeeping(name: str) -> None:
    """SchemaError for a column that only the run itself writes."""
    if is_bookkeeping(name):
        raise SchemaError(f"column {name!r} is written by the run itself; give ids=, phase=, step= or one array per example")


def is_ragged(table: str) -> bool:
    """Whether an example owns any number of rows of this table."""
    return table.startswith(("token", "pair"))


def _cut(escaped: str, name: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    head = escaped[: LIMIT - len(digest) - 2]
    return f"{re.sub('~[0-9a-f]?$', '', head)}~~{digest}"
