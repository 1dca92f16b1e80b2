"""Shards that are open for reading, the least recently used ones closed first."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict

from .commits import ShardRecord
from .errors import DamagedError
from .places import Place
from .shards import Geometry, Shard

MOST = 1024


class ShardCache:
    """Opens shards once and keeps at most a quarter of the open-file limit."""

    def __init__(self, place: Place, *, verify: bool) -> None:
        self._place = place
        self._verify = verify
        self._open: OrderedDict[str, tuple[ShardRecord, Shard]] = OrderedDict()
        self._most = min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._lock = threading.Lock()

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

    def check_size(self, path: str, geometry: Geometry, record: ShardRecord, *, sealed: bool) -> None:
        """DamagedError if the file at `path` cannot hold what was committed."""
        try:
            size = self._place.size(path)
        except FileNotFoundError:
            raise DamagedError(f"{path}: the shard is missing") from None
        needed = geometry.file_bytes(record.rows)
        # The tail of a part that is still being written may have grown since; a sealed shard never does.
        if size < needed or (sealed and size != needed):
            raise DamagedError(f"{path}: the shard has {size} bytes instead of {needed}")

    def _load(self, path: str, geometry: Geometry, record: ShardRecord, *, sealed: bool) -> Shard:
        self.check_size(path, geometry, record, sealed=sealed)
        return Shard(self._place.view(path, stays=sealed), geometry, record.rows, record.crcs, verify=self._verify)
