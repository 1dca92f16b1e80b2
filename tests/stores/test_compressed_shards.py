"""Compressed shards: the same rows through an index, chunks expanded once and few at a time, damage told before it is data."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import drawn_shards, files_below, flip, put, random_values, same_bits, small_chunks, writer_at

from tensortape.stores import Run, codecs, layout, open_run
from tensortape.stores.commits import Record, ShardRecord
from tensortape.stores.compressed_shards import CompressedShard, RecentChunks
from tensortape.stores.errors import BudgetError, DamagedError, SchemaError
from tensortape.stores.geometry import Geometry
from tensortape.stores.schema import column_schema, stored_arrays
from tensortape.stores.shards import encode, read_index

COMPRESSING = ["lz4", "zstd"]


def compressed(geometry: Geometry, codec: str) -> Geometry:
    return Geometry(geometry.grid, geometry.shape, geometry.dtype, codec)


def shard_bytes(rows: np.ndarray, geometry: Geometry) -> tuple[bytes, np.ndarray]:
    encoded = encode(rows, geometry, 0)
    data = b"".join(bytes(buffer) for buffer in encoded.buffers)
    assert len(data) == encoded.nbytes
    return data, encoded.crcs


def opened(data: bytes, geometry: Geometry, count: int, crcs: np.ndarray, **options: Any) -> CompressedShard:
    return CompressedShard(data, geometry, count, crcs, options.pop("recent", RecentChunks()), **options)


# One shard.


@settings(deadline=None)
@given(drawn_shards, st.sampled_from(COMPRESSING), st.data())
def test_slices_and_gathers_are_those_of_numpy(drawn, codec, data):
    geometry, rows = drawn
    geometry = compressed(geometry, codec)
    recent = RecentChunks(data.draw(st.sampled_from([0, 100, 1 << 20])))
    content, crcs = shard_bytes(rows, geometry)
    shard = opened(content, geometry, len(rows), crcs, recent=recent)
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    chosen = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=20)))
    assert shard.damaged() == []
    assert shard.structure_is_right()
    assert same_bits(shard.slice(start, stop), rows[start:stop])
    assert same_bits(shard.gather(chosen), rows[chosen])


@settings(deadline=None)
@given(drawn_shards, st.sampled_from(COMPRESSING))
def test_frames_follow_one_another_each_with_its_checksum(drawn, codec):
    """The specification's layout: expanding every frame in place gives the bytes of the uncompressed shard."""
    geometry, rows = drawn
    content, crcs = shard_bytes(rows, compressed(geometry, codec))
    plain, plain_crcs = shard_bytes(rows, geometry)
    index = np.frombuffer(content[-geometry.index_bytes : -4], "<u8").reshape(-1, 2)
    present = geometry.chunks_for(len(rows))
    ends = [0, *index[:present].sum(1).tolist()]
    assert index[:present, 0].tolist() == ends[:-1]
    assert ends[-1] == len(content) - geometry.index_bytes
    assert (index[present:] == 2**64 - 1).all()
    body = b""
    for offset, size in index[:present].tolist():
        frame = content[offset : offset + size]
        assert google_crc32c.value(frame[:-4]) == int.from_bytes(frame[-4:], "little")
        chunk = codecs.CODECS[codec].coder.decode(frame[:-4])
        body += chunk + google_crc32c.value(chunk).to_bytes(4, "little")
    assert body == plain[: len(body)]
    assert len(body) == len(plain) - geometry.index_bytes
    assert crcs.tolist() == plain_crcs.tolist()  # of the rows, not of the frames


@settings(deadline=None, max_examples=100)
@given(drawn_shards, st.sampled_from(COMPRESSING), st.data())
def test_a_changed_byte_is_always_noticed(drawn, codec, data):
    """In a frame or its checksum: that chunk and no other. In the index: the shard cannot be opened."""
    geometry, rows = drawn
    geometry = compressed(geometry, codec)
    content, crcs = shard_bytes(rows, geometry)
    position = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[position] ^= data.draw(st.integers(1, 255))
    if position >= len(content) - geometry.index_bytes:
        with pytest.raises(DamagedError, match="index is damaged"):
            opened(bytes(changed), geometry, len(rows), crcs)
        return
    index = read_index(np.frombuffer(content, np.uint8), geometry)
    hit = int(np.searchsorted(index[:, 0], position, "right")) - 1
    shard = opened(bytes(changed), geometry, len(rows), crcs)
    assert shard.damaged() == [hit]
    assert shard.damaged([hit]) == [hit]
    assert not shard.structure_is_right()


