"""Shards that are open for reading, the least recently used ones closed first."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from . import codecs
from .commits import ShardRecord
from .compressed_shards import CompressedShard, RecentChunks
from .errors import DamagedError, NotARunError
from .geometry import Geometry
from .part_state import attributes
from .places import Place, View
from .schema import RunDocument
from .shards import Shard

T = TypeVar("T")
R = TypeVar("R")

MOST = 1024
FETCHED_BYTES = 256 << 20


class ShardCache:
    """Opens shards of one run once. Keeps at most a quarter of the open-file limit, and of fetched bytes at most `most_bytes`.

    It may be copied or pickled, and so may everything that reads through it: what is open stays behind, the run is looked for
    again where it was, and the copy shows the same snapshot.
    """

    def __init__(self, place: Place, run: str, *, verify: bool, most_bytes: int = FETCHED_BYTES) -> None:
        self._place = place
        self._run = run
        self._verify = verify
        self._open: OrderedDict[str, tuple[ShardRecord, Shard, View]] = OrderedDict()
        self._most = min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._most_bytes = most_bytes
        self._fetched = place.fetched
        self._lock = threading.Lock()
        self._recent = RecentChunks()

    def get(self, path: str, geometry: Geometry, record: ShardRecord, *, sealed: bool) -> Shard:
        """The shard at `path`; DamagedError if its file cannot hold what was committed."""
        with self._lock:
            held = self._open.get(path)
            if held is None or held[0] is not record:
                held = (record, *self._load(path, geometry, record, sealed=sealed))
                self._open[path] = held
                if len(self._open) > self._most:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            if self._fetched != self._place.fetched:
                self._close_some()
            return held[1]

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """What a function gives for each item; for several at the same time where shards have to be fetched."""
        return self._place.each(function, items)

    def _close_some(self) -> None:
        """Give back what was fetched for the shards that have not been used for longest; not for the one that is used now."""
        self._fetched = self._place.fetched
        held = sum(view.held for _, _, view in self._open.values())
        while held > self._most_bytes and len(self._open) > 1:
            held -= self._open.popitem(last=False)[1][2].held

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self._place, "run": self._run, "verify": self._verify, "most_bytes": self._most_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ShardCache.__init__(self, **state)
        self._check_is_the_run()

    def _check_is_the_run(self) -> None:
        try:
            found = RunDocument.from_attributes(attributes(self._place.read("zarr.json"), "zarr.json"), "zarr.json").uid
        except FileNotFoundError:
            found = "none"
        if found != self._run:
            raise NotARunError(
                f"the run {self._run} that was pickled is no longer where it was (there is now: {found}); it was moved, deleted or "
                "overwritten, so open it again"
            )

    def check_size(self, path: str, geometry: Geometry, record: ShardRecord, *, sealed: bool) -> None:
        """DamagedError if the file at `path` cannot hold what was committed."""
        try:
            _check_size(path, self._place.size(path), geometry, record, sealed=sealed)
        except FileNotFoundError:
            raise DamagedError(f"{path}: the shard is missing") from None

    def _load(self, path: str, geometry: Geometry, record: ShardRecord, *, sealed: bool) -> tuple[Shard, View]:
        try:
            view = self._place.view(path, expected=file_bytes(record, geometry), stays=sealed)
        except FileNotFoundError:
            raise DamagedError(f"{path}: the shard is missing") from None
        _check_size(path, len(view.content), geometry, record, sealed=sealed)
        try:
            return shard_of(view, geometry, record, self._recent, verify=self._verify), view
        except DamagedError as error:
            raise DamagedError(f"{path}: {error}") from None


def shard_of(view: View, geometry: Geometry, record: ShardRecord, recent: RecentChunks, *, verify: bool = True) -> Shard:
    """A shard out of the bytes of its file; DamagedError where they cannot be one."""
    if geometry.codec == codecs.NONE:
        return Shard(view.content, geometry, record.rows, record.crcs, verify=verify, load=view.load)
    return CompressedShard(view.content, geometry, record.rows, record.crcs, recent, verify=verify, load=view.load)


def file_bytes(record: ShardRecord, geometry: Geometry) -> int:
    """Size of a shard's file as it was committed."""
    if geometry.codec == codecs.NONE:
        return geometry.file_bytes(record.rows)
    return 0 if record.nbytes is None else record.nbytes


def _check_size(path: str, size: int, geometry: Geometry, record: ShardRecord, *, sealed: bool) -> None:
    plain, needed = geometry.codec == codecs.NONE, file_bytes(record, geometry)
    # The tail of a part that is still being written may have been replaced by a longer one since, which compresses to more
    # bytes or fewer (rows take the place of fill); a sealed shard never is.
    replaced = not sealed and (size > needed or not plain)
    if size != needed and not replaced:
        raise DamagedError(f"{path}: the shard has {size} bytes instead of {needed}")
