"""Starting a run, finding one again: the modes create, resume and overwrite, and what is not a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from strategies import edit_json, files_below, writer_at

from tensortape.stores import RunWriter, keys, open_run
from tensortape.stores.errors import DamagedError, FormatVersionError, NotARunError, RunExistsError, SchemaError

MODES = ["create", "resume", "overwrite"]


def write(path: Path, *ids: int | str, mode: str = "create", **options) -> str:
    """Append one example per id, in one session; the run's uid."""
    with writer_at(path, mode, **options) as writer:
        for id_ in ids:
            writer.append(ids=[id_], columns={"token/h": [np.full((2, 3), len(str(id_)), np.float32)]})
    return writer.uid


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("empty_folder", [True, False])
def test_every_mode_starts_a_run_where_there_is_nothing(path, mode, empty_folder):
    if empty_folder:
        path.mkdir()
    uid = write(path, "a", mode=mode)
    assert open_run(path).ids == ["a"]
    assert open_run(path).uid == uid
    assert [entry.name for entry in path.parent.iterdir()] == ["run.zarr"]


@pytest.mark.parametrize("mode", ["", "append", "w", None])
def test_other_modes_are_refused_with_those_there_are(path, mode):
    with pytest.raises(ValueError, match="mode is 'create', 'resume' or 'overwrite'"):
        RunWriter(path, mode=mode)
    assert not path.exists()


