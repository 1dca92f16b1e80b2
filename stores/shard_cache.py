"""Shards that are open for reading, the least recently used ones closed first."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict

from . import codecs
from .commits import ShardRecord
from .compressed_shards import CompressedShard, RecentChunks
from .errors import DamagedError
from .geometry import Geometry
from .places import Place
from .shards import Shard

MOST = 1024


class ShardCache:
    """Opens shards once and keeps at most a quarter of the open-file limit."""

    def __init__(self, place: Place, *, verify: bool) -> None:
        self._place = place
        self._verify = verify
        self._open: OrderedDict[str, tuple[ShardRecord, Shard]] = OrderedDict()
        self._most = min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._lock = threading.Lock()
        self._recent = RecentChunks()

    def get(self, path: str, geometry: Geometry, record: ShardRecord, *, sealed: bool) -> Shard:
        """The shard at `path`; DamagedError if its file cannot hold what was committed."""
        with self._lock:
            held = self._open.get(path)
            if held is None or held[0] is not record:
                held = (record, self._load(path, geometry, record, sealed=sealed))
                self._open[path] = held
                if len(self._open) > self._most:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return held[1]

    def _load(self, path: str, geometry: Geometry, record: ShardRecord, *, sealed: bool) -> Shard:
        try:
            size = self._place.size(path)
        except FileNotFoundError:
            raise DamagedError(f"{path}: the shard is missing") from None
        plain, needed = geometry.codec == codecs.NONE, file_bytes(record, geometry)
        # The tail of a part that is still being written may have been replaced by a longer one since, which compresses to more
        # bytes or fewer (rows take the place of fill); a sealed shard never is.
        replaced = not sealed and (size > needed or not plain)
        if size != needed and not replaced:
            raise DamagedError(f"{path}: the shard has {size} bytes instead of {needed}")
        data = self._place.view(path, stays=sealed)
        if plain:
            return Shard(data, geometry, record.rows, record.crcs, verify=self._verify)
        try:
            return CompressedShard(data, geometry, record.rows, record.crcs, self._recent, verify=self._verify)
        except DamagedError as error:
            raise DamagedError(f"{path}: {error}") from None


def file_bytes(record: ShardRecord, geometry: Geometry) -> int:
    """Size of a shard's file as it was committed."""
    if geometry.codec == codecs.NONE:
        return geometry.file_bytes(record.rows)
    return 0 if record.nbytes is None else record.nbytes
