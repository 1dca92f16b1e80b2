"""open_run: a snapshot of what is committed, and every way to ask it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import flip, random_values, same_bits, small_chunks, writer_at

from tensortape.stores import Run, RunWriter, open_run, shard_cache
from tensortape.stores.errors import DamagedError, UnknownColumnError
from tensortape.stores.patterns import Alias


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.zarr"


# A snapshot.


def examples(count: int, start: int = 0) -> dict[int, np.ndarray]:
    """Ids and values: 8-row chunks and 32-row shards are filled, left and filled up again at various places."""
    rng = np.random.default_rng(start)
    return {id_: random_values(rng, "float32", (id_ % 7 * 3, 5)) for id_ in range(start, start + count)}


def append(writer: RunWriter, values: dict[int, np.ndarray]) -> None:
    with small_chunks():
        writer.append(ids=list(values), columns={"token/h": list(values.values()), "example/y": list(values)})


def assert_shows(run: Run, expected: dict[int, np.ndarray]) -> None:
    assert run.ids == list(expected)
    assert len(run) == len(expected)
    assert all(same_bits(run["token/h"][number], value) for number, value in enumerate(expected.values()))
    assert run["example/y"].rows().tolist() == list(expected)


def test_opening_shows_exactly_what_is_committed(path):
    """After every append and every commit of a writer that goes on."""
    committed: dict[int, np.ndarray] = {}
    writer = writer_at(path)
    for start in range(0, 24, 3):
        new = examples(3, start)
        append(writer, new)
        if committed:
            assert_shows(open_run(path), committed)
        writer.commit()
        committed |= new
        assert_shows(open_run(path), committed)


@pytest.mark.parametrize("touched", [True, False])
def test_a_held_run_keeps_its_snapshot_while_the_writer_goes_on(path, touched):
    """Tails are replaced by longer ones, sealed and closed: the rows of the snapshot stay what they were.

    Also when they are read for the first time (`touched` is False) after all of that.
    """
    writer, held, committed = writer_at(path), [], {}
    for start in range(0, 40, 2):
        new = examples(2, start)
        append(writer, new)
        writer.commit()
        committed |= new
        run = open_run(path)
        if touched:
            assert_shows(run, committed)
        held.append((run, dict(committed)))
        for earlier, shown in held:
            if touched:
                assert_shows(earlier, shown)
    writer.close()
    for run, shown in held:
        assert_shows(run, shown)
    with writer_at(path, "resume") as second:
        append(second, examples(2, 100))
    for run, shown in held:
        assert_shows(run, shown)
        assert run.keys == [(id_, "record", -1) for id_ in shown]
    assert len(open_run(path).parts[0].arrays["token/h"].shards) > 5


def test_views_of_a_tail_stay_as_they_are_while_the_tail_is_replaced(path):
    writer = writer_at(path)
    append(writer, examples(3))
    writer.commit()
    view = open_run(path)["token/h"][2]
    before = view.copy()
    append(writer, examples(30, 3))
    writer.close()
    assert same_bits(view, before)


def test_what_is_not_committed_is_never_seen(path):
    """Shards that are full and written, but not yet named by a record."""
    writer = writer_at(path)
    append(writer, examples(1, 1))
    writer.commit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(writer._cadence), "due", lambda *_: False)
        append(writer, examples(40, 2))
    assert len(list((path / "parts/p000000/token/h").glob("c.*"))) > 3
    assert_shows(open_run(path), examples(1, 1))
    assert open_run(path).verify().ok


def test_a_writer_may_be_killed_and_its_run_copied_at_any_commit(path, tmp_path):
    """A copy of the folder as it is between two commits is a run by itself."""
    writer = writer_at(path)
    append(writer, examples(5))
    writer.commit()
    append(writer, examples(5, 5))
    shutil.copytree(path, tmp_path / "copy")
    writer.commit()
    assert_shows(open_run(tmp_path / "copy"), examples(5))


@pytest.mark.parametrize("verify", ["touch", "off"])
def test_reading_with_and_without_verification(path, verify):
    with writer_at(path) as writer:
        append(writer, examples(9))
    assert_shows(open_run(path, verify=verify), examples(9))


def test_without_verification_the_disk_is_trusted(path):
    with writer_at(path) as writer:
        writer.append(ids=["a"], columns={"token/h": [np.zeros(4, np.uint8)]})
    flip(path / "parts/p000000/token/h/c.0", 2)
    with pytest.raises(DamagedError, match="examples 'a' to 'a'"):
        open_run(path)["token/h"][0]
    assert open_run(path, verify="off")["token/h"][0].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("verify", ["on", True, None])
def test_other_ways_to_verify_are_refused_with_those_there_are(path, verify):
    with pytest.raises(ValueError, match="verify is 'touch' or 'off'"):
        open_run(path, verify=verify)


def test_more_shards_than_may_be_open_at_once_can_be_read(path, monkeypatch):
    """The least recently used ones are closed; what was read from them stays."""
    monkeypatch.setattr(shard_cache, "MOST", 2)
    with writer_at(path) as writer:
        append(writer, examples(60))
    run = open_run(path)
    assert len(run.parts[0].arrays["token/h"].shards) > 8
    kept = run["token/h"][:]
    assert_shows(run, examples(60))
    assert all(same_bits(value, expected) for value, expected in zip(kept, examples(60).values(), strict=True))


def test_a_relative_path_is_that_of_the_moment_of_opening(path, monkeypatch):
    with writer_at(path) as writer:
        append(writer, examples(9))
    monkeypatch.chdir(path.parent)
    run = open_run("run.zarr")
    monkeypatch.chdir("/")
    assert_shows(run, examples(9))


# Keys.


@pytest.fixture
def trained(path) -> Run:
    with writer_at(path) as writer:
        for phase, step in [("train", 0), ("train", 1), ("eval", 1)]:
            writer.append(ids=[7, 8], columns={"example/y": [step, step]}, phase=phase, step=step)
    return open_run(path)


def test_examples_are_found_by_any_part_of_their_key(trained):
    assert trained.ids == [7, 8] * 3
    assert trained.keys[3] == (8, "train", 1)
    assert trained.where().tolist() == [0, 1, 2, 3, 4, 5]
    assert trained.where(id=7).tolist() == [0, 2, 4]
    assert trained.where(phase="train").tolist() == [0, 1, 2, 3]
    assert trained.where(step=1).tolist() == [2, 3, 4, 5]
    assert trained.where(id=8, phase="train", step=1).tolist() == [3]
    assert trained.where(id=np.int64(8), step=0).tolist() == [1]
    assert trained.where(id=7).dtype == np.int64


@pytest.mark.parametrize("wanted", [{"id": 9}, {"id": "7"}, {"phase": "test"}, {"step": 2}, {"id": 7, "phase": "eval", "step": 0}])
def test_nothing_is_found_where_nothing_agrees(trained, wanted):
    assert trained.where(**wanted).tolist() == []


def test_text_ids_are_found(path):
    with writer_at(path) as writer:
        writer.append(ids=["a", "é", "b"], columns={"example/y": [1, 2, 3]})
    assert [open_run(path).where(id=id_).tolist() for id_ in ("a", "é", "b", "A", "", 1)] == [[0], [1], [2], [], [], []]


def test_ids_that_differ_in_a_zero_byte_at_the_end_stay_apart(path):
    """numpy drops trailing zeros of text."""
    ids = ["a", "a\0", "a\0\0"]
    with writer_at(path) as writer:
        writer.append(ids=ids, columns={"example/y": [1, 2, 3]})
    run = open_run(path)
    assert run.ids == ids
    assert [run.where(id=id_).tolist() for id_ in ids] == [[0], [1], [2]]


# Columns by name and sites by pattern.


def site(path: str, port: str = "out", call: int = 1, aliases: list[Any] | None = None) -> dict[str, Any]:
    return {"path": path, "port": port, "call": call, "aliases": aliases or []}


SITES = {
    "token/embed:out": site("embed", aliases=[["", "embed", None, 0]]),
    **{f"token/layers.{n}:out": site(f"layers.{n}", aliases=[["", "resid_post", n, 3]]) for n in range(3)},
    **{f"token/layers.{n}:in": site(f"layers.{n}", "in", aliases=[["", "resid_pre", n, 3]]) for n in range(3)},
    "token/head#2:out": site("head", call=2),
}


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("sites") / "run.zarr"
    with writer_at(path) as writer:
        for name, described in SITES.items():
            writer.describe(name, axes=("neuron",), site=described)
        columns = {name: [np.full((2, 3), number)] for number, name in enumerate(SITES)}
        writer.append(ids=["a"], columns={**columns, "token/tag": [[1, 2]], "example/topic": ["x"]})
    return open_run(path)


def names(columns: list[Any]) -> list[str]:
    return [column.name.removeprefix("token/") for column in columns]


def test_sites_are_listed_in_the_order_they_were_recorded(sites):
    assert names(sites.sites) == [name.removeprefix("token/") for name in SITES]


NAMES = ["token/layers.1:out", "layers.1:out", "resid_post[1]", "resid_post[-2]", "blocks.1.hook_resid_post"]


@pytest.mark.parametrize("name", NAMES)
def test_a_column_is_found_by_its_full_name_its_site_or_an_alias(sites, name):
    assert sites[name].name == "token/layers.1:out"
    assert sites[name].rows()[0, 0] == 2


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.*", [f"layers.{n}:out" for n in range(3)] + [f"layers.{n}:in" for n in range(3)]),
        ("layers.*:in", [f"layers.{n}:in" for n in range(3)]),
        ("resid_post", [f"layers.{n}:out" for n in range(3)]),
        ("resid_pre[:2]", ["layers.0:in", "layers.1:in"]),
        ("re:layers\\.[12]", ["layers.1:out", "layers.2:out"]),
        ("head#2", ["head#2:out"]),
        ("head", ["head#2:out"]),
        ("embed", ["embed:out"]),
        (["resid_pre[0]", "embed", "layers.0"], ["embed:out", "layers.0:out", "layers.0:in"]),
        ("**:out", ["embed:out", "layers.0:out", "layers.1:out", "layers.2:out", "head#2:out"]),
    ],
)
def test_patterns_select_recorded_sites_in_their_order(sites, pattern, expected):
    assert names(sites.select(pattern)) == expected


@pytest.mark.parametrize("pattern", ["layers.7", "resid_post[3]", "layers.1:out[0]", "mlp_out", "re:x", "head#1"])
def test_a_pattern_that_selects_nothing_names_the_closest(sites, pattern):
    with pytest.raises(UnknownColumnError, match=r"selects nothing that was recorded; the closest are '.+', '.+', '.+'"):
        sites.select(pattern)


def test_the_closest_names_are_close(sites):
    with pytest.raises(UnknownColumnError, match=r"'layers\.4:out' .* the closest are 'layers\.\d:out', 'layers\.\d:out'"):
        sites["layers.4:out"]
    with pytest.raises(UnknownColumnError, match=r"the closest are .*'resid_post\["):
        sites["resid_pots[1]"]


def test_one_of_several_patterns_that_selects_nothing_is_an_error(sites):
    with pytest.raises(UnknownColumnError, match=r"'layers\.9'"):
        sites.select(["embed", "layers.9"])


def test_a_pattern_that_fits_several_is_not_one_column(sites):
    with pytest.raises(UnknownColumnError, match=r"'resid_post' fits 3 columns \(token/layers\.0:out, .*use select\(\)"):
        sites["resid_post"]


TYPOS = {"token/tga": "token/tag", "example/topics": "example/topic", "tokens/tag": "token/tag"}


@pytest.mark.parametrize(("name", "closest"), TYPOS.items())
def test_a_column_that_there_is_not_is_refused_with_the_closest(sites, path, name, closest):
    """Also where no site was recorded at all."""
    with writer_at(path) as writer:
        writer.append(ids=["a"], columns={"token/tag": [[1, 2]], "example/topic": ["x"]})
    for run in (sites, open_run(path)):
        with pytest.raises(UnknownColumnError, match=closest):
            run[name]


def test_errors_about_columns_are_key_errors_without_quotes_around_them(sites):
    with pytest.raises(KeyError) as caught:
        sites["nothing"]
    assert str(caught.value).startswith("'nothing' selects")


def test_what_a_site_is_in_every_architecture(sites):
    assert sites.aliases(sites["layers.2:in"]) == [Alias("", "resid_pre", 2, 3)]
    assert sites.aliases(sites["head#2:out"]) == sites.aliases(sites["token/tag"]) == []


def test_other_columns_are_no_sites(sites):
    assert sites["token/tag"].site is None
    with pytest.raises(UnknownColumnError):
        sites.select("tag")


def test_representation_shows_tables_columns_bytes_and_commits(path):
    writer = writer_at(path)
    writer.append(ids=["a"], columns={f"token/h{n}": [np.ones((5, 1000))] for n in range(8)})
    writer.commit()
    text = repr(open_run(path))
    assert f"<Run {path}: 1 examples, 0.3 MB, 1 commits, open>" in text
    assert "token [5]: h0, h1, h2, h3, h4, h5, ... (8 columns)" in text
    assert "example [1]: id, phase, step" in text
    writer.close()
    assert "2 commits, closed>" in repr(open_run(path))


def test_bytes_are_those_of_all_values(path):
    with writer_at(path) as writer:
        rows = [np.ones((length, 3), np.float16) for length in (5, 1)]
        writer.append(ids=[1, 2], columns={"token/h": rows, "example/t": ["é", ""]})
    keys_and_bounds = 2 * 8 + 2 * (6 + 8) + 2 * 8 + 2 * 2 * 8
    assert open_run(path).nbytes == 6 * 3 * 2 + (2 + 2 * 8) + keys_and_bounds