def others(path: Path) -> dict[str, Path]:
    """Things that are no run: a file, a folder with something in it, a Zarr group with and without attributes, a Zarr array."""
    found = {name: path / name for name in ("file", "folder", "group", "bare", "array", "json")}
    path.mkdir(exist_ok=True)
    found["file"].write_bytes(b"mine")
    for name in ("folder", "bare", "json"):
        found[name].mkdir()
    (found["folder"] / "notes.txt").write_bytes(b"mine")
    zarr.create_group(found["group"], attributes={"mine": 1})
    (found["bare"] / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    zarr.create_array(found["array"], shape=(3,), dtype="int8")
    (found["json"] / "zarr.json").write_text('{"attributes": {"other": 1}}')
    return found


OTHERS = ["file", "folder", "group", "bare", "array", "json"]


@pytest.mark.parametrize("name", OTHERS)
def test_create_refuses_whatever_is_there(tmp_path, name):
    there = others(tmp_path / "others")[name]
    before = files_below(tmp_path)
    with pytest.raises(RunExistsError, match=rf"{name} exists; give another path, mode='resume'.*or mode='overwrite'"):
        RunWriter(there, mode="create")
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
@pytest.mark.parametrize("name", OTHERS)
def test_resume_and_overwrite_refuse_what_is_no_run(tmp_path, name, mode):
    """Nobody's notes are renamed aside, or mixed with a run."""
    there = others(tmp_path / "others")[name]
    before = files_below(tmp_path)
    with pytest.raises(NotARunError, match=rf"{name} is (not a tensortape run|a Zarr group, but not a tensortape run)"):
        RunWriter(there, mode=mode)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_run_is_not_opened(tmp_path, name):
    with pytest.raises(NotARunError, match=rf"{name} is (not a tensortape run|a Zarr group, but not a tensortape run)"):
        open_run(others(tmp_path / "others")[name])


def test_a_path_with_nothing_is_not_opened(path):
    with pytest.raises(NotARunError, match="there is no folder with anything in it"):
        open_run(path)
    assert not path.exists()


def test_create_refuses_a_run(path):
    write(path, "a")
    before = files_below(path)
    with pytest.raises(RunExistsError):
        RunWriter(path)
    assert files_below(path) == before


# Resume.


def test_resume_continues_in_a_new_part(path):
    uid = write(path, "a", "b")
    before = files_below(path)
    assert write(path, "c", mode="resume") == uid
    run = open_run(path)
    assert run.ids == ["a", "b", "c"]
    assert [part.name for part in run.parts] == ["p000000", "p000001"]
    assert len({part.document.session for part in run.parts}) == 2
    after = files_below(path)
    assert before == {name: after[name] for name in before}, "nothing of the earlier part has changed"


def test_resume_knows_what_is_committed(path):
    write(path, 1, 2, 2000)
    writer = writer_at(path, "resume")
    assert [id_ in writer.committed_ids for id_ in (1, 2, 2000, 3, "1")] == [True, True, True, False, False]
    assert (1, keys.PHASE, keys.STEP) in writer.committed_ids
    assert (1, keys.PHASE, 0) not in writer.committed_ids
    assert len(writer.committed_ids) == 3


def test_resume_knows_ids_that_come_from_numpy(path):
    """`row["id"] in writer.committed_ids` with a row of a data frame."""
    write(path, 1)
    assert np.int64(1) in writer_at(path, "resume").committed_ids


def test_resume_counts_examples_once_whatever_was_added_to_them(path, monkeypatch):
    """Extension parts hold the keys of their examples again."""
    monkeypatch.setattr(keys, "_MERGE_AT", 4)
    write(path, *range(10))
    open_run(path).add_column("example/y", list(range(10)))
    writer = writer_at(path, "resume")
    assert len(writer.committed_ids) == 10
    assert all(id_ in writer.committed_ids for id_ in range(10))


@pytest.mark.slow
def test_resume_of_many_examples_finds_each_of_them(path):
    """Over 65,536 keys are kept sorted instead of in a set: none may get lost on the way."""
    ids = np.arange(70_000)
    with writer_at(path) as writer:
        writer.append(ids=ids, columns={})
    found = writer_at(path, "resume").committed_ids
    assert len(found) == 70_000
    assert [id_ for id_ in ids[::7].tolist() if id_ not in found] == []
    assert [id_ for id_ in range(70_000, 71_000) if id_ in found] == []


def test_resuming_without_appending_changes_nothing(path):
    write(path, "a")
    before = files_below(path)
    writer_at(path, "resume").close()
    assert files_below(path) == before


def test_resume_after_an_open_session_continues_beside_it(path):
    """A writer that was killed, or is still there, keeps its part; what it had not committed is not seen."""
    first = writer_at(path)
    first.append(ids=["a"], columns={"example/y": [1]})
    first.commit()
    first.append(ids=["lost"], columns={"example/y": [2]})
    with writer_at(path, "resume") as second:
        second.append(ids=["lost"], columns={"example/y": [3]})
    assert open_run(path)["example/y"].rows().tolist() == [1, 3]


FINGERPRINT = {"model": "gpt2", "sites": ["resid_post"], "max_length": 512}


@pytest.mark.parametrize("changes", [{}, {"new": 1}])
def test_resume_accepts_the_same_fingerprint_and_new_entries(path, changes):
    write(path, "a", about={"fingerprint": FINGERPRINT})
    write(path, "b", mode="resume", about={"fingerprint": {**FINGERPRINT, **changes}})
    assert open_run(path).ids == ["a", "b"]


def test_resume_without_a_fingerprint_is_accepted(path):
    write(path, "a", about={"fingerprint": FINGERPRINT})
    write(path, "b", mode="resume")
    assert open_run(path).ids == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt3"}, "model was 'gpt2' and is now 'gpt3'"),
        ({"max_length": 256}, "max_length was 512 and is now 256"),
        ({"max_length": None, "sites": []}, r"max_length was 512 and is now None; sites was \['resid_post'\] and is now \[\]"),
    ],
)
def test_resume_refuses_another_fingerprint_and_says_what_differs(path, changes, message):
    write(path, "a", about={"fingerprint": FINGERPRINT})
    before = files_below(path)
    with pytest.raises(SchemaError, match=rf"recorded from something else and cannot be resumed: {message}"):
        writer_at(path, "resume", about={"fingerprint": {**FINGERPRINT, **changes}})
    assert files_below(path) == before


def test_a_fingerprint_is_compared_as_it_is_stored(path):
    """A tuple becomes a list in JSON: the very same call must be able to resume."""
    fingerprint = {"sites": ("resid_post", "embed"), "layers": {3: "x"}}
    write(path, "a", about={"fingerprint": fingerprint})
    write(path, "b", mode="resume", about={"fingerprint": fingerprint})
    assert open_run(path).ids == ["a", "b"]


