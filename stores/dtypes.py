"""Logical and stored dtypes.

A column has a *logical* dtype (what the model computed) and a *stored* one (what every Zarr reader can open). They differ where
Zarr has no common type: bfloat16 and float8 are kept as unsigned integers of the same width with the attribute `logical_dtype`.
Conversions are views, never casts: all bit patterns survive.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from .errors import SchemaError

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]

TEXT = "text"

# float8 and bfloat16 have no Zarr type that zarr-python, TensorStore and zarrs all open.
_AS_BITS: dict[str, tuple[np.dtype[Any], np.dtype[Any]]] = {
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), np.dtype("uint16")),
    "float8_e4m3fn": (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype("uint8")),
    "float8_e5m2": (np.dtype(ml_dtypes.float8_e5m2), np.dtype("uint8")),
}
_NAN_BITS = {"bfloat16": 0x7FC0, "float8_e4m3fn": 0x7F, "float8_e5m2": 0x7F}
_PLAIN = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")

KNOWN = (*_PLAIN, *_AS_BITS)


def logical(name: str) -> np.dtype[Any]:
    """The numpy dtype that values of the logical dtype `name` are returned in."""
    _check(name)
    return _AS_BITS[name][0] if name in _AS_BITS else np.dtype(name)


def stored(name: str) -> np.dtype[Any]:
    """The numpy dtype on disk of the logical dtype `name`, little-endian."""
    _check(name)
    return (_AS_BITS[name][1] if name in _AS_BITS else np.dtype(name)).newbyteorder("<")


def fill_value(name: str) -> float | int | bool:
    """What rows past the committed ones hold: NaN, -1 for signed integers, the largest value for unsigned ones, False."""
    if name in _NAN_BITS:
        return _NAN_BITS[name]
    kind = stored(name).kind
    if kind == "f":
        return float("nan")
    if kind == "u":
        return int(np.iinfo(stored(name)).max)
    return False if kind == "b" else -1


def name_of(array: Array) -> str:
    """The logical dtype name of an array; SchemaError for one that no run can hold."""
    for name, (native, _) in _AS_BITS.items():
        if array.dtype == native:
            return name
    _check(array.dtype.name)
    return array.dtype.name


def to_stored(array: Array) -> Array:
    """The same bits as the stored dtype, C-contiguous; no copy where none is needed."""
    name = name_of(array)
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    if name in _AS_BITS:
        return contiguous.view(_AS_BITS[name][1])
    return contiguous.astype(stored(name), copy=False)


def from_stored(array: Array, name: str) -> Array:
    """The stored bits seen as the logical dtype (a view)."""
    return array.view(_AS_BITS[name][0]) if name in _AS_BITS else array


def as_numpy(values: Any) -> Array:
    """A numpy array of the same bits: numpy arrays as they are, torch tensors moved to the host, sequences converted."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        return _tensor_as_numpy(values.detach().cpu())
    array = np.asarray(values)
    if array.dtype == object:
        raise SchemaError(f"values of kind {type(values).__name__} have no numeric dtype; give arrays, numbers or text")
    return array


def to_torch(array: Array, name: str) -> torch.Tensor:
    """A torch tensor of the same bits (bfloat16 as torch.bfloat16); shares memory when the array is writable."""
    import torch

    bits = array.view(_AS_BITS[name][1]) if name in _AS_BITS else array
    if not bits.flags.writeable:
        bits = bits.copy()
    tensor = torch.from_numpy(np.ascontiguousarray(bits))
    return tensor.view(getattr(torch, name)) if name in _AS_BITS else tensor


def _tensor_as_numpy(tensor: torch.Tensor) -> Array:
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if name in _AS_BITS:
        bits = {1: torch.uint8, 2: torch.int16}[tensor.element_size()]
        return tensor.contiguous().view(bits).numpy().view(_AS_BITS[name][0])
    return tensor.numpy()


def _check(name: str) -> None:
    if name not in KNOWN:
        raise SchemaError(f"dtype {name!r} cannot be stored; a run holds {', '.join(KNOWN)} and text")
