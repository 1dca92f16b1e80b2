"""Loading models and tokenizers by name; `demo` is the model that comes with the package."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tensortape.stores import Run

DEMO = "demo"
_ASSET = "tokenizer."


def demo_folder() -> Path:
    """The folder of the embedded model."""
    return Path(str(files("tensortape.app") / "model"))


def load(name: str, *, revision: str | None = None, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer): the class the checkpoint names, from safetensors only, without running code of the checkpoint."""
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = str(demo_folder()) if name == DEMO else name
    config = transformers.AutoConfig.from_pretrained(source, revision=revision)
    named = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    model = named.from_pretrained(source, revision=revision, dtype=dtype, use_safetensors=True)
    return model.to(device), transformers.AutoTokenizer.from_pretrained(source, revision=revision)


def recorded_tokenizer(run: Run) -> Any:
    """The tokenizer kept in a run; None if the run has none."""
    from transformers import AutoTokenizer

    names = [name for name in run.assets if name.startswith(_ASSET)]
    if not names:
        return None
    with TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name.removeprefix(_ASSET)).write_bytes(run.asset(name))
        return AutoTokenizer.from_pretrained(folder)