# Overwrite.


def test_overwrite_renames_the_old_run_aside_and_takes_a_new_identity(path):
    old = write(path, "a", "b")
    before = files_below(path)
    new = write(path, "c", mode="overwrite")
    assert new != old
    assert open_run(path).ids == ["c"]
    aside = path.with_name(f"run.zarr.old-{old[:8]}")
    assert files_below(aside) == before
    assert open_run(aside).uid == old
    assert open_run(aside).verify().ok


def test_overwriting_again_and_again_keeps_every_run(path):
    uids = [write(path, number, mode="overwrite") for number in range(3)]
    assert len(set(uids)) == 3
    assert sorted(open_run(run).ids[0] for run in path.parent.iterdir()) == [0, 1, 2]


def test_overwrite_never_replaces_what_it_renamed_aside(path):
    """The name aside is taken by something else: better to stop than to lose either."""
    old = write(path, "a")
    aside = path.with_name(f"run.zarr.old-{old[:8]}")
    aside.mkdir()
    (aside / "notes.txt").write_bytes(b"mine")
    before = files_below(path.parent)
    with pytest.raises(RunExistsError, match="move it away"), writer_at(path, "overwrite") as writer:
        writer.append(ids=["b"], columns={"example/y": [1]})
    assert files_below(path.parent) == before


def test_overwrite_changes_nothing_before_there_is_something_to_write(path):
    write(path, "a")
    before = files_below(path.parent)
    writer_at(path, "overwrite").close()
    assert files_below(path.parent) == before


def test_an_open_reader_keeps_reading_the_run_that_was_renamed_aside(path):
    """By the bytes it has mapped; it never sees those of the new run."""
    write(path, "aa")
    run = open_run(path)
    assert run["token/h"][0].tolist() == [[2.0] * 3] * 2
    write(path, "bbb", mode="overwrite")
    assert run["token/h"][0].tolist() == [[2.0] * 3] * 2
    assert run.ids == ["aa"]


# Documents.


@pytest.mark.parametrize("mode", ["open", "resume", "overwrite"])
def test_a_run_of_a_newer_format_is_refused(path, mode):
    write(path, "a")
    edit_json(path / "zarr.json", lambda document: document["attributes"]["tensortape"].update(version=2))
    before = files_below(path.parent)
    with pytest.raises(FormatVersionError, match="format version 2, but this tensortape reads version 1; update tensortape"):
        open_run(path) if mode == "open" else RunWriter(path, mode=mode)
    assert files_below(path.parent) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"attributes": 1}', b"\xff\xfe", b"null"])
def test_a_run_document_that_is_none_is_damage(path, content):
    write(path, "a")
    (path / "zarr.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"zarr\.json"):
        open_run(path)


@pytest.mark.parametrize("missing", ["uid", "model", "fingerprint", "version"])
def test_a_run_document_with_something_missing_is_refused_by_name(path, missing):
    write(path, "a")
    edit_json(path / "zarr.json", lambda document: document["attributes"]["tensortape"].pop(missing))
    with pytest.raises((DamagedError, SchemaError), match=r"run\.zarr"):
        open_run(path)


def test_the_run_document_keeps_what_the_writer_said(path):
    about = {"model": {"name": "gpt2"}, "provenance": {"torch": "2.4"}, "fingerprint": FINGERPRINT, "policy": {"every": 1}}
    write(path, "a", about=about)
    run = open_run(path)
    assert (run.model, run.provenance) == (about["model"], about["provenance"])
    assert zarr.open_group(path, mode="r").attrs["tensortape"] == {
        "version": 1,
        "uid": run.uid,
        "session": run.parts[0].document.session,
        **about,
    }


def test_nothing_else_lies_in_the_folder_of_a_run(path):
    """And no temporary file stays."""
    write(path, "a")
    write(path, "b", mode="resume")
    assert sorted(entry.name for entry in path.iterdir()) == ["parts", "zarr.json"]
    assert sorted(entry.name for entry in (path / "parts").iterdir()) == ["p000000", "p000001", "zarr.json"]
    assert not [name for name in files_below(path) if ".partial" in name]
