"""What a run says of the model it was recorded from."""

from __future__ import annotations

import hashlib
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from torch import nn

from tensortape.stores.dtypes import as_numpy

Json = dict[str, Any]
_SAMPLE = 1 << 16  # values of a parameter that enter the fingerprint
# Settings of a config that do not change what is computed: where it comes from, what is returned besides, names, generation.
_NOT_COMPUTING = frozenset(
    {
        *("_commit_hash", "architectures", "dtype", "name_or_path", "torch_dtype", "transformers_version"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class"),
        *("initializer_factor", "initializer_range", "bos_token_id", "eos_token_id"),
    }
)


def about(model: nn.Module, *, trains: bool = False) -> dict[str, Json]:
    """The `model`, `provenance` and `fingerprint` of the run document; one that trains is recognised by its shapes alone."""
    config = getattr(model, "config", None)
    recognised: Json = {"shapes": fingerprint(model, values=False)} if trains else {"weights": fingerprint(model)}
    described: Json = {
        "class": _class_name(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}),
    }
    if config is not None and hasattr(config, "to_dict"):
        described["config"] = _plain(config.to_dict())
        recognised["config"] = _computing(described["config"])
        described["name"] = Path(str(getattr(config, "name_or_path", "") or "")).name
    return {"model": described, "provenance": _versions(), "fingerprint": recognised}


def fingerprint(model: nn.Module, *, values: bool = True) -> str:
    """A digest of every parameter's and buffer's name, shape, dtype and (an even sample of) values."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            found.update(f"{name} {list(tensor.shape)} {tensor.dtype} {_sampled(tensor) if values else ''}\n".encode())
    return found.hexdigest()


def vocabulary(tokenizer: Any) -> str:
    """A digest of what a tokenizer calls which number; of its text, where it has no vocabulary."""
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {repr(tokenizer): 0}
    return hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()


def _sampled(tensor: torch.Tensor) -> str:
    """A checksum of an even sample of values. A rank has only a piece of a sharded tensor, so that one is known by shape alone."""
    if hasattr(tensor, "to_local"):
        return "sharded"
    flat = tensor.detach().reshape(-1)
    sample = as_numpy(flat[:: max(1, flat.numel() // _SAMPLE)].contiguous()).view("u1")
    return str(google_crc32c.value(sample))


def _class_name(model: nn.Module) -> str:
    """The user's class: fully_shard puts one of its own in front."""
    return next(kind.__name__ for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))


def _versions() -> Json:
    packages = ("tensortape", "torch", "transformers", "numpy", "zarr")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _computing(config: Json) -> Json:
    """Those settings of a config, at any depth, that may change what the model computes."""
    kept = {name: value for name, value in config.items() if name not in _NOT_COMPUTING and "attn_implementation" not in name}
    return {name: _computing(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _plain(value: Any) -> Any:
    """JSON of a config: paths shortened to their last part, anything unusual as text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if key != "_name_or_path"}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
