"""A prefix of an S3 bucket, through obstore.

An object appears with the answer to its PUT or, above a few MiB, with the end of a multipart upload: whole, or not at all. To
create one, the request says `If-None-Match: *`. A service that does not heed that (some that speak S3 do not) cannot keep two
writers apart; that is found out before anything is created, and refused.

Requests that fail are repeated by obstore, for half a minute unless `retry_config` says otherwise; then they raise.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from io import UnsupportedOperation
from typing import Any, Literal

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from ..errors import ForkedError, UnsafePlaceError
from .contract import PARTIAL, Buffers, R, Span, T, check_size, raw
from .failures import failure
from .fetched import Fetched
from .loaded import Loaded

AT_ONCE = 16  # requests
WHOLE = 1 << 20  # an object of at most this size is fetched in one request
PIECE = 8 << 20  # a larger one than this is uploaded in pieces, each of which can be repeated by itself
_PROBE = f".create{PARTIAL}"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PROCESSES: set[int] = set()  # that have made requests: this one, and one that it was forked from
_DEFAULTS: dict[str, Any] = {
    "retry_config": {"max_retries": 10, "retry_timeout": timedelta(seconds=30)},
    "disable_bulk_delete": True,  # not every service has it
}


class ObjectPlace:
    """A run below `s3://bucket/prefix`.

    Args:
        url: `s3://bucket/path/of/the/run`, without user, password or query.
        options: for obstore's `S3Store`, such as `region`, `endpoint`, `access_key_id`, `secret_access_key`,
            `credential_provider`, `client_options` and `retry_config`; what is not given comes from `AWS_...` in the environment.
            And `exclusive`: true says that nobody else writes this run, which is needed where a service cannot keep writers apart.

    Raises:
        ValueError: a URL of another form, or options that obstore does not take; no value of either is repeated.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        bucket, prefix = _split(url)
        self.root = f"s3://{bucket}/{prefix}"
        self.fetched = 0
        rest = dict(options)
        self._exclusive = self._keeps_apart = bool(rest.pop("exclusive", False))
        self._store = _store(bucket, prefix, rest)

    def create(self, path: str, buffers: Buffers) -> None:
        """Write a new object; FileExistsError if there is another one already, UnsafePlaceError if the service would not say so."""
        if not self._keeps_apart:
            self._check_keeps_apart()
        if not self._put_new(path, b"".join(raw(buffers))):
            raise FileExistsError(f"{path}: there is another object of that name ({self.root})")

    def replace(self, path: str, buffers: Buffers) -> None:
        """Write an object in one atomic step."""
        content = raw(buffers)
        try:
            self._put(path, content)
        except FileNotFoundError:  # the answer to the end of an upload got lost, and asked again the service knew no such upload
            self._put(path, content)

    def settle(self) -> None:
        """Nothing: what the service has acknowledged, it keeps."""

    def read(self, path: str, most: int | None = None) -> bytes:
        """The whole object."""
        found = self._ask(path, lambda: obstore.get(self._store, path))
        check_size(path, found.meta["size"], most)
        return self._ask(path, lambda: bytes(found.bytes()))

    def remove(self, path: str) -> None:
        """Remove an object, if it is there."""
        self._ask(path, lambda: obstore.delete(self._store, path))

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def free(self) -> None:
        """A bucket has no end."""

    def size(self, path: str) -> int:
        """Bytes of the object."""
        return self._ask(path, lambda: obstore.head(self._store, path)["size"])

    def view(self, path: str, *, expected: int, stays: bool) -> Loaded | Fetched:
        """The object: at once if it is small or may be replaced, else by the ranges that are asked for."""
        if stays and expected > WHOLE:
            return Fetched(self, path, self.size(path))
        content = self.read(path)
        self.fetched += len(content)
        return Loaded(content, held=len(content))

    def ranges(self, path: str, spans: Sequence[Span]) -> Sequence[Any]:
        """The bytes of spans, in order and near to one another, in one request."""
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        extent = ends[-1] - starts[0]
        return self._ask(path, lambda: obstore.get_ranges(self._store, path, starts=starts, ends=ends, coalesce=extent))

    def names(self, path: str) -> list[str]:
        """The names directly below a prefix, sorted, without unfinished ones."""
        listed = self._ask(path, lambda: obstore.list_with_delimiter(self._store, path or None))
        paths = [*listed["common_prefixes"], *(found["path"] for found in listed["objects"])]
        names = {found.rstrip("/").rpartition("/")[2] for found in paths}
        return sorted(name for name in names if name and not name.endswith(PARTIAL))

    def unfinished(self, path: str) -> list[str]:
        """None: an object whose writer was killed never appears."""
        return []

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """What a function gives for each item, for several at the same time."""
        given = list(items)
        if len(given) < 2:
            return [function(item) for item in given]
        with ThreadPoolExecutor(min(AT_ONCE, len(given))) as pool:
            return list(pool.map(function, given))

    def __repr__(self) -> str:
        return f"<ObjectPlace {self.root}>"

    def _check_keeps_apart(self) -> None:
        """Two objects of one name that differ: the service must not take both. The first one stays, for all writers to come."""
        try:
            took_both = all(self._put_new(_PROBE, uuid.uuid4().bytes) for _ in range(2))
        except UnsupportedOperation:
            took_both = True
        if took_both:
            raise UnsafePlaceError(
                f"the service at {self.root} does not heed conditional requests (If-None-Match), so two writers would overwrite "
                "each other's data. If this is the only writer of the run, now and later, say so with "
                "storage_options={'exclusive': True}; otherwise use a service that heeds them, or a folder"
            )
        self._keeps_apart = True

    def _put_new(self, path: str, content: bytes, tries: int = 2) -> bool:
        """Whether an object was created. An answer may get lost, or be the refusal of a request that was repeated because of that;
        the service may also refuse a request because of another one, of which nothing stays. So what is there decides.
        """
        there = self._found(path) if self._exclusive else None
        if there is not None:
            return there == content
        try:
            self._put(path, content, "overwrite" if self._exclusive else "create")
            return True
        except OSError as error:
            failed = error
        there = self._found(path)
        if there is not None:
            return there == content
        if tries == 1:
            raise failed
        return self._put_new(path, content, tries - 1)

    def _put(self, path: str, content: bytes | list[memoryview], mode: Literal["create", "overwrite"] = "overwrite") -> None:
        size = len(content) if isinstance(content, bytes) else sum(map(len, content))
        how: Any = {"mode": mode, "use_multipart": size > PIECE, "chunk_size": PIECE, "max_concurrency": 4}
        self._ask(path, lambda: obstore.put(self._store, path, content, **how))

    def _found(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def _ask(self, path: str, request: Callable[[], T]) -> T:
        """What obstore gives; its errors as ours, raised outside of `except`, as obstore's would else hang on as their context."""
        _check_process()
        try:
            return request()
        except (BaseError, OSError, NotImplementedError) as error:
            ours = failure(error, path, self.root)
        raise ours


def _check_process() -> None:
    """obstore's threads do not live on in a forked process, where a request would wait for them for ever."""
    _PROCESSES.add(os.getpid())
    if len(_PROCESSES) > 1:
        raise ForkedError(
            "this process was forked from one that has used object storage, and requests would never end here; start processes "
            "by 'spawn' (multiprocessing_context='spawn' of a DataLoader) and open the run in them, or use threads"
        )


def _split(url: str) -> tuple[str, str]:
    """Bucket and prefix of a URL."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    parts = prefix.rstrip("/").split("/")
    if scheme != "s3" or not _BUCKET.fullmatch(bucket) or not all(map(_is_name, parts)):
        raise ValueError(
            "the URL of a run is s3://bucket/path/of/the/run, without user, password, query or empty parts; the one given is not "
            "repeated here, as it may hold a secret. Region, endpoint and credentials come from AWS_... in the environment or from "
            "storage_options="
        )
    return bucket, "/".join(parts)


def _is_name(part: str) -> bool:
    return part not in ("", ".", "..") and not set("@?#") & set(part)


def _store(bucket: str, prefix: str, options: dict[str, Any]) -> S3Store:
    try:
        return S3Store(bucket, prefix=prefix, **{**_DEFAULTS, **options})
    except (BaseError, TypeError, ValueError) as error:
        kind = type(error).__name__
    raise ValueError(
        f"obstore's S3Store refuses storage_options {', '.join(map(repr, options))}, or what AWS_... in the environment says "
        f"({kind}; values are not repeated here, as they may be secret)"
    )
