"""The fast path of nn.TransformerEncoder, off as long as anyone needs it off: it computes a layer in one opaque operation."""

from __future__ import annotations

import threading

import torch
from torch import nn


def needs_slow_path(model: nn.Module) -> bool:
    """Whether a model has layers with a fast path, past most hooks."""
    return any(isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention)) for module in model.modules())


class SlowPath:
    """Counts who needs the fast path off."""

    users = 0
    before = True
    lock = threading.Lock()

    @classmethod
    def enter(cls) -> None:
        """Turn it off."""
        with cls.lock:
            if not cls.users:
                cls.before = torch.backends.mha.get_fastpath_enabled()
            cls.users += 1
            torch.backends.mha.set_fastpath_enabled(False)

    @classmethod
    def leave(cls) -> None:
        """Turn it on again, if it was and nobody else needs it off."""
        with cls.lock:
            cls.users -= 1
            if not cls.users:
                torch.backends.mha.set_fastpath_enabled(cls.before)