@settings(deadline=None)
@given(drawn_shards, st.sampled_from(COMPRESSING), st.data())
def test_a_shard_cut_short_or_continued_cannot_be_opened(drawn, codec, data):
    geometry, rows = drawn
    geometry = compressed(geometry, codec)
    content, crcs = shard_bytes(rows, geometry)
    keep = data.draw(st.integers(0, len(content) - 1))
    for other in (content[:keep], content + content[keep:], b""):
        with pytest.raises(DamagedError, match="index is damaged, or that of another shard"):
            opened(other, geometry, len(rows), crcs)


GEOMETRY = Geometry(layout.Grid((8, 3), (32, 3)), (3,), np.dtype("<f4"), "zstd")
ROWS = np.random.default_rng(0).normal(size=(20, 3)).astype("<f4")


def with_index(content: bytes, change: Any) -> bytes:
    """The shard with another index, whose checksum is right."""
    index = np.frombuffer(content[-GEOMETRY.index_bytes : -4], "<u8").reshape(-1, 2).copy()
    change(index)
    body = index.tobytes()
    return content[: -GEOMETRY.index_bytes] + body + google_crc32c.value(body).to_bytes(4, "little")


def outside(index: np.ndarray) -> None:
    index[1] = 1 << 40, 100


def overlapping(index: np.ndarray) -> None:
    index[1] = index[0]


def swapped(index: np.ndarray) -> None:
    index[[0, 1]] = index[[1, 0]]


def wrapping(index: np.ndarray) -> None:
    """Sizes whose sum modulo 2^64 is that of the right ones."""
    with np.errstate(over="ignore"):
        index[0, 1] += np.uint64(1 << 63)
        index[1, 1] += np.uint64(1 << 63)
        index[1, 0] += np.uint64(1 << 63)


def empty(index: np.ndarray) -> None:
    index[1, 1] += index[0, 1]
    index[1, 0] = 0
    index[0, 1] = 0


def missing(index: np.ndarray) -> None:
    index[1] = 2**64 - 1


def half_absent(index: np.ndarray) -> None:
    index[3, 0] = 0


@pytest.mark.parametrize("change", [outside, overlapping, swapped, wrapping, empty, missing, half_absent], ids=lambda c: c.__name__)
def test_an_index_that_lies_is_refused_whatever_its_checksum(change):
    """Frames lie in the file, one after another: no index leads out of it, or to a frame twice."""
    content, crcs = shard_bytes(ROWS, GEOMETRY)
    assert opened(with_index(content, lambda index: None), GEOMETRY, 20, crcs).damaged() == []
    with pytest.raises(DamagedError, match="index is damaged"):
        opened(with_index(content, change), GEOMETRY, 20, crcs)


def test_a_frame_of_another_size_is_damage_however_right_its_checksums():
    """What a bomb looks like in a shard: the checksums of file and index are right, and the frame states a GiB."""
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"\x00"
    bomb = struct.pack("<IBBQ", 0xFD2FB528, 3 << 6, 0x70, 1 << 30) + block * 8191
    frame = bomb + google_crc32c.value(bomb).to_bytes(4, "little")
    index = np.full((4, 2), 2**64 - 1, "<u8")
    index[0] = 0, len(frame)
    body = index.tobytes()
    content = frame + body + google_crc32c.value(body).to_bytes(4, "little")
    for verify in (True, False):
        shard = opened(content, GEOMETRY, 5, np.zeros(1, "<u4"), verify=verify)
        tracemalloc.start()
        assert shard.damaged() == [0]
        with pytest.raises(DamagedError, match=f"states {1 << 30} bytes of content, where a chunk has 96"):
            shard.slice(0, 5)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_rows_are_those_of_the_commit_even_if_the_file_is_right():
    """A stale or swapped shard is sound in itself."""
    content, _ = shard_bytes(ROWS, GEOMETRY)
    _, crcs = shard_bytes(ROWS + 1, GEOMETRY)
    assert opened(content, GEOMETRY, 20, crcs).damaged() == [0, 1, 2]
    assert opened(content, GEOMETRY, 20, crcs, verify=False).damaged() == []


def test_checksums_of_a_record_hold_for_a_longer_tail():
    longer, _ = shard_bytes(ROWS, GEOMETRY)
    _, crcs = shard_bytes(ROWS[:11], GEOMETRY)
    shard = opened(longer, GEOMETRY, 11, crcs)
    assert shard.damaged() == []
    assert same_bits(shard.slice(0, 11), ROWS[:11])
    assert not shard.structure_is_right()  # not that of 11 rows: verify asks only sealed shards


