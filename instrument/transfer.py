"""From the device to the host, beside what the model does meanwhile.

What a batch has captured on an accelerator is copied into pinned memory on a stream of our own, one per device, which waits for
what the model has queued so far and for nothing after it. Whoever writes the batch waits for the copies; the loop does not. Pinned
memory is torch's own, which keeps and reuses it; how much is in use is bounded by what the writer lets wait.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from tensortape.stores.dtypes import Array, as_numpy

from .capture import nonfinite_rows


class Transfer:
    """The rows of one batch on their way, by column."""

    def __init__(self) -> None:
        self._counts: dict[str, int | torch.Tensor] = {}
        self._events: dict[torch.device, Any] = {}

    def bring(self, column: str, rows: torch.Tensor) -> Array:
        """Rows as an array on the host; its values are there once `arrived` has returned."""
        if not is_asynchronous(rows.device):
            self._counts[column] = nonfinite_rows(rows)
            return as_numpy(rows)
        self._counts[column] = 0
        if rows.is_floating_point() and rows.numel():  # counted without asking for the sum, which would make the loop wait
            flat = rows.reshape(len(rows), -1)
            self._counts[column] = self._copied((~torch.isfinite(flat.float() if rows.itemsize == 1 else flat)).any(1).sum())
        return as_numpy(self._copied(rows))

    def arrived(self) -> dict[str, int]:
        """Wait for everything; how many rows of each column hold NaN or infinity."""
        for event in self._events.values():
            event.synchronize()
        self._events.clear()
        return {column: int(count) for column, count in self._counts.items()}

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host that is begun now, after what has been queued on the tensor's device."""
        device = tensor.device
        module, side = torch.get_device_module(device), _side_stream(device)
        side.wait_stream(module.current_stream(device))
        with module.stream(side):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type != "cpu")
            host.copy_(tensor.detach(), non_blocking=True)
        if device.type != "cpu":
            tensor.record_stream(side)  # its memory is not given away before it is copied
        self._events[device] = module.Event()
        self._events[device].record(side)
        return host


def is_asynchronous(device: torch.device) -> bool:
    """Whether copies from a device can run beside its work: it has streams."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")


@lru_cache
def _side_stream(device: torch.device) -> Any:
    module = torch.get_device_module(device)
    return module.Stream() if device.type == "cpu" else module.Stream(device=device)
