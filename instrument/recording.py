"""record: a whole data set in one call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tensortape.stores import Run, keys, layout, open_run
from tensortape.stores.places.local import Durability
from tensortape.stores.writer import Mode

from .batch import Batch
from .differentiation import differentiate
from .errors import BatchError
from .modules import unwrapped
from .provenance import vocabulary
from .recorder import Recorder
from .sites import Selection
from .targets import Targets
from .texts import Example, Overflow, batches, pad_id, padded, tokenized

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
) -> Run:
    """Run a model over texts, or over a loader's batches, and record chosen sites.

    The model runs in eval mode without gradients, on the device it is on and in its own dtype; its modes are restored afterwards.

    Args:
        model: any torch module.
        data: texts (with `tokenizer`), or an iterable of dicts of the model's arguments, such as a DataLoader.
        to: the run's folder.
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
        mode, durability, memory_budget, recompile, session: as for `Recorder`.
        progress: show a progress bar; by default on a terminal.
        targets: for sites with gradients: name to a function of (outputs, batch) that gives one value per example, [examples]. Each
            is summed and differentiated in a backward of its own, which leaves every `.grad` alone; gradients go to columns
            `...@<name>`, values to `example/target.<name>`. Examples must not interact in the model.

    A key named in `ids` or `labels` is withheld from the model unless its forward takes an argument of that name.

    Returns:
        The run, open for reading.
    """
    is_text = tokenizer is not None or _is_text(data)
    examples = _examples(data, tokenizer, ids, labels or {}, max_length, overflow) if is_text else iter(())
    recorder = Recorder(
        model,
        sites=sites,
        to=to,
        mode=mode,
        durability=durability,
        memory_budget=memory_budget,
        recompile=recompile,
        session=session,
        fingerprint={"tokenizer": vocabulary(tokenizer)} if tokenizer is not None else {},
    )
    with recorder, _inference(unwrapped(model)):
        _check_targets(recorder, targets)
        if is_text:
            groups = batches(examples, batch_tokens, batch_size)
            _keep_tokenizer(recorder, tokenizer)
            _record_texts(recorder, model, groups, pad_id(tokenizer), ids, targets or {}, keep_text=keep_text, progress=progress)
        else:
            _record_loader(recorder, model, data, ids, labels or {}, targets or {}, progress=progress)
    return open_run(Path(to))


def _check_targets(recorder: Recorder, targets: Targets | None) -> None:
    if recorder.has_gradients != bool(targets):
        raise ValueError(
            "sites with gradients need targets={'loss': function of (outputs, batch)} to differentiate"
            if recorder.has_gradients
            else "targets= are for sites with gradients, such as 'resid_post:out.grad' or 'attention.grad', and none is asked for"
        )


def _examples(
    data: Any, tokenizer: Any, ids: Any, labels: Mapping[str, Any], max_length: int | None, overflow: Overflow
) -> Iterator[Example]:
    texts = [data] if isinstance(data, str) else list(data)
    if not texts:
        raise BatchError("there is nothing to record: no texts were given")
    if tokenizer is None:
        raise BatchError("texts need a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)")
    if not all(isinstance(text, str) for text in texts):
        raise BatchError("with a tokenizer, data must be texts; leave the tokenizer out to record a loader of dicts")
    if overflow not in ("error", "truncate", "window"):
        raise ValueError(f"overflow is 'error', 'truncate' or 'window', not {overflow!r}")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is a number of tokens, at least 1; got {max_length}")
    limit = max_length if max_length is not None else _limit(tokenizer)
    given = {name: _label_values(name, values, len(texts)) for name, values in labels.items()}
    return tokenized(texts, tokenizer, ids=_ids_of_texts(ids, len(texts)), labels=given, max_length=limit, overflow=overflow)


def _ids_of_texts(ids: Any, count: int) -> list[str | int]:
    if ids is None or (isinstance(ids, str) and ids == "content"):
        return list(range(count))
    if isinstance(ids, str):
        raise BatchError(f"ids of texts are one per text, or 'content'; got {ids!r}")
    found: list[str | int] = list(keys.normalise(ids))
    if len(found) != count:
        raise BatchError(f"{len(found)} ids were given for {count} texts")
    return found


def _label_values(name: str, values: Any, count: int) -> Any:
    """Labels of texts: a function, or one entry per text; numbers in one dtype, whatever batch they come to."""
    if callable(values):
        return values
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != count:
        raise BatchError(f"labels {name!r} must be a function, or one entry per text, {count} in all; got {values!r}"[:400])
    plain = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
    return np.asarray(values) if plain else values


def _limit(tokenizer: Any) -> int | None:
    """The tokenizer's own limit; transformers writes an astronomical number where there is none."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 1 << 30 else None


