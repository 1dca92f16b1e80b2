"""Runs on object storage: nothing acknowledged is lost, nothing torn is seen when requests fail; reading fetches what it needs."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import zarr
from obstore.store import S3Store
from s3_server import BUCKET, KEY, SECRET, TOKEN, everything, options
from strategies import bits, files_below, opened, same_bits, small_chunks, writer_at

from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores.errors import (
    BrokenWriterError,
    DamagedError,
    LostPartError,
    NotARunError,
    RunExistsError,
    StoreError,
    UnsafePlaceError,
)
from tensortape.stores.leftovers import remove_leftovers
from tensortape.stores.verify import verify_run

LENGTHS = [5, 0, 13, 1, 30, 7, 21]
IDS = [f"x{number}" for number in range(len(LENGTHS))]


def columns(start: int, stop: int) -> dict[str, Any]:
    """Columns of some of the examples, the same whenever they are asked for."""
    lengths = LENGTHS[start:stop]
    draws = [np.random.default_rng(number) for number in range(start, stop)]
    return {
        "token/h": [rng.normal(size=(length, 3)).astype(np.float16) for rng, length in zip(draws, lengths, strict=True)],
        "example/topic": [f"topic {number}" for number in range(start, stop)],
    }


def write(writer: RunWriter, start: int = 0, stop: int = len(LENGTHS), each: int = 4) -> None:
    """Append and commit examples, some at a time."""
    with small_chunks(shard_bytes=256):
        for first in range(start, stop, each):
            last = min(first + each, stop)
            writer.append(ids=IDS[first:last], columns=columns(first, last))
            writer.commit()


def assert_holds(run: Run, count: int) -> None:
    """The run has the first examples, with the values they were given."""
    assert run.ids == IDS[:count]
    expected = columns(0, count)
    assert all(same_bits(run["token/h"][number], expected["token/h"][number]) for number in range(count))
    assert run["example/topic"].rows().tolist() == expected["example/topic"]


def writer_to(url: str, given: dict[str, Any], mode: str = "create", **more: Any) -> RunWriter:
    opened.append(RunWriter(url, mode=mode, storage_options=given, **more))
    return opened[-1]


def key(url: str, path: str) -> str:
    return f"{url.removeprefix(f's3://{BUCKET}/')}/{path}"


def objects(bucket: Any, url: str) -> dict[str, bytes]:
    """Every object of a run, by its path in the run."""
    prefix = key(url, "")
    return {found.key.removeprefix(prefix): found.get()["Body"].read() for found in bucket.objects.filter(Prefix=prefix)}


@pytest.fixture
def url(tmp_path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}/run.zarr"


@pytest.fixture
def direct(s3) -> dict[str, Any]:
    """Options for the server itself."""
    return options(s3)


@pytest.fixture
def failing(traffic) -> dict[str, Any]:
    """Options for the server behind the proxy."""
    return options(traffic.port)


@pytest.fixture(scope="module")
def bucket(s3) -> Any:
    """The bucket as Amazon's own library sees it."""
    session = boto3.Session(KEY, SECRET, region_name="us-east-1")
    return session.resource("s3", endpoint_url=f"http://127.0.0.1:{s3}").Bucket(BUCKET)


@pytest.fixture(scope="module")
def whole(s3) -> str:
    """A closed run with all examples. Who damages it repairs it."""
    url = f"s3://{BUCKET}/whole.zarr"
    with RunWriter(url, storage_options=options(s3)) as writer:
        writer.add_asset("tokenizer.json", b"{}")
        write(writer)
    return url


# What is written.


def test_a_run_is_the_same_objects_as_in_a_folder(whole, bucket, tmp_path):
    """Names and shards are equal byte by byte; documents differ in the run's identity alone. So a run can be copied either way."""
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.add_asset("tokenizer.json", b"{}")
        write(writer)
    there, here = objects(bucket, whole), files_below(tmp_path / "run.zarr")
    assert there.keys() - {".create.partial"} == here.keys()
    shards = [path for path in here if "/c." in path]
    assert len(shards) > 10
    assert [path for path in shards if there[path] != here[path]] == []


def test_a_copied_run_is_a_run(whole, bucket, tmp_path):
    for path, content in objects(bucket, whole).items():
        (tmp_path / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / path).write_bytes(content)
    assert open_run(tmp_path / "copy").verify().ok
    assert_holds(open_run(tmp_path / "copy"), len(LENGTHS))