def test_slices_within_a_chunk_are_views_that_cannot_be_written():
    content, crcs = shard_bytes(ROWS, GEOMETRY)
    shard = opened(content, GEOMETRY, 20, crcs)
    one, other = shard.slice(0, 4), shard.slice(2, 8)
    assert np.shares_memory(one, other)
    assert not one.flags.writeable
    assert shard.slice(7, 9).flags.owndata
    assert shard.gather(np.array([1, 1])).flags.writeable


# Chunks that are kept.


def test_few_chunks_are_kept_and_the_least_recently_used_go_first():
    recent = RecentChunks(most=10)
    for number in range(3):
        recent.put((0, number), np.zeros(4, np.uint8))
    assert recent.get((0, 0)) is None
    assert recent.get((0, 1)) is not None
    recent.put((1, 1), np.ones(4, np.uint8))
    assert [recent.get((0, number)) is None for number in range(3)] == [True, False, True]
    recent.put((1, 2), np.ones(100, np.uint8))  # larger than all there is room for: alone
    assert recent.get((1, 2)) is not None
    assert recent.get((0, 1)) is None
    recent.put((1, 2), np.ones(6, np.uint8))
    recent.put((1, 3), np.ones(4, np.uint8))
    assert recent.get((1, 2)) is not None


def write(path: Path, codec: str, rows: np.ndarray, *, commits: int = 1, close: bool = True) -> Any:
    writer = writer_at(path)
    writer.describe("token/h", compress=codec)
    with small_chunks():
        for number, piece in enumerate(np.array_split(rows, commits)):
            writer.append(ids=[f"x{number}"], columns={"token/h": [piece]})
            writer.commit()
    if close:
        writer.close()
    return writer


VALUES = random_values(np.random.default_rng(4), "bfloat16", (201, 5))


@pytest.fixture
def expansions(monkeypatch) -> list[int]:
    """The size of every chunk that is expanded."""
    found: list[int] = []
    expand = codecs.expand

    def counted(frame: np.ndarray, name: str, nbytes: int) -> np.ndarray:
        found.append(nbytes)
        return expand(frame, name, nbytes)

    monkeypatch.setattr(codecs, "expand", counted)
    return found


@pytest.mark.parametrize("codec", COMPRESSING)
def test_every_chunk_is_expanded_once_on_the_way_through(tmp_path, expansions, monkeypatch, codec):
    """However little is kept: reading in order, by example, or any rows at once expands no chunk twice."""
    monkeypatch.setattr("tensortape.stores.compressed_shards.RecentChunks.__init__.__defaults__", (1,))
    write(tmp_path / "run.zarr", codec, VALUES)
    order = np.random.default_rng(0).permutation(201)
    reads = {
        "everything": lambda column: column.rows(),
        "blocks": lambda column: np.concatenate(list(column.blocks(8))),
        "any order": lambda column: column.rows(order)[np.argsort(order)],
        "an example": lambda column: column[0],
    }
    for read in reads.values():
        run = open_run(tmp_path / "run.zarr")
        expansions.clear()
        assert same_bits(read(run["token/h"]), VALUES)
        assert expansions == [8 * 5 * 2] * 26  # 201 rows, 8 to a chunk


def test_memory_stays_bounded_whatever_is_read(tmp_path):
    """More is read than is kept; expanding takes no more beside the result than a chunk."""
    rows = np.zeros((1 << 15, 2048), np.float32)  # 256 MiB
    with writer_at(tmp_path / "run.zarr", compress="zstd") as writer:
        for start in range(0, len(rows), 1 << 13):
            writer.append(ids=[start], columns={"token/h": [rows[start : start + (1 << 13)]]})
    del rows
    run = open_run(tmp_path / "run.zarr")
    assert run["token/h"].stored_bytes < run["token/h"].nbytes / 100
    tracemalloc.start()
    for block in run["token/h"].blocks(1 << 10):
        assert not block.any()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (64 << 20) + 4 * (8 << 20)


# Runs.


