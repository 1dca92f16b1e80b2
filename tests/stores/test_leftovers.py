"""gc: what killed writers left behind goes; what counts, what is not ours, and what may have a writer stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from strategies import files_below, put, random_values, same_bits, small_chunks, writer_at

from tensortape.stores import chain, open_run
from tensortape.stores.errors import LostPartError
from tensortape.stores.leftovers import remove_leftovers
from tensortape.stores.verify import verify_run

PARTIAL = "0123456789abcdef0123456789abcdef.partial"
OURS = (f".zarr.json.{PARTIAL}", f"parts/.zarr.json.{PARTIAL}", f"parts/p000000/.end.json.{PARTIAL}")
OURS += (f"parts/p000000/token/h/.c.1.0.{PARTIAL}", f"parts/p000000/commits/.000000000009.json.{PARTIAL}")
OURS += (f"parts/p000000/example/id/utf8/.c.0.{PARTIAL}", f"assets/.tokenizer.json.{PARTIAL}")
FOREIGN = ("notes.txt", ".hidden", "download.partial", ".x.partial", "parts/README", "parts/p000000/token/h/c.notes.txt")
FOREIGN += (
    "parts/p000000/token/h/c.1.0.bak",
    "parts/p000000/token/mine/c.0",
    "parts/p000000/commits/notes.json",
    "parts/other/c.0",
)


def values(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {"token/h": [random_values(rng, "bfloat16", (5 + number % 7, 3))], "example/name": [f"name {number}"]}


def write(path: Path, numbers: range, mode: str = "create") -> Any:
    """Examples of which those from the ninth on are not committed; some of their shards are full."""
    writer = writer_at(path, mode)
    with small_chunks(shard_bytes=256):
        for number in numbers:
            if number == 9:
                writer.commit()
            writer.append(ids=[str(number)], columns=values(number))
    return writer


def assert_holds(path: Path, count: int) -> None:
    run = open_run(path)
    assert run.ids == [str(number) for number in range(count)]
    for number in range(count):
        assert same_bits(run["token/h"][number], values(number)["token/h"][0])
        assert run["example/name"][number] == f"name {number}"
    assert verify_run(path).ok


def plant(path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (path / name).parent.mkdir(exist_ok=True, parents=True)
        (path / name).write_bytes(b"something")


@pytest.fixture
def path(tmp_path) -> Path:
    """A part that was sealed, with shards beyond its last commit."""
    path = tmp_path / "run.zarr"
    write(path, range(18))
    writer_at(path, "resume").close()
    return path


def test_what_is_ours_goes_and_what_is_not_stays(path):
    plant(path, OURS + FOREIGN)
    before = files_below(path)
    removed = remove_leftovers(path)
    assert set(OURS) < set(removed)
    shards = set(removed) - set(OURS)
    assert shards
    assert all("/c." in name for name in shards)
    after = files_below(path)
    assert before.keys() - after.keys() == set(removed)
    assert all(after[name] == before[name] for name in after if not name.endswith("zarr.json"))
    assert_holds(path, 9)
    assert remove_leftovers(path) == []


def test_nothing_of_a_part_that_is_open_goes(tmp_path):
    path = tmp_path / "run.zarr"
    writer = write(path, range(18))
    plant(path, OURS + FOREIGN)
    before = files_below(path)
    assert remove_leftovers(path) == []
    assert files_below(path) == before
    writer.close()
    assert_holds(path, 18)


def test_a_closed_part_is_cleaned_while_another_is_open(path):
    writer = writer_at(path, "resume")
    with small_chunks(shard_bytes=256):
        for number in range(9, 14):
            writer.append(ids=[str(number)], columns=values(number))
    plant(path, OURS)
    removed = remove_leftovers(path)
    assert removed
    assert all(name.startswith("parts/p000000/") for name in removed)
    writer.close()
    assert_holds(path, 14)


def test_a_sound_closed_run_has_no_leftovers(tmp_path):
    path = tmp_path / "run.zarr"
    write(path, range(18)).close()
    before = files_below(path)
    assert remove_leftovers(path) == []
    assert files_below(path) == before


def test_shards_of_a_part_without_a_record(tmp_path):
    path = tmp_path / "run.zarr"
    with small_chunks(shard_bytes=256):
        writer = writer_at(path)
        for number in range(18):
            writer.append(ids=[str(number)], columns=values(number))
    assert remove_leftovers(path) == []
    writer_at(path, "resume").close()
    assert len(remove_leftovers(path)) > 1
    assert not [name for name in files_below(path) if "/c." in name]
    assert open_run(path).ids == []
    assert verify_run(path).ok


def test_readers_of_plain_zarr_never_see_an_example_listed_whose_rows_were_removed(tmp_path):
    """A writer killed just before its record has stated shapes of rows that never counted."""
    path = tmp_path / "run.zarr"
    writer = write(path, range(18))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "add_record", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.commit()
    writer_at(path, "resume").close()
    part = zarr.open_group(path / "parts/p000000", mode="r")
    assert part["example/id/end"].shape == (18,)
    assert remove_leftovers(path)
    part = zarr.open_group(path / "parts/p000000", mode="r")
    assert {part[name].shape[0] for name in ("example/id/end", "example/step", "example/start.token")} == {9}
    rows = np.concatenate([values(number)["token/h"][0] for number in range(9)])
    assert same_bits(part["token/h"][:], rows.view(np.uint16))
    assert_holds(path, 9)


def test_a_zombie_that_comes_back_after_a_cleaning(tmp_path):
    path = tmp_path / "run.zarr"
    zombie = write(path, range(18))
    writer_at(path, "resume").close()
    remove_leftovers(path)
    with pytest.raises(LostPartError):
        zombie.commit()
    assert_holds(path, 9)


def test_quarantined_objects_stay(path):
    put(path / "notes", b"")
    plant(path, ("quarantine/12345678/parts/p000000/token/h/c.7.0",))
    assert not [name for name in remove_leftovers(path) if name.startswith("quarantine")]