def _record_texts(
    recorder: Recorder,
    model: nn.Module,
    groups: Iterator[list[Example]],
    pad: int,
    ids: Any,
    targets: Targets,
    *,
    keep_text: bool,
    progress: bool | None,
) -> None:
    device = _device(model)
    with _bar(progress, "token") as bar:
        for group in groups:
            given: Any = "content" if isinstance(ids, str) else [example.id for example in group]
            with recorder.batch(ids=given, labels=_labels(group, keep_text=keep_text), targets=targets) as batch:
                if batch.recorded:
                    inputs = padded(group, pad, device)
                    _forward(recorder, batch, model, inputs, targets, inputs)
            bar.update(sum(len(example.tokens) for example in group))


def _labels(group: list[Example], *, keep_text: bool) -> dict[str, Any]:
    found: dict[str, Any] = {name: [example.labels[name] for example in group] for name in group[0].labels}
    if keep_text:
        found["example/text"] = [example.text for example in group]
        if all(example.offsets is not None for example in group):
            offsets = [torch.tensor(example.offsets, dtype=torch.int32).reshape(-1, 2) for example in group]
            found["token/char.start"], found["token/char.end"] = [o[:, 0] for o in offsets], [o[:, 1] for o in offsets]
    return found


def _record_loader(
    recorder: Recorder,
    model: nn.Module,
    data: Any,
    ids: Any,
    labels: Mapping[str, str],
    targets: Targets,
    *,
    progress: bool | None,
) -> None:
    if not isinstance(ids, str):
        raise BatchError("ids are missing: name the key of the loader's dicts that holds them (ids='id'), or pass ids='content'")
    device, taken = _device(model), _parameters(model)
    recorded = 0
    with _bar(progress, "batch", total=_length(data)) as bar:
        for entries in data:
            if not isinstance(entries, Mapping):
                raise BatchError(f"a loader must give dicts of the model's arguments; got {type(entries).__name__}")
            named = {name: _entry(entries, key) for name, key in labels.items()}
            withheld = {ids, *labels.values()} - taken
            moved = {key: _moved(value, device) for key, value in entries.items()}
            inputs = {key: value for key, value in moved.items() if key not in withheld}
            given = ids if ids == "content" else _entry(entries, ids)
            with recorder.batch(ids=given, labels=named, targets=targets) as batch:
                if batch.recorded:
                    _forward(recorder, batch, model, inputs, targets, moved)
            recorded += 1
            bar.update()
    if not recorded:
        raise BatchError("there is nothing to record: the loader gave no batch")


def _forward(
    recorder: Recorder, batch: Batch, model: nn.Module, inputs: Mapping[str, Any], targets: Targets, entries: Mapping[str, Any]
) -> None:
    if targets:
        differentiate(recorder, batch, model, inputs, targets, entries)
    else:
        model(**inputs)


def _length(data: Any) -> int | None:
    """Number of batches where the loader knows it; one over a stream has a length only in name."""
    try:
        return len(data)
    except TypeError:
        return None


def _entry(entries: Mapping[str, Any], key: str) -> Any:
    if key not in entries:
        raise BatchError(f"the loader's dicts have no key {key!r}; they have {', '.join(map(str, entries))}")
    return entries[key]


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(unwrapped(model).forward).parameters)


def _device(model: nn.Module) -> torch.device:
    """Where batches go: the device of the input embedding (with layers on several devices, the first)."""
    embedding = getattr(unwrapped(model), "get_input_embeddings", lambda: None)()
    source = embedding if isinstance(embedding, nn.Module) else model
    return next((parameter.device for parameter in source.parameters()), torch.device("cpu"))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _is_text(data: Any) -> bool:
    return isinstance(data, str) or (isinstance(data, (list, tuple)) and (not data or isinstance(data[0], str)))


def _keep_tokenizer(recorder: Recorder, tokenizer: Any) -> None:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                recorder.writer.add_asset(f"tokenizer.{path.name}", path.read_bytes())


def _bar(progress: bool | None, unit: str, total: int | None = None) -> Any:
    """A progress bar; None lets tqdm show it on a terminal only."""
    return tqdm(total=total, unit=unit, unit_scale=unit == "token", disable=None if progress is None else not progress)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