def test_zarr_reads_the_arrays_where_they_are(whole, direct):
    """zarr-python with a store of its own."""
    store = zarr.storage.ObjectStore(S3Store(BUCKET, prefix="whole.zarr", **direct), read_only=True)
    column = open_run(whole, storage_options=direct)["token/h"]
    found = zarr.open_array(store, path=column.paths[0], mode="r")[:]
    assert same_bits(bits(found), bits(np.concatenate(columns(0, len(LENGTHS))["token/h"])))


def test_a_run_is_written_resumed_and_read(url, direct):
    with writer_to(url, direct) as writer:
        assert writer.path == url
        write(writer, stop=3)
    with writer_to(url, direct, "resume") as writer:
        assert [id_ in writer.committed_ids for id_ in IDS[:4]] == [True, True, True, False]
        write(writer, start=3)
    run = open_run(url, storage_options=direct)
    assert (run.path, [part.name for part in run.parts]) == (url, ["p000000", "p000001"])
    assert_holds(run, len(LENGTHS))
    assert repr(run).startswith(f"<Run {url}: 7 examples")


def test_a_run_is_read_while_it_is_written(url, direct):
    writer = writer_to(url, direct)
    write(writer, stop=3)
    before = open_run(url, storage_options=direct)
    write(writer, start=3, stop=5)
    assert_holds(before, 3)
    assert_holds(open_run(url, storage_options=direct), 5)


def test_columns_are_added(url, direct):
    with writer_to(url, direct) as writer:
        write(writer, stop=3)
    run = open_run(url, storage_options=direct)
    run.add_column("token/n", [np.arange(length) for length in LENGTHS[:3]])
    found = open_run(url, storage_options=direct)
    assert found["token/n"][2].tolist() == run["token/n"][2].tolist() == list(range(LENGTHS[2]))
    assert found.verify().ok


def test_the_environment_says_where_and_who(url, s3_environment):
    with RunWriter(url) as writer:
        write(writer, stop=2)
    assert_holds(open_run(url), 2)
    assert verify_run(url).ok


@pytest.mark.parametrize("mode", ["create", "overwrite"])
def test_what_is_there_is_neither_created_anew_nor_overwritten(whole, direct, bucket, mode):
    before = objects(bucket, whole)
    with pytest.raises(RunExistsError, match=r"another path, mode='resume' to continue it, or delete what is below it"):
        writer_to(whole, direct, mode)
    assert objects(bucket, whole) == before


def test_overwriting_nothing_starts_a_run(url, direct):
    with writer_to(url, direct, "overwrite") as writer:
        write(writer, stop=1)
    assert_holds(open_run(url, storage_options=direct), 1)


@pytest.mark.parametrize("name", [None, "notes.txt", "zarr.json"])
def test_what_is_no_run_is_not_opened(url, direct, bucket, name):
    if name is not None:
        bucket.put_object(Key=key(url, name), Body=b"{}")
    with pytest.raises(NotARunError, match=f"{url} is"):
        open_run(url, storage_options=direct)


# Several writers.


def test_two_writers_of_a_run_get_parts_of_their_own(url, direct):
    with writer_to(url, direct, session="together") as first:
        write(first, stop=2)
        with writer_to(url, direct, "resume", session="together") as second:
            write(second, start=2, stop=4)
            write(first, start=4, stop=6)
    run = open_run(url, storage_options=direct)
    assert sorted(run.ids) == sorted(IDS[:6])
    assert [part.examples for part in run.parts] == [4, 2]


def test_a_commit_that_somebody_else_has_made_is_lost(url, direct, bucket):
    """The number is taken: this writer fails, and what is there stays."""
    writer = writer_to(url, direct)
    write(writer, stop=3)
    record = bucket.Object(key(url, "parts/p000000/commits/000000000002.json"))
    record.put(Body=b"sealed by somebody else")
    with pytest.raises(LostPartError, match="p000000 was sealed or continued by somebody else"):
        write(writer, start=3, stop=6)
    assert record.get()["Body"].read() == b"sealed by somebody else"


def test_a_service_without_conditions_is_refused_with_the_way_out(url, failing, traffic, bucket):
    traffic.drops.add("if-none-match")
    with pytest.raises(UnsafePlaceError, match="'exclusive': True"):
        write(writer_to(url, failing))
    assert "zarr.json" not in objects(bucket, url)
    with writer_to(url, {**failing, "exclusive": True}) as writer:
        write(writer, stop=4, each=2)
    assert_holds(open_run(url, storage_options=failing), 4)


# Requests that fail.


