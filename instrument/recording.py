"""record: a whole data set in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from tensortape.stores import Run, RunWriter, layout, open_run
from tensortape.stores.places.local import Durability
from tensortape.stores.writer import Mode

from . import fitting
from .corpus import corpus
from .inference import inference
from .modules import unwrapped
from .provenance import vocabulary
from .reading import LoaderReading, Reading, TextReading, read, twice
from .recorder import Recorder
from .room import Room
from .sites import Selection
from .targets import Targets
from .texts import Overflow

BATCH_TOKENS = 4096


def record(
    model: nn.Module,
    data: str | Sequence[str] | Iterable[Mapping[str, Any]],
    *,
    to: str | os.PathLike[str],
    sites: Selection,
    tokenizer: Any = None,
    ids: Any = None,
    labels: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    overflow: Overflow = "error",
    batch_tokens: int = BATCH_TOKENS,
    batch_size: int | None = None,
    keep_text: bool = True,
    mode: Mode = "create",
    durability: Durability = "fsync",
    memory_budget: int = layout.DEFAULT_BUDGET,
    recompile: bool = False,
    progress: bool | None = None,
    targets: Targets | None = None,
    session: str | None = None,
    check_disk: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """Run a model over texts, or over a loader's batches, and record chosen sites.

    The model runs in eval mode without gradients, on the device it is on and in its own dtype; its modes are restored afterwards.

    Args:
        model: any torch module.
        data: texts (with `tokenizer`), or an iterable of dicts of the model's arguments, such as a DataLoader.
        to: the run's folder, or `s3://bucket/path`.
        sites: what to record; see `Recorder`.
        tokenizer: of transformers; its files are kept in the run, so that tokens can be shown without it.
        ids: for texts one per text (default: their numbers); for a loader the key of its dicts that holds them. "content" hashes
            the tokens instead.
        labels: `example/<name>` or `token/<name>` to values. For texts: one entry per text, or a function of (text, character
            offsets [T, 2]) that gives an example's labels. For a loader: the key of its dicts.
        max_length: most tokens per example; by default what the tokenizer says the model can take.
        overflow: what to do with a longer text: refuse it, cut it, or make an example of every `max_length` tokens, with ids
            `<id>:<first token>` and the text's id in `example/document`.
        batch_tokens, batch_size: most positions, pads included, and most examples per batch of texts.
        keep_text: also store each example's text and each token's character span in it.
        mode, durability, memory_budget, recompile, session, storage_options: as for `Recorder`.
        progress: show a progress bar; by default on a terminal.
        targets: for sites with gradients: name to a function of (outputs, batch) that gives one value per example, [examples]. Each
            is summed and differentiated in a backward of its own, which leaves every `.grad` alone; gradients go to columns
            `...@<name>`, values to `example/target.<name>`. Examples must not interact in the model.
        check_disk: estimate after the first batch what the rest will take, and refuse to go on where the disk has no room for it.
            What a loader without a length will give is not known.

    A key named in `ids` or `labels` is withheld from the model unless its forward takes an argument of that name.

    Returns:
        The run, open for reading.

    Raises:
        DiskShortError: the first batch is recorded; `mode="resume"` goes on once there is room. Whatever `Recorder` raises.
    """
    texts = corpus(data, tokenizer, ids, labels or {}, max_length, overflow) if tokenizer is not None or _is_text(data) else None
    items = fitting.resumed(fitting.items_of(sites), to) if mode == "resume" else fitting.items_of(sites)
    first, data = twice(data) if fitting.unfitted(items) else (data, data)

    def reading(given: Any) -> Reading:
        if texts is None:
            return LoaderReading(model, given, ids, labels or {})
        return TextReading(model, texts, isinstance(ids, str), batch_tokens, batch_size, keep_text)

    settings: Any = {"memory_budget": memory_budget, "recompile": recompile}
    shared: Any = {"session": session, "storage_options": storage_options}
    if fitting.unfitted(items):
        RunWriter(to, mode=mode, storage_options=storage_options).close()  # refuses a path before the first look, not after it
        items = _with_components(items, model, reading(first), settings)
    words = {"tokenizer": vocabulary(tokenizer)} if tokenizer is not None else {}
    recorder = Recorder(model, sites=items, to=to, mode=mode, durability=durability, fingerprint=words, **settings, **shared)
    with recorder, inference(unwrapped(model)):
        _check_targets(recorder, targets)
        if texts is not None:
            _keep_tokenizer(recorder, tokenizer)
        room = Room(recorder.writer, checked=check_disk)
        read(reading(data), model, recorder, targets or {}, room=room, progress=progress)
    return open_run(to, storage_options=storage_options)


def _with_components(items: fitting.Items, model: nn.Module, reading: Reading, settings: Any) -> fitting.Items:
    """Sites with principal components, fitted on a first look: whole rows of the first batches, in a run that is deleted again."""
    sites = fitting.unfitted(items)
    most = max(site.project.fit_tokens for site in sites if site.project is not None)
    with TemporaryDirectory(prefix="tensortape-first-look-") as folder:
        path = Path(folder) / "run.zarr"
        recorder = Recorder(model, sites=fitting.whole(sites), to=path, durability="rename", **settings)
        with recorder, inference(unwrapped(model)):
            read(reading, model, recorder, {}, room=Room(recorder.writer, checked=False), progress=False, most=most)
        return fitting.fitted_on(open_run(path), items)


def _check_targets(recorder: Recorder, targets: Targets | None) -> None:
    if recorder.has_gradients != bool(targets):
        raise ValueError(
            "sites with gradients need targets={'loss': function of (outputs, batch)} to differentiate"
            if recorder.has_gradients
            else "targets= are for sites with gradients, such as 'resid_post:out.grad' or 'attention.grad', and none is asked for"
        )


def _is_text(data: Any) -> bool:
    return isinstance(data, str) or (isinstance(data, (list, tuple)) and (not data or isinstance(data[0], str)))


def _keep_tokenizer(recorder: Recorder, tokenizer: Any) -> None:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                recorder.writer.add_asset(f"tokenizer.{path.name}", path.read_bytes())
