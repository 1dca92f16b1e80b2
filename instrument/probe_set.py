"""A probe set: fixed examples that are recorded again and again while a model trains, the fair way to compare its steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .inference import inference
from .reading import LoaderReading, read
from .recorder import Recorder
from .room import Room

PHASE = "probe"


class ProbeSet:
    """Batches of a model's arguments, the same at every step.

    The model runs in eval mode without gradients, and its modes are restored; random numbers of the training are not touched. What
    is recorded has the phase `probe` and the number of the step that is done, 0 before the first.

    Args:
        data: dicts of the model's arguments, such as a list of them or a DataLoader that does not shuffle; read anew each time.
        ids: the key of the dicts that holds ids, or "content" to hash the tokens.
        labels: `example/<name>` or `token/<name>` to the key of the dicts that holds them.
        phase: another name, where there are several.

    >>> from tensortape.stores import open_run
    >>> model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), num_layers=2)
    >>> probes = ProbeSet([{"src": torch.randn(2, 5, 8), "id": ["a", "b"]}], ids="id")
    >>> with Recorder(model, sites="resid_post", to="probed.zarr", every=2) as recorder:
    ...     for _ in range(5):
    ...         _ = probes.record(recorder)
    ...         recorder.step()
    >>> open_run("probed.zarr").keys
    [('a', 'probe', 0), ('b', 'probe', 0), ('a', 'probe', 2), ('b', 'probe', 2), ('a', 'probe', 4), ('b', 'probe', 4)]
    """

    def __init__(
        self, data: Iterable[Mapping[str, Any]], *, ids: str = "id", labels: Mapping[str, str] | None = None, phase: str = PHASE
    ) -> None:
        if iter(data) is data:
            raise ValueError("a probe set is read again and again, so data is a list or a DataLoader; an iterator is read up once")
        self._data, self._ids, self._labels, self._phase = data, ids, dict(labels or {}), phase

    def record(self, recorder: Recorder, *, always: bool = False) -> bool:
        """Record the probe set with the weights as they are, if the step that begins is one to record; whether it was.

        Args:
            always: whatever the schedule says, as one does after the last step.
        """
        if not (always or recorder.is_due):
            return False
        model = recorder.model
        reading = LoaderReading(model, self._data, self._ids, self._labels)
        room = Room(recorder.writer, checked=False)
        with torch.random.fork_rng(), inference(model), recorder.evaluating(self._phase):
            read(reading, model, recorder, {}, room=room, progress=False)
        return True