@pytest.mark.parametrize("period", [3, 5])
def test_a_run_is_written_and_read_although_requests_keep_failing(url, failing, traffic, period, monkeypatch):
    """Every few requests one fails, in one way after another."""
    kinds, numbers = cycle(["500", "503", "lost", "500", "lost"]), cycle(range(period))
    monkeypatch.setattr(traffic, "take", lambda *_: next(kinds) if next(numbers) == 0 else None)
    with writer_to(url, failing) as writer:
        write(writer)
    assert_holds(open_run(url, storage_options=failing), len(LENGTHS))
    assert verify_run(url, storage_options=failing).ok


@pytest.mark.parametrize("kind", ["500", "lost"])
@pytest.mark.parametrize("match", ["token/h/c.", "token/h/zarr.json", "commits/"])
def test_after_a_failure_what_was_acknowledged_reads_back_and_the_run_is_resumed(url, direct, failing, traffic, kind, match):
    """Whichever write fails for good: a shard, a document, the record. With a lost answer the commit stands."""
    writer = writer_to(url, failing)
    write(writer, stop=3)
    traffic.fail(kind, "PUT", match, times=10_000)
    if (kind, match) == ("lost", "commits/"):
        write(writer, start=3, stop=5)  # read back, and found to be there
    else:
        with pytest.raises(ConnectionError, match=match.rstrip("/")):
            write(writer, start=3, stop=5)
        with pytest.raises(BrokenWriterError):
            write(writer, start=3, stop=5)
    traffic.clear()
    acknowledged = len(writer.committed_ids)
    run = open_run(url, storage_options=direct)
    assert_holds(run, acknowledged)
    assert run.verify().ok
    with writer_to(url, direct, "resume") as again:
        write(again, start=acknowledged, stop=6)
    assert_holds(open_run(url, storage_options=direct), 6)


def test_a_reader_never_sees_a_part_of_a_commit(url, direct, traffic, failing):
    """Of one commit after another a few more requests go through, and then none."""
    seen = []
    for number in range(1, 40, 4):
        writer = writer_to(f"{url}/{number}", failing)
        writer.append(ids=["a"], columns={"example/y": [1.5]})
        writer.commit()
        writer.append(ids=["b", "c"], columns={"example/y": [2.5, 3.5]})
        traffic.fail("", "PUT", times=number)
        traffic.fail("403", "PUT", times=10_000)
        with suppress(PermissionError, OSError):
            writer.commit()
        traffic.clear()
        run = open_run(f"{url}/{number}", storage_options=direct)
        seen.append((run.ids, run["example/y"].rows().tolist(), len(writer.committed_ids)))
        if len(run.ids) > 1:
            break
    assert seen == [*[(["a"], [1.5], 1)] * (len(seen) - 1), (["a", "b", "c"], [1.5, 2.5, 3.5], 3)]
    assert len(seen) > 3


# Reading.

WIDE = (16_384, 1024)  # 64 MiB of float32, in chunks of 128 rows
CHUNK = 128 * (1024 * 4) + 4
KEYS = 250_000  # bytes of the keys and bounds of the examples, in chunks of 4,096