@pytest.mark.parametrize("codec", COMPRESSING)
def test_a_run_reads_as_the_uncompressed_one(tmp_path, codec):
    """Slices, rows in any order, masks, text, several commits and sessions, and a session that compresses otherwise."""
    rng = np.random.default_rng(7)
    columns = {
        "token/h": [random_values(rng, "bfloat16", (length, 5)) for length in (13, 0, 101, 7)],
        "token/x": [rng.normal(size=length) for length in (13, 0, 101, 7)],
        "example/text": ["é", "", "zz", "a long text " * 20],
    }
    for name, chosen in (("plain", "none"), ("run", codec)):
        for session in range(2):
            with small_chunks(), writer_at(tmp_path / name, mode="resume") as writer:
                for column in columns:
                    writer.describe(column, compress=chosen if session == 0 else "none")
                for number in range(4):
                    some = {column: values[number : number + 1] for column, values in columns.items()}
                    writer.append(ids=[f"{session}-{number}"], columns=some)
                    writer.commit()
    plain, run = open_run(tmp_path / "plain"), open_run(tmp_path / "run")
    assert run["token/h"].compress == f"{codec}, none"
    assert run["example/text"].rows().tolist() == plain["example/text"].rows().tolist()
    picked = rng.integers(-242, 242, 99)
    for name in ("token/h", "token/x"):
        assert same_bits(run[name].rows(), plain[name].rows())
        assert same_bits(run[name].rows(picked), plain[name].rows(picked))
        assert same_bits(run[name].rows(slice(5, 150, 7)), plain[name].rows(slice(5, 150, 7)))
        assert same_bits(run[name][6], plain[name][6])
    assert run.verify().ok
    assert run.nbytes == plain.nbytes


@pytest.mark.parametrize("codec", COMPRESSING)
def test_a_snapshot_of_an_open_tail_stays_readable_while_it_grows(tmp_path, codec):
    """The file may even become smaller: fill that does not compress with the rows gives way to rows that do."""
    path = tmp_path / "run.zarr"
    writer = writer_at(path)
    writer.describe("token/h", compress=codec)
    noise = np.random.default_rng(0).integers(0, 255, (5, 64)).astype(np.uint8)
    with small_chunks(chunk_bytes=4096, shard_bytes=1 << 16):
        writer.append(ids=[0], columns={"token/h": [noise]})
        writer.commit()
        early = open_run(path)
        size = (path / early["token/h"].paths[0] / "c.0.0").stat().st_size
        assert early["token/h"].stored_bytes == size
        writer.append(ids=[1], columns={"token/h": [np.repeat(noise[:1], 40, 0)]})
        writer.commit()
    assert same_bits(early["token/h"].rows(), noise)
    assert early.verify().ok
    late = open_run(path)
    writer.close()
    assert same_bits(late["token/h"][1], np.repeat(noise[:1], 40, 0))
    assert same_bits(open_run(path)["token/h"].rows(), late["token/h"].rows())


def damaged_run(tmp_path: Path, codec: str) -> tuple[Run, list[Path]]:
    path = tmp_path / "run.zarr"
    write(path, codec, VALUES, commits=3)
    run = open_run(path)
    return run, sorted((path / run["token/h"].paths[0]).glob("c.*"))


@pytest.mark.parametrize("codec", COMPRESSING)
def test_any_flipped_bit_of_a_shard_is_reported_and_never_read(tmp_path, codec):
    run, shards = damaged_run(tmp_path, codec)
    assert len(shards) > 2
    for position in range(0, shards[1].stat().st_size, 5):
        before = flip(shards[1], position, 1 << position % 8)
        report = run.verify()
        assert [damage.path for damage in report.damaged] == [f"{run['token/h'].paths[0]}/{shards[1].name}"]
        assert report.damaged[0].first in ("x0", "x1")
        with pytest.raises(DamagedError, match=r"c\.1\.0: .*\(examples "):
            open_run(run.path)["token/h"].rows()
        put(shards[1], before)
    assert run.verify().ok


@pytest.mark.parametrize("codec", COMPRESSING)
def test_truncated_empty_swapped_and_missing_shards_are_reported(tmp_path, codec):
    run, shards = damaged_run(tmp_path, codec)
    content = [shard.read_bytes() for shard in shards]
    others = {"truncated": content[0][:-1], "empty": b"", "longer": content[0] + b"\0", "swapped": content[1]}
    for other in others.values():
        put(shards[0], other)
        assert {Path(damage.path).name for damage in run.verify().damaged} == {shards[0].name}
        with pytest.raises(DamagedError, match=r"c\.0\.0: .*\(examples 'x0' to 'x0'\)"):
            open_run(run.path)["token/h"].rows([0])
        assert same_bits(open_run(run.path)["token/h"].rows([150]), VALUES[[150]])
    shards[0].unlink()
    assert [damage.reason for damage in run.verify().damaged] == ["the shard is missing"]


@pytest.mark.parametrize("codec", COMPRESSING)
def test_unverified_reading_still_names_a_frame_that_cannot_be_expanded(tmp_path, codec):
    run, shards = damaged_run(tmp_path, codec)
    flip(shards[0], 4)  # what the frame states of itself
    trusting = open_run(run.path, verify="off")
    with pytest.raises(DamagedError, match=r"c\.0\.0: chunk 0 .*\(examples 'x0' to 'x0'\)"):
        trusting["token/h"].rows()
    assert same_bits(trusting["token/h"].rows([200]), VALUES[[200]])


