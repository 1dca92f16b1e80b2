"""Shards that are open for reading, the least recently used ones closed first."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict

from .commits import ShardRecord
from .errors import DamagedError
from .places import Place, View
from .shards import Geometry, Shard

MOST = 1024
FETCHED_BYTES = 256 << 20


class ShardCache:
    """Opens shards once. Keeps at most a quarter of the open-file limit, and of bytes that had to be fetched `most_bytes`."""

    def __init__(self, place: Place, *, verify: bool, most_bytes: int = FETCHED_BYTES) -> None:
        self._place = place
        self._verify = verify
        self._open: OrderedDict[str, tuple[ShardRecord, Shard, View]] = OrderedDict()
        self._most = min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._most_bytes = most_bytes
        self._fetched = place.fetched
        self._lock = threading.Lock()

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

    def _close_some(self) -> None:
        """Give back what was fetched for the shards that have not been used for longest; not for the one that is used now."""
        self._fetched = self._place.fetched
        held = sum(view.held for _, _, view in self._open.values())
        while held > self._most_bytes and len(self._open) > 1:
            held -= self._open.popitem(last=False)[1][2].held

    def _load(self, path: str, geometry: Geometry, record: ShardRecord, *, sealed: bool) -> tuple[Shard, View]:
        needed = geometry.file_bytes(record.rows)
        try:
            view = self._place.view(path, expected=needed, stays=sealed)
        except FileNotFoundError:
            raise DamagedError(f"{path}: the shard is missing") from None
        size = len(view.content)
        # The tail of a part that is still being written may have grown since; a sealed shard never does.
        if size < needed or (sealed and size != needed):
            raise DamagedError(f"{path}: the shard has {size} bytes instead of {needed}")
        return Shard(view.content, geometry, record.rows, record.crcs, verify=self._verify, load=view.load), view