@pytest.fixture(scope="module")
def wide(s3) -> tuple[str, np.ndarray]:
    """A run of one wide column, in examples of 149 rows."""
    url, values = f"s3://{BUCKET}/wide.zarr", np.random.default_rng(1).random(WIDE, np.float32)
    lengths = [149] * (WIDE[0] // 149) + [WIDE[0] % 149]
    with RunWriter(url, storage_options=options(s3)) as writer:
        writer.append(ids=list(range(len(lengths))), columns={"token/h": values}, lengths={"token": lengths})
    return url, values


@pytest.mark.parametrize("verify", ["touch", "off"])
def test_reading_an_example_fetches_the_chunks_it_lies_in(wide, failing, traffic, verify):
    url, values = wide
    column = open_run(url, storage_options=failing, verify=verify)["token/h"]
    assert same_bits(column[50], values[50 * 149 : 51 * 149])
    assert traffic.sent["GET"] <= 2 * CHUNK + KEYS
    before = traffic.sent["GET"]
    assert same_bits(column[50], values[50 * 149 : 51 * 149])
    assert traffic.sent["GET"] == before, "what is here is not fetched again"
    assert same_bits(column[51], values[51 * 149 : 52 * 149])
    assert traffic.sent["GET"] - before <= 2 * CHUNK


def test_opening_lists_and_asks_no_more_than_needed(wide, failing, traffic):
    """Once for the parts, and for each part once for what it holds; a closed one's last record is known without a list."""
    open_run(wide[0], storage_options=failing)
    assert traffic.count("LIST") == 1 + 1
    assert traffic.count("GET", "zarr.json") == 2
    assert traffic.count("HEAD") == 0
    assert len(set(traffic.requests)) == len(traffic.requests)


def test_random_rows_fetch_only_their_chunks(wide, failing, traffic):
    url, values = wide
    rows = np.array([16_383, 5, 9_000, 5, 700])
    assert same_bits(open_run(url, storage_options=failing)["token/h"].rows(rows), values[rows])
    assert traffic.sent["GET"] <= 4 * CHUNK + KEYS


@pytest.fixture(scope="module")
def four_shards(s3) -> tuple[str, np.ndarray, int]:
    """A run of one column in four shards over 1 MiB, and the bytes of one."""
    url, values = f"s3://{BUCKET}/shards.zarr", np.random.default_rng(2).random((20 * 1024, 64), np.float32)
    with small_chunks(1024, 1 << 18, 5 << 18), RunWriter(url, storage_options=options(s3)) as writer:
        writer.append(ids=["a"], columns={"token/h": [values]})
    return url, values, len(values) * 256 // 4


@pytest.mark.parametrize(("room", "again"), [(2.5, 1), (100, 0)])
def test_what_was_fetched_is_kept_as_far_as_there_is_room(four_shards, failing, traffic, room, again):
    """Going through all shards once more fetches all of them anew if two are kept, and nothing if all are."""
    url, values, shard = four_shards
    column = open_run(url, storage_options=failing, cache_bytes=int(room * shard))["token/h"]
    assert same_bits(column.rows(), values)
    before = traffic.sent["GET"]
    for start in range(0, len(values), 1000):
        assert same_bits(column.rows(slice(start, start + 1000)), values[start : start + 1000])
    assert again * values.nbytes <= traffic.sent["GET"] - before <= again * 1.1 * values.nbytes


@pytest.mark.parametrize("kind", ["500", "reset", "lost"])
def test_ranges_that_fail_are_fetched_again(wide, failing, traffic, kind):
    url, values = wide
    column = open_run(url, storage_options=failing)["token/h"]
    traffic.fail(kind, "GET", "/c.0.0", times=2)
    assert same_bits(column[7], values[7 * 149 : 8 * 149])


def test_a_reading_that_failed_can_be_tried_again(wide, failing, traffic):
    url, values = wide
    column = open_run(url, storage_options=failing)["token/h"]
    traffic.fail("503", "GET", "/c.0.0", times=5)
    with pytest.raises(ConnectionError, match=r"token/h/c.0.0: the service answered 503 SlowDown"):
        column[7]
    assert same_bits(column[7], values[7 * 149 : 8 * 149])


def test_leftovers_are_removed(url, direct, bucket):
    with writer_to(url, direct) as writer:
        write(writer, stop=2)
    before = objects(bucket, url)
    bucket.put_object(Key=key(url, "parts/p000000/token/h/c.99.0"), Body=b"of a writer that was killed")
    assert remove_leftovers(url, storage_options=direct) == ["parts/p000000/token/h/c.99.0"]
    assert objects(bucket, url) == before


@pytest.mark.parametrize("compress", ["lz4", "zstd"])
def test_compressed_columns_are_fetched_by_ranges_too(s3, failing, traffic, compress):
    """A frame, and the index of its shard."""
    url, rng = f"s3://{BUCKET}/{compress}.zarr", np.random.default_rng(5)
    values = rng.integers(0, 4, (40 * 1024, 64)).astype(np.float32)
    with small_chunks(1024, 1 << 18, 40 << 18), RunWriter(url, storage_options=options(s3)) as writer:
        writer.describe("token/h", compress=compress)
        writer.append(ids=["a"], columns={"token/h": [values]})
    column = open_run(url, storage_options=failing)["token/h"]
    column.rows([0])
    before = traffic.sent["GET"]
    assert same_bits(column.rows([30_000, 30_001]), values[30_000:30_002])
    assert 0 < traffic.sent["GET"] - before < 1 << 17
    assert same_bits(column.rows(), values)
    assert verify_run(url, storage_options=failing).ok


def test_a_forked_process_is_told_that_it_cannot_read(whole, s3_environment):
    """Its requests would never end; what it has of its parent it may use."""
    code = """
import os, sys
from tensortape.stores import open_run
from tensortape.stores.errors import ForkedError
run = open_run(sys.argv[1])
first = run["token/h"][0]
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert (run["token/h"][0] == first).all()
for ask in (lambda: run["example/topic"][0], lambda: open_run(sys.argv[1])):
    try:
        ask()
    except ForkedError as error:
        assert "spawn" in str(error)
    else:
        os._exit(2)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, whole], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


# Damage.

DAMAGE = ["deleted", "flipped", "cut", "empty"]


@contextmanager
def damaged(bucket: Any, url: str, path: str, kind: str) -> Iterator[None]:
    """An object that is not what it was, for a while."""
    found = bucket.Object(key(url, path))
    content = found.get()["Body"].read()
    if kind == "deleted":
        found.delete()
    else:
        found.put(Body={"flipped": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1], "empty": b""}[kind])
    yield
    found.put(Body=content)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("path", ["token/h/c.0.0", "token/h/zarr.json", "zarr.json", "commits/000000000002.json", "end.json"])
def test_damage_is_reported_by_name(whole, direct, bucket, path, kind):
    with damaged(bucket, whole, f"parts/p000000/{path}", kind):
        report = verify_run(whole, storage_options=direct)
    if (path, kind) == ("end.json", "deleted"):  # as if the writer had been killed before it wrote it
        assert report.ok
    else:
        assert [found for found in report.damaged if path in str(found)], report


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_values_are_never_returned(whole, direct, bucket, kind):
    """Of a shard that is fetched at once."""
    with (
        damaged(bucket, whole, "parts/p000000/token/h/c.0.0", kind),
        pytest.raises(DamagedError, match=r"token/h/c.0.0: .*\(examples 'x0' to '"),
    ):
        open_run(whole, storage_options=direct)["token/h"].rows()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_ranges_are_never_returned(four_shards, direct, bucket, kind):
    url, values, _ = four_shards
    before = open_run(url, storage_options=direct)["token/h"]
    before.rows([0])
    with damaged(bucket, url, "parts/p000000/token/h/c.0.0", kind):
        with pytest.raises(DamagedError, match=r"token/h/c.0.0: .*\(examples 'a' to 'a'\)"):
            open_run(url, storage_options=direct)["token/h"].rows([0])
        assert same_bits(before.rows([0]), values[:1]), "what was fetched before is what was committed"


def test_an_outage_is_not_damage(whole, failing, traffic):
    for request, match in (("GET", "h/c.0.0"), ("GET", "h/zarr.json"), ("GET", "commits/"), ("LIST", "")):
        traffic.fail("503", request, match, times=10_000)
        with pytest.raises(ConnectionError, match="503 SlowDown"):
            verify_run(whole, storage_options=failing)
        traffic.clear()
    assert verify_run(whole, storage_options=failing).ok


# Secrets.


def test_no_secret_is_stored_logged_or_shown(url, traffic, bucket, caplog):
    """P14. Key, token, and an endpoint with a password, while everything works and while nothing does."""
    caplog.set_level(logging.DEBUG)
    given = options(traffic.port, endpoint=f"http://canary-user:canary-password@127.0.0.1:{traffic.port}")
    shown = []
    with writer_to(url, given) as writer:
        write(writer, stop=3)
        shown.append(repr(writer))
    run = open_run(url, storage_options=given)
    shown += [repr(run), repr(run["token/h"]), repr(run.verify()), str(run.path), repr(run._place), repr(vars(run))]
    for request in ("PUT", "GET", "HEAD", "LIST"):
        traffic.fail("403", request, times=10_000)
    for ask in (
        lambda: open_run(url, storage_options=given),
        lambda: writer_to(url, given, "resume"),
        lambda: writer_to(f"{url}/other", given),
        lambda: run.add_column("example/z", [0] * 3),
        lambda: run.asset("a"),
    ):
        with pytest.raises((OSError, StoreError)) as raised:
            ask()
        shown.append(everything(raised.value))
    traffic.clear()
    shown.append(caplog.text)
    stored = [path.encode() + content for path, content in objects(bucket, url).items()]
    text = "\n".join([*shown, *(content.decode("latin1") for content in stored)])
    assert len(stored) > 20
    assert [secret for secret in (KEY, SECRET, TOKEN, "canary-user", "canary-password") if secret in text] == []


def test_paths_stay_paths(tmp_path: Path) -> None:
    with writer_at(tmp_path / "run.zarr") as writer:
        write(writer)
    assert writer.path == open_run(tmp_path / "run.zarr").path == tmp_path / "run.zarr"