# What a writer says, and what is recorded.


def test_the_record_of_a_plain_shard_is_as_it_was():
    """Two members; a third, the size of the file, only where it does not follow from the rows."""
    crcs = np.array([1, 0xABCDEF], "<u4")
    assert ShardRecord(7, crcs).to_json() == [7, "01000000efcdab00"]
    assert ShardRecord(7, crcs, 99).to_json() == [7, "01000000efcdab00", 99]
    for record in (ShardRecord(7, crcs), ShardRecord(7, crcs, 99)):
        found = ShardRecord.from_json(json.loads(json.dumps(record.to_json())))
        assert (found.rows, found.crcs.tolist(), found.nbytes) == (record.rows, record.crcs.tolist(), record.nbytes)
    assert "quantization" not in json.loads(Record("uid", "p000000", 1, "").encode())["record"]


@pytest.mark.parametrize("codec", COMPRESSING)
def test_the_size_in_a_record_is_that_of_the_file(tmp_path, codec):
    run, shards = damaged_run(tmp_path, codec)
    recorded = run.parts[0].arrays["token/h"].shards
    assert [recorded[number].nbytes for number in sorted(recorded)] == [shard.stat().st_size for shard in shards]
    assert run["token/h"].stored_bytes == sum(shard.stat().st_size for shard in shards)
    assert run["token/h"].nbytes == VALUES.nbytes
    every = sum(len(content) for name, content in files_below(run.path).items() if Path(name).name.startswith("c."))
    assert run.stored_bytes == every


def test_a_writers_codec_is_for_wide_rows_unless_a_column_has_its_own(tmp_path):
    """Rows of 64 bytes and more; labels and keys are read in passing, a few bytes at a time."""
    with writer_at(tmp_path / "run.zarr", compress="lz4") as writer:
        writer.describe("token/other", compress="zstd")
        writer.describe("token/not", compress="none")
        writer.describe("token/narrow", compress="zstd")
        shapes = {"wide": 32, "other": 32, "not": 32, "narrow": 31, "small": 31}
        columns = {f"token/{name}": [np.ones((4, width), np.float16)] for name, width in shapes.items()}
        writer.append(ids=["a"], columns={**columns, "example/text": ["x" * 100]})
    run = open_run(tmp_path / "run.zarr")
    found = {name: column.compress for table in run.tables.values() for name, column in table.items()}
    chosen = {"wide": "lz4", "other": "zstd", "narrow": "zstd"}
    assert found == {**dict.fromkeys(found, "none"), **chosen}
    assert run.verify().ok


def test_wrong_names_are_refused_with_the_choices(tmp_path):
    with pytest.raises(SchemaError, match="compress is one of none, lz4, zstd, not 'gzip'"):
        writer_at(tmp_path / "run.zarr", compress="gzip")
    writer = writer_at(tmp_path / "run.zarr")
    with pytest.raises(SchemaError, match="compress is one of none, lz4, zstd, not 'LZ4'"):
        writer.describe("token/h", compress="LZ4")


def test_a_chunk_too_large_to_be_expanded_at_once_is_refused(monkeypatch):
    monkeypatch.setattr(codecs, "LARGEST_CHUNK", (1 << 19) - 1)
    with pytest.raises(SchemaError, match=f"chunks of {1 << 19} bytes, but at most {(1 << 19) - 1} can be compressed"):
        column_schema("token/h", "float32", (256,), shard_bytes=0, codec="lz4")
    column_schema("token/h", "float32", (256,), shard_bytes=0)
    monkeypatch.setattr(codecs, "LARGEST_CHUNK", 1 << 19)
    column_schema("token/h", "float32", (256,), shard_bytes=0, codec="lz4")


def test_frames_count_in_the_memory_budget(tmp_path):
    """While a shard is written its frames take memory beside its rows."""
    assert stored_arrays("float16", (32,), codec="lz4") == 2 * stored_arrays("float16", (32,))
    least = []
    for codec in ("none", "lz4"):
        writer = writer_at(tmp_path / codec, memory_budget=1000)
        writer.describe("token/h", compress=codec)
        with pytest.raises(BudgetError) as error:
            writer.append(ids=[0], columns={"token/h": [np.zeros((1, 1 << 17), np.float32)]})
        least.append(int(str(error.value).split("at least ")[1].split()[0]))
    assert least[1] - least[0] == 2 * (1 << 19)
