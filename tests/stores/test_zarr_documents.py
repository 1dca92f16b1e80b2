"""zarr.json documents are zarr-python's own, with our shape."""

from __future__ import annotations

import json

import pytest
import zarr
from strategies import DTYPES
from zarr.codecs import Crc32cCodec, ShardingCodec
from zarr.storage import MemoryStore

from tensortape.stores import dtypes, zarr_documents
from tensortape.stores.schema import column_schema


def opened(data: bytes):
    """What zarr-python makes of a document."""
    from zarr.core.buffer import default_buffer_prototype

    buffer = default_buffer_prototype().buffer.from_bytes(data)
    return zarr.open(MemoryStore({"zarr.json": buffer}), mode="r")


@pytest.mark.parametrize("dtype", sorted(dtypes.KNOWN))
def test_an_array_document_says_dtype_shape_shards_and_checksums(dtype):
    column = column_schema("token/h", dtype, (3, 5), shard_bytes=1 << 20, axes=("head", "neuron"), attributes={"unit": "m"})
    role = column.arrays["values"]
    array = opened(zarr_documents.with_rows(zarr_documents.array(column, role), 12))
    assert array.shape == (12, 3, 5)
    assert array.dtype == dtypes.stored(dtype)
    assert (array.chunks, array.shards) == (role.grid.chunk, role.grid.shard)
    assert array.metadata.dimension_names == ("token", "head", "neuron")
    assert dict(array.attrs) == {"logical_dtype": dtype, "column": "token/h", "unit": "m"}
    [codec] = array.metadata.codecs
    assert isinstance(codec, ShardingCodec)
    assert isinstance(codec.codecs[-1], Crc32cCodec)
    assert len(codec.codecs) == 2


def test_the_arrays_of_a_text_have_their_own_rows():
    column = column_schema("example/title", "text", shard_bytes=1 << 20)
    names = [
        opened(zarr_documents.with_rows(zarr_documents.array(column, role), 0)).metadata.dimension_names
        for role in column.arrays.values()
    ]
    assert names == [("byte",), ("example",)]


def test_what_a_user_says_of_a_column_never_hides_what_the_run_says():
    """`logical_dtype` is how other readers learn that a uint16 is a bfloat16."""
    column = column_schema("token/h", "bfloat16", shard_bytes=1 << 20, attributes={"logical_dtype": "float64", "column": "x"})
    document = zarr_documents.array(column, column.arrays["values"])
    assert document["attributes"] == {"logical_dtype": "bfloat16", "column": "token/h"}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_rows_are_all_that_differs_between_two_documents_of_an_array(dtype):
    column = column_schema("token/h", dtype, (3,), shard_bytes=1 << 20)
    document = zarr_documents.array(column, column.arrays["values"])
    few, many = (json.loads(zarr_documents.with_rows(document, rows)) for rows in (1, 10**12))
    assert (few.pop("shape"), many.pop("shape")) == ([1, 3], [10**12, 3])
    assert few == many


def test_the_rows_can_be_read_back_and_any_other_difference_is_told():
    column = column_schema("token/h", "int8", (3,), shard_bytes=1 << 20)
    document = zarr_documents.array(column, column.arrays["values"])
    file = zarr_documents.with_rows(document, 7)
    assert zarr_documents.rows_of(file, document) == 7
    assert zarr_documents.rows_of(file.replace(b"int8", b"int9", 1), document) is None
    assert zarr_documents.rows_of(file[:-1], document) is None


def test_a_group_document_holds_its_attributes():
    group = opened(zarr_documents.group({"a": [1, {"b": None}], "é": "ü"}))
    assert isinstance(group, zarr.Group)
    assert dict(group.attrs) == {"a": [1, {"b": None}], "é": "ü"}
