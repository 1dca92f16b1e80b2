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
    source = _source(name)
    _, named = _architecture(name, revision)
    model = named.from_pretrained(source, revision=revision, dtype=dtype, use_safetensors=True)
    return model.to(device), transformers.AutoTokenizer.from_pretrained(source, revision=revision)


def without_weights(name: str, *, revision: str | None = None, dtype: str = "auto") -> Any:
    """The model that `load` loads, on the meta device: modules, shapes and dtypes out of its config alone."""
    import torch

    config, named = _architecture(name, revision)
    computes = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(computes, torch.dtype):
        raise ValueError(f"--dtype is 'auto' or a torch dtype such as 'bfloat16', not {dtype!r}")
    make = getattr(named, "_from_config", None) or named.from_config  # the latter is only of transformers' Auto classes
    with torch.device("meta"):
        return make(config, dtype=computes).eval()


def _source(name: str) -> str:
    return str(demo_folder()) if name == DEMO else name


def _architecture(name: str, revision: str | None) -> tuple[Any, Any]:
    """(config, class) that a checkpoint names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(_source(name), revision=revision)
    return config, getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)


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
