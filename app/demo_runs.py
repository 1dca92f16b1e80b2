"""What the demo records: the embedded model over the standard library of the machine it runs on."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tensortape.instrument import Site, record
from tensortape.stores import Run

from . import models
from .python_labels import label_tokens, lexical_spans, role_spans

_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "encodings",
    "turtledemo",
    "ensurepip",
    "__pycache__",
}
SITES = ["embed", "resid_post"]
WINDOW = 256
TARGET = "self"
CONCEPTS = {"class": "class ", "import": "import ", "loop": "for "}  # what a line of the window begins with


def source_files(count: int, seed: int) -> list[Path]:
    """Files of the standard library, drawn by the hash of their names so that the draw is the same on every machine."""
    library = Path(sysconfig.get_path("stdlib"))
    found = [path for path in library.rglob("*.py") if not _SKIPPED & set(path.relative_to(library).parts[:-1])]
    drawn = sorted(found, key=lambda path: hashlib.sha256(f"{seed} {path.relative_to(library).as_posix()}".encode()).digest())
    return [path for path in drawn if 2_000 <= path.stat().st_size <= 40_000 and path.read_bytes().isascii()][:count]


def record_sources(to: Path, paths: Sequence[Path], *, trained: bool = True) -> Run:
    """Record the embedded model, or one like it that was not trained, with exact labels of the tokens."""
    model, tokenizer = models.load(models.DEMO)
    labels = {"token/lexical": _labels(lexical_spans), "token/role": _labels(role_spans)}
    return _record(model if trained else _untrained(model), tokenizer, to, paths, sites=SITES, labels=labels)


def record_gradients(to: Path, paths: Sequence[Path]) -> Run:
    """Attention of all heads and, averaged over each window, states and their gradients for the logit of `self`.

    Whether lines of a window begin with a word is added afterwards, from the texts that the run keeps.
    """
    model, tokenizer = models.load(models.DEMO)
    sites = [Site("resid_post[0:-1]", reduce="mean"), Site("resid_post[0:-1]:out.grad", reduce="mean"), Site("attention")]
    word = tokenizer("self")["input_ids"][-1]

    def mean_logit(outputs: Any, batch: Any) -> torch.Tensor:
        kept = batch["attention_mask"]
        found: torch.Tensor = (outputs.logits[..., word] * kept).sum(1) / kept.sum(1)
        return found

    run = _record(model, tokenizer, to, paths, sites=sites, targets={TARGET: mean_logit})
    texts = run["example/text"].rows()
    for name, start in CONCEPTS.items():
        run.add_column(f"example/{name}", [any(line.lstrip().startswith(start) for line in text.splitlines()) for text in texts])
    return run


def _record(model: Any, tokenizer: Any, to: Path, paths: Sequence[Path], **asked: Any) -> Run:
    library = Path(sysconfig.get_path("stdlib"))
    return record(
        model,
        [path.read_text(encoding="ascii") for path in paths],
        tokenizer=tokenizer,
        ids=[path.relative_to(library).as_posix() for path in paths],
        to=to,
        max_length=WINDOW,
        overflow="window",
        mode="overwrite",
        **asked,
    )


def _untrained(model: Any) -> Any:
    """The same architecture with the weights that training begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)(model.config).eval()


def _labels(spans: Callable[[str], Any]) -> Callable[[str, Any], list[str]]:
    return lambda text, offsets: label_tokens(spans(text), text, offsets)
