"""Logical and stored dtypes: views both ways, never casts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, random_values, same_bits, seeds

from tensortape.stores import dtypes
from tensortape.stores.errors import SchemaError

torch = pytest.importorskip("torch")

AS_BITS = {"bfloat16": ("uint16", 2), "float8_e4m3fn": ("uint8", 1), "float8_e5m2": ("uint8", 1)}


@settings(deadline=None)
@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3), seeds)
def test_stored_and_back_keeps_every_bit(dtype, shape, seed):
    values = random_values(np.random.default_rng(seed), dtype, shape)
    stored = dtypes.to_stored(values)
    assert stored.dtype == dtypes.stored(dtype)
    back = dtypes.from_stored(stored, dtype)
    assert back.dtype == DTYPES[dtype] == dtypes.logical(dtype)
    assert same_bits(back, values)


@pytest.mark.parametrize("name", sorted(dtypes.KNOWN))
def test_a_contiguous_array_is_not_copied(name):
    values = np.zeros((4, 3), dtypes.logical(name))
    assert np.shares_memory(dtypes.to_stored(values), values)
    assert np.shares_memory(dtypes.from_stored(dtypes.to_stored(values), name), values)


@pytest.mark.parametrize("view", [np.s_[::2], np.s_[:, ::-1], np.s_[:, 1]])
def test_strided_arrays_are_stored_as_their_values(view):
    values = np.arange(24, dtype=np.float32).reshape(6, 4)[view]
    assert np.array_equal(dtypes.to_stored(values), values)
    assert dtypes.to_stored(values).flags.c_contiguous


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">u2", ">f2"])
def test_big_endian_arrays_are_stored_little_endian(dtype):
    values = np.array([1, 2, 300], dtype)
    stored = dtypes.to_stored(values)
    assert stored.dtype.byteorder in ("<", "=")
    assert stored.tobytes() == np.array([1, 2, 300], dtype.replace(">", "<")).tobytes()


@pytest.mark.parametrize("name", sorted(AS_BITS))
def test_floats_without_a_zarr_type_are_stored_as_unsigned_integers(name):
    kind, width = AS_BITS[name]
    assert dtypes.stored(name) == np.dtype(kind)
    assert dtypes.logical(name) == np.dtype(getattr(ml_dtypes, name))
    assert dtypes.logical(name).itemsize == width


@pytest.mark.parametrize("name", sorted(dtypes.KNOWN))
def test_missing_rows_are_nan_minus_one_the_largest_value_or_false(name):
    fill = np.array(dtypes.fill_value(name)).astype(dtypes.stored(name))
    value = dtypes.from_stored(fill.reshape(1), name)[0]
    if name.startswith(("float", "bfloat")):
        assert np.isnan(value)
    elif name.startswith("uint"):
        assert value == np.iinfo(name).max
    else:
        assert value == (False if name == "bool" else -1)


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "S3", "V4", "longdouble"])
def test_other_dtypes_are_refused_with_those_there_are(dtype):
    with pytest.raises(SchemaError, match=r"cannot be stored; a run holds bool, int8.*bfloat16"):
        dtypes.name_of(np.zeros(2, dtype))


def test_objects_are_refused():
    with pytest.raises(SchemaError, match="list have no numeric dtype"):
        dtypes.as_numpy([1, None])


TENSORS = sorted(set(dtypes.KNOWN) - {"uint16", "uint32", "uint64"})


@pytest.mark.parametrize("name", TENSORS)
def test_torch_tensors_of_all_256_bytes_go_there_and_back(name):
    """From torch to numpy to torch: same dtype, same bits."""
    count = 2 if name == "bool" else 256
    width = dtypes.logical(name).itemsize
    raw = np.repeat(np.arange(count, dtype=np.uint8), width)
    tensor = torch.from_numpy(raw).view(getattr(torch, name))
    array = dtypes.as_numpy(tensor)
    assert dtypes.name_of(array) == name
    assert array.tobytes() == raw.tobytes()
    back = dtypes.to_torch(array, name)
    assert back.dtype == tensor.dtype
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_that_need_gradients_or_have_odd_strides_are_taken_as_values(dtype):
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).to(dtype).requires_grad_().t()
    assert np.array_equal(dtypes.as_numpy(tensor).astype(np.float32), np.arange(12.0).reshape(3, 4).T)


def test_a_read_only_array_becomes_a_tensor_of_its_own():
    """torch has no read-only tensors: writing into one must not write into a memory map."""
    values = np.ones(3, np.float32)
    values.flags.writeable = False
    tensor = dtypes.to_torch(values, "float32")
    tensor[0] = 5
    assert values[0] == 1


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_writable_array_shares_its_memory_with_the_tensor(name):
    values = np.zeros(3, dtypes.logical(name))
    dtypes.to_torch(values, name)[0] = 1
    assert values[0] == 1
