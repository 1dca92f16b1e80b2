"""Which recorders belong together: the ranks of one distributed job write one run, each a part of its own."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from dataclasses import dataclass

import torch.distributed as dist

from .errors import SessionError

_opened: Counter[str] = Counter()


@dataclass(frozen=True)
class Session:
    """The session's name (None: one of its own), and which of its writers this process is."""

    name: str | None
    rank: int = 0
    world_size: int = 1


def session_of(to: str, name: str | None = None) -> Session:
    """The session of a recorder that writes to `to`.

    Ranks agree through the store of their process group: whoever comes first says a name. That waits for nobody, so it does not
    matter which ranks record.

    Raises:
        SessionError: this is one of several processes that nothing connects.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if name is not None:
        return Session(name, rank, size)
    if dist.is_available() and dist.is_initialized():
        return Session(_agreed(to), dist.get_rank(), dist.get_world_size())
    if size == 1:
        return Session(None)
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if job == "none":
        raise SessionError(
            f"this is process {rank} of {size}, but there is no process group by which the recorders could find together; call "
            "torch.distributed.init_process_group before, or give all of them the same session='...'"
        )
    return Session(f"{job}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", rank, size)


def _agreed(to: str) -> str:
    """The same name on every rank, for as many recorders of one run as there are one after another."""
    place = os.path.abspath(to) if "://" not in to else to  # noqa: PTH100 - of a path that may be a URL
    _opened[place] += 1
    key = f"tensortape/{place}/{_opened[place]}"
    store = dist.distributed_c10d._get_default_store()
    return store.compare_set(key, "", uuid.uuid4().hex).decode()
