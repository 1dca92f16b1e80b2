"""Frames are expanded only into what a chunk must be; frames of zstd are built here from RFC 8878, without its library."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import Blosc, Zstd
from strategies import DTYPES, bits, random_values, seeds

from tensortape.stores import codecs
from tensortape.stores.errors import DamagedError, SchemaError

COMPRESSING = ["lz4", "zstd"]
KIBI = 1 << 10


def zstd_frame(content: bytes, *, size: int | None, width: int = 4, repeated: int = 1) -> bytes:
    """A frame of one block, `content`, or if it is one byte of that byte repeated; `size` is stated in `width` bytes."""
    flag = {0: 0, 1: 0, 2: 1, 4: 2, 8: 3}[width if size is not None else 0]
    single = size is not None and width == 1
    head = struct.pack("<IB", 0xFD2FB528, flag << 6 | single << 5) + (b"" if single else b"\x70")
    if size is not None:
        head += (size - 256 if width == 2 else size).to_bytes(width, "little")
    kind, length = (1, repeated) if repeated > 1 else (0, len(content))
    return head + (length << 3 | kind << 1 | 1).to_bytes(3, "little") + content


def array(frame: bytes) -> np.ndarray:
    return np.frombuffer(frame, np.uint8)


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_chunk_comes_back_bit_for_bit(name, dtype):
    values = random_values(np.random.default_rng(0), dtype, (61, 7))
    chunk = bits(values) if dtype == "bfloat16" else values
    found = codecs.expand(array(codecs.compress(chunk, name)), name, chunk.nbytes)
    assert found.tobytes() == chunk.tobytes()


def test_frames_are_those_of_the_libraries():
    """Any decoder of blosc and zstd opens them; blosc shuffles by the width of the values."""
    chunk = np.arange(1000, dtype="<u2")
    lz4 = codecs.compress(chunk, "lz4")
    assert Blosc().decode(lz4) == chunk.tobytes()
    assert (lz4[3], lz4[2] & 0b100, lz4[2] >> 5) == (2, 0b100, 1)  # typesize, bit shuffle, LZ4
    assert Zstd().decode(codecs.compress(chunk, "zstd")) == chunk.tobytes()


@pytest.mark.parametrize(("count", "width"), [(200, 1), (300, 2), (70_000, 4), (70_000, 8)])
def test_the_content_size_of_a_zstd_frame_is_read_in_all_its_forms(count, width):
    frame = array(zstd_frame(b"\x07", size=count, width=width, repeated=count))
    assert codecs.expand(frame, "zstd", count).tolist() == [7] * count
    with pytest.raises(DamagedError, match=f"states {count} bytes of content, where a chunk has {count + 1}"):
        codecs.expand(frame, "zstd", count + 1)


def test_the_window_and_a_dictionary_are_stepped_over():
    """A frame that names a dictionary states its content after it; what it cannot be is expanded."""
    head = struct.pack("<IB", 0xFD2FB528, 2 << 6 | 3) + b"\x70" + struct.pack("<II", 77, 4321)
    with pytest.raises(DamagedError, match="states 4321 bytes"):
        codecs.expand(array(head), "zstd", 1)
    with pytest.raises(DamagedError, match="cannot be expanded"):
        codecs.expand(array(head), "zstd", 4321)


def test_a_zstd_frame_without_a_content_size_is_refused():
    """It could hold anything; numcodecs would expand it until it ends."""
    frame = zstd_frame(b"\x00", size=None, repeated=100 * KIBI)
    assert len(Zstd().decode(frame)) == 100 * KIBI
    with pytest.raises(DamagedError, match="states None bytes of content"):
        codecs.expand(array(frame), "zstd", 100 * KIBI)


def test_a_frame_of_more_than_it_states_is_refused():
    frame = array(zstd_frame(b"\x00", size=1000, repeated=100 * KIBI))
    with pytest.raises(DamagedError, match="cannot be expanded"):
        codecs.expand(frame, "zstd", 1000)


def bombs() -> dict[str, tuple[str, bytes]]:
    """Small frames of a GiB of zeros, honest and not."""
    block = (128 * KIBI << 3 | 1 << 1).to_bytes(3, "little") + b"\x00"
    zeros = struct.pack("<IBBQ", 0xFD2FB528, 3 << 6, 0x70, 1 << 30) + block * 8191
    last = (128 * KIBI << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\x00"
    lz4 = bytearray(codecs.compress(np.zeros(1 << 20, np.uint8), "lz4"))
    lz4[4:8] = struct.pack("<I", 1 << 30)
    return {"zstd": ("zstd", zeros + last), "lz4": ("lz4", bytes(lz4))}


@pytest.mark.parametrize("kind", ["zstd", "lz4"])
def test_a_decompression_bomb_never_expands(kind):
    name, frame = bombs()[kind]
    tracemalloc.start()
    with pytest.raises(DamagedError, match=f"states {1 << 30} bytes of content, where a chunk has 1000"):
        codecs.expand(array(frame), name, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_blosc_frame_that_claims_to_be_longer_than_it_is_is_refused():
    """c-blosc goes by what a frame says of its own size: it would read past the end."""
    frame = codecs.compress(np.arange(5000, dtype="<i4"), "lz4")
    for cut in (0, 3, 15, 16, 100, len(frame) - 1):
        with pytest.raises(DamagedError, match="frame of"):
            codecs.expand(array(frame[:cut]), "lz4", 20_000)


@pytest.mark.parametrize("name", COMPRESSING)
@given(seed=seeds, data=st.data())
def test_changed_frames_are_refused_or_expand_to_a_chunk(name, seed, data):
    chunk = np.random.default_rng(seed).normal(size=999).astype(np.float16)
    frame = bytearray(codecs.compress(chunk, name))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, min(len(frame) - 1, 30)))] = data.draw(st.integers(0, 255))
    try:
        found = codecs.expand(array(bytes(frame)), name, chunk.nbytes)
    except DamagedError:
        return
    assert found.nbytes == chunk.nbytes


@pytest.mark.parametrize("name", COMPRESSING)
@given(st.binary(max_size=200), st.integers(1, 1000))
def test_anything_but_a_frame_is_refused(name, content, nbytes):
    with pytest.raises(DamagedError, match=f"a {name} frame of {len(content)} bytes"):
        codecs.expand(array(content), name, nbytes)


def test_names_are_listed_when_one_is_wrong():
    for name in (None, "none", "lz4", "zstd"):
        codecs.check(name)
    with pytest.raises(SchemaError, match="compress is one of none, lz4, zstd, not 'gzip'"):
        codecs.check("gzip")
