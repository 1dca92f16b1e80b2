"""Where a run lives: one small contract and its implementations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .contract import Place, View
from .local import Durability, LocalPlace

__all__ = ["LocalPlace", "Place", "View", "place_at"]


def place_at(
    where: str | os.PathLike[str], *, durability: Durability = "fsync", storage_options: Mapping[str, Any] | None = None
) -> Place:
    """The place that a path of a folder, or a URL `s3://bucket/path`, stands for.

    Args:
        where: a folder; or text with `://`.
        durability: of a folder: `fsync` or `rename`.
        storage_options: of an object store: see `ObjectPlace`.

    Raises:
        ValueError: options for a folder, or a URL that is none of ours; it is not repeated, as it may hold credentials.
        ImportError: the extra `s3` is not installed.
    """
    text = os.fspath(where)
    if "://" in text:
        return _object_place(text, storage_options or {})
    if text.startswith("s3:/"):
        raise ValueError("a URL s3://... must be given as text: in a Path its two slashes become one")
    if storage_options:
        raise ValueError(f"storage_options are for runs at s3://..., not for the folder {text}")
    return LocalPlace(Path(text).absolute(), durability)  # the working directory may change later


def _object_place(url: str, options: Mapping[str, Any]) -> Place:
    try:
        from .object_store import ObjectPlace
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise ImportError("runs at s3://... need the package obstore: pip install 'tensortape[s3]'") from None
    return ObjectPlace(url, options)
