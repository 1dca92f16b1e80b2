"""The bytes of a shard, held to a reference written from the Zarr v3 sharding specification."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import bits, drawn_shards, random_values, same_bits, writer_at

from tensortape.stores import layout, open_run
from tensortape.stores.layout import Grid, plan
from tensortape.stores.shards import Geometry, Shard, encode

ABSENT = 2**64 - 1


def crc32c_table() -> list[int]:
    """The 256 remainders of the Castagnoli polynomial, least significant bit first."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


TABLE = crc32c_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def with_checksum(data: bytes) -> bytes:
    return data + struct.pack("<I", crc32c(data))


def reference_shard(rows: np.ndarray, grid: Grid, fill: object) -> bytes:
    """A shard of `rows`, from the specification: chunks in C order of the grid, those without a row absent, then the index."""
    whole = np.full(grid.shard, fill, rows.dtype)
    whole[tuple(slice(size) for size in rows.shape)] = rows
    body, index = b"", b""
    for place in itertools.product(*(range(s // c) for s, c in zip(grid.shard, grid.chunk, strict=True))):
        if place[0] * grid.chunk[0] >= len(rows):
            index += struct.pack("<QQ", ABSENT, ABSENT)
            continue
        chunk = whole[tuple(slice(p * c, p * c + c) for p, c in zip(place, grid.chunk, strict=True))]
        encoded = with_checksum(chunk.tobytes())
        index += struct.pack("<QQ", len(body), len(encoded))
        body += encoded
    return body + with_checksum(index)


def reference_rows(data: bytes, count: int, grid: Grid, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The first `count` rows of a shard, found through its index as the specification says; checksums are checked."""
    counts = [s // c for s, c in zip(grid.shard, grid.chunk, strict=True)]
    slots = int(np.prod(counts))
    index = data[-16 * slots - 4 :]
    assert index == with_checksum(index[:-4])
    whole = np.zeros(grid.shard, dtype)
    for slot, place in enumerate(itertools.product(*map(range, counts))):
        offset, nbytes = struct.unpack_from("<QQ", index, 16 * slot)
        if offset == ABSENT:
            continue
        chunk = data[offset : offset + nbytes]
        assert chunk == with_checksum(chunk[:-4])
        where = tuple(slice(p * c, p * c + c) for p, c in zip(place, grid.chunk, strict=True))
        whole[where] = np.frombuffer(chunk[:-4], dtype).reshape(grid.chunk)
    return whole[(slice(count), *map(slice, shape))]


def test_the_reference_checksum_is_crc32c():
    """The check value of the CRC catalogue."""
    assert crc32c(b"123456789") == 0xE3069283


def shard_of(rows: np.ndarray, geometry: Geometry, fill: object = 0) -> tuple[Shard, bytes]:
    encoded = encode(rows, geometry, fill)
    data = b"".join(bytes(buffer) for buffer in encoded.buffers)
    return Shard(data, geometry, len(rows), encoded.crcs), data


@settings(deadline=None, max_examples=80)
@given(drawn_shards, st.sampled_from([0, 1]))
def test_encoded_bytes_are_those_of_the_specification(drawn, fill):
    geometry, rows = drawn
    encoded = encode(rows, geometry, fill)
    data = b"".join(bytes(buffer) for buffer in encoded.buffers)
    assert data == reference_shard(rows, geometry.grid, fill)
    assert len(data) == geometry.file_bytes(len(rows))
    assert same_bits(reference_rows(data, len(rows), geometry.grid, geometry.shape, geometry.dtype), rows)


@settings(deadline=None, max_examples=80)
@given(drawn_shards, st.data())
def test_slices_and_gathers_are_those_of_numpy(drawn, data):
    """Any slice, and rows in any order with repetitions, from shards that are full or not."""
    geometry, rows = drawn
    shard, _ = shard_of(rows, geometry)
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    chosen = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=20)))
    assert shard.damaged() == []
    assert same_bits(shard.slice(start, stop), rows[start:stop])
    assert same_bits(shard.gather(chosen), rows[chosen])


@settings(deadline=None)
@given(drawn_shards)
def test_checksums_of_a_record_cover_the_committed_rows_only(drawn):
    """One per chunk, over the bytes of its rows: they stay right when a longer tail replaces the file."""
    geometry, rows = drawn
    half = rows[: max(len(rows) // 2, 1)]
    crcs = encode(half, geometry, 0).crcs
    for chunk, crc in enumerate(crcs):
        first = chunk // geometry.pieces * geometry.chunk_rows
        if geometry.pieces == 1:
            assert crc == crc32c(half[first : first + geometry.chunk_rows].tobytes())
    longer = b"".join(bytes(buffer) for buffer in encode(rows, geometry, 0).buffers)
    old_view = Shard(longer, geometry, len(half), crcs)
    assert old_view.damaged() == []
    assert same_bits(old_view.slice(0, len(half)), half)


@settings(deadline=None)
@given(drawn_shards, st.data())
def test_a_changed_byte_damages_the_chunk_that_holds_it(drawn, data):
    """A byte of a committed row: that chunk and no other. Any other byte: the structure that foreign readers use."""
    geometry, rows = drawn
    shard, original = shard_of(rows, geometry)
    assert shard.structure_is_right()
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= data.draw(st.integers(1, 255))
    damaged = Shard(bytes(changed), geometry, len(rows), encode(rows, geometry, 0).crcs)
    chunk, within = divmod(position, geometry.stride)
    if position < geometry.chunks_for(len(rows)) * geometry.stride and within < geometry.committed_bytes(chunk, len(rows)):
        assert damaged.damaged() == [chunk]
        assert damaged.damaged([chunk]) == [chunk]
    else:
        assert damaged.damaged() == []
        assert not damaged.structure_is_right()


def test_unchecked_shards_are_never_damaged():
    geometry = Geometry(Grid((2,), (4,)), (), np.dtype("int8"))
    _, data = shard_of(np.arange(3, dtype=np.int8), geometry)
    assert Shard(b"\xff" + data[1:], geometry, 3, np.zeros(2, "<u4"), verify=False).damaged() == []


ALIGNED = [np.dtype(name) for name in ("bool", "int8", "uint16", "float16", "float32", "int32")]


@pytest.mark.parametrize("dtype", ALIGNED, ids=str)
def test_a_slice_within_one_chunk_is_a_view(dtype):
    """No byte is copied, and the view is read-only."""
    geometry = Geometry(Grid((8, 3), (32, 3)), (3,), dtype)
    data = b"".join(bytes(b) for b in encode(np.ones((20, 3), dtype), geometry, 0).buffers)
    shard = Shard(data, geometry, 20, np.zeros(3, "<u4"))
    for start, stop in [(0, 8), (9, 15), (16, 20)]:
        rows = shard.slice(start, stop)
        assert np.shares_memory(rows, np.frombuffer(data, np.uint8))
        assert not rows.flags.writeable
        assert rows.flags.aligned


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_eight_byte_values_are_copied_into_alignment(dtype):
    """Checksums of four bytes push every second chunk off the alignment of eight."""
    geometry = Geometry(Grid((8,), (32,)), (), np.dtype(dtype))
    shard, _ = shard_of(np.arange(20, dtype=dtype), geometry)
    assert shard.slice(9, 15).flags.aligned
    assert shard.slice(9, 15).tolist() == list(range(9, 15))


@pytest.mark.parametrize("dtype", ALIGNED, ids=str)
def test_a_slice_across_chunks_is_a_copy(dtype):
    geometry = Geometry(Grid((8,), (32,)), (), dtype)
    shard, data = shard_of(np.ones(20, dtype), geometry)
    assert not np.shares_memory(shard.slice(7, 9), np.frombuffer(data, np.uint8))


def test_a_gather_is_a_copy_that_may_be_written():
    geometry = Geometry(Grid((8,), (32,)), (), np.dtype("float32"))
    shard, data = shard_of(np.ones(20, np.float32), geometry)
    found = shard.gather(np.array([3, 3, 1]))
    found[:] = 7
    assert shard.slice(0, 4).tolist() == [1, 1, 1, 1]
    assert not np.shares_memory(found, np.frombuffer(data, np.uint8))


def test_whole_chunks_are_written_from_where_they_are():
    """A contiguous block that fills chunks is not copied while encoding."""
    geometry = Geometry(Grid((8, 3), (32, 3)), (3,), np.dtype("float32"))
    rows = np.ones((32, 3), np.float32)
    buffers = encode(rows, geometry, 0).buffers
    assert sum(isinstance(buffer, np.ndarray) and np.shares_memory(buffer, rows) for buffer in buffers) == 4


def test_sizes_of_a_geometry():
    geometry = Geometry(Grid((4, 2, 3), (8, 6, 3)), (5, 3), np.dtype("uint16"))
    assert (geometry.shard_rows, geometry.chunk_rows, geometry.pieces, geometry.slots) == (8, 4, 3, 6)
    assert (geometry.chunk_bytes, geometry.stride, geometry.chunk_row_bytes) == (48, 52, 12)
    assert [geometry.chunks_for(rows) for rows in (1, 4, 5, 8)] == [3, 3, 6, 6]
    assert [geometry.committed_bytes(chunk, 5) for chunk in range(6)] == [48, 48, 48, 12, 12, 12]


def test_rows_over_the_limit_are_cut_and_put_together_again(tmp_path, monkeypatch):
    """Through writer and reader, with the limit of 8 MiB lowered to 100 bytes."""
    monkeypatch.setattr(layout, "SPLIT_ROW_BYTES", 100)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 50)
    monkeypatch.setattr(layout, "SHARD_BYTES", 1000)
    rows = random_values(np.random.default_rng(3), "bfloat16", (11, 13, 7))
    assert plan((13, 7), 2, 1000) == Grid((1, 7, 7), (4, 14, 7))
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=["a", "b"], columns={"token/h": [rows[:6], rows[6:]]})
    run = open_run(tmp_path / "run.zarr")
    assert len(run.parts[0].arrays["token/h"].shards) == 3
    assert same_bits(run["token/h"].rows(), rows)
    assert same_bits(run["token/h"].rows([10, 0, 5, 5]), rows[[10, 0, 5, 5]])
    assert same_bits(run["token/h"][1], rows[6:])
    assert run.verify().ok


def test_a_row_really_over_8_mib_is_cut(tmp_path):
    """Nothing lowered: rows of 8 MiB and 2 KiB become two pieces."""
    rows = np.arange(2 * 4097 * 1024, dtype=np.uint16).reshape(2, 4097, 1024)
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.append(ids=["a"], columns={"token/h": [rows]})
    column = open_run(tmp_path / "run.zarr")["token/h"]
    assert open_run(tmp_path / "run.zarr").parts[0].columns["token/h"].arrays["values"].grid.chunk == (1, 4096, 1024)
    assert np.array_equal(bits(column.rows([1, 0])), rows[[1, 0]])
