"""The root of a run: starting one, joining one, finding one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import names, strict_json, zarr_documents
from .commits import MOST_BYTES, Record, digest, path_of
from .errors import DamagedError, FormatVersionError, LostPartError, NotARunError, RunExistsError, SchemaError
from .part_state import PartState, attributes, claimed_parts, record_numbers
from .places import LocalPlace, Place
from .schema import FORMAT, Json, RunDocument

ROOT = "zarr.json"


def document_for(place: Place, mode: str, session: str, about: dict[str, Json]) -> tuple[RunDocument, bool]:
    """The run document for a writer in this mode, and whether the run is there already. Nothing is written yet.

    A run that the same session has begun is joined in every mode.
    """
    if mode not in ("create", "resume", "overwrite"):
        raise ValueError(f"mode is 'create', 'resume' or 'overwrite', not {mode!r}")
    there = _is_taken(place)
    if there and (mode == "resume" or _begun_by(place, session)):
        return _continued(place, about), True
    if there and mode == "create":
        raise _exists(place)
    if there:
        read_document(place, place.root)  # only runs are renamed aside
        _folder(place)
    return RunDocument(uid=uuid.uuid4().hex, session=session, **about), False


def start(place: Place, mode: str, document: RunDocument) -> RunDocument:
    """Begin a new run, once there is something to put into it; an old one that the mode overwrites is renamed aside.

    Returns:
        The document that counts: another's, if a writer of the same session was quicker.
    """
    if mode == "overwrite" and _is_taken(place):
        _make_way(_folder(place), document.session)
    place.replace(f"parts/{ROOT}", [zarr_documents.group()])
    try:
        place.create(ROOT, [zarr_documents.group(document.to_attributes())])
    except FileExistsError:
        if not _begun_by(place, document.session):
            raise _exists(place) from None
        return read_document(place, place.root)
    place.settle()
    return document


def _begun_by(place: Place, session: str) -> bool:
    try:
        return read_document(place, place.root).session == session
    except (NotARunError, SchemaError):
        return False


def _is_taken(place: Place) -> bool:
    """Whether anything is at the path, other than what a start leaves behind that was killed before the run existed."""
    try:
        place.size(ROOT)
    except FileNotFoundError:
        return not set(place.names("")) <= {"parts"} or not set(place.names("parts")) <= {ROOT}
    except NotADirectoryError:  # a file
        return True
    return True


def check_is(place: Place, uid: str, where: str | Path) -> None:
    """LostPartError unless the run at a place is still this one: it may have been overwritten, moved or deleted."""
    try:
        found = read_document(place, where).uid
    except NotARunError:
        found = None
    if found != uid:
        raise LostPartError(f"{where} is no longer the run that this writer writes; it was overwritten, moved or deleted")


def read_document(place: Place, where: str | Path) -> RunDocument:
    """The run document at a place; NotARunError if there is none."""
    return parsed_document(read_root(place, where), where)


def read_root(place: Place, where: str | Path) -> bytes:
    """The bytes of the run document; NotARunError if there are none."""
    try:
        return place.read(ROOT, strict_json.MOST)
    except (FileNotFoundError, NotADirectoryError):
        reason = f"it has no {ROOT}" if place.names("") else "there is no folder with anything in it"
        raise NotARunError(f"{where} is not a tensortape run: {reason}") from None


def parsed_document(content: bytes, where: str | Path) -> RunDocument:
    """The run document out of its bytes."""
    found = attributes(content, ROOT)
    if FORMAT not in found:
        raise NotARunError(f"{where} is a Zarr group, but not a tensortape run")
    return RunDocument.from_attributes(found, str(where))


def check_copies(root: bytes, parts: Iterable[PartState]) -> None:
    """DamagedError unless the run document is the one that every part has seen."""
    for part in parts:
        if part.copies.get(ROOT, root.decode(errors="replace")).encode() != root:
            raise DamagedError(f"{ROOT}: the run document is not the one that was written; `tensortape repair` brings it back")


def statements(place: Place) -> Iterator[Record]:
    """The first readable commit record of each part that has copies of documents: what parts say of the run they belong to."""
    for part in claimed_parts(place):
        for number in record_numbers(place, part):
            path = path_of(part, number)
            with suppress(DamagedError, FormatVersionError):
                record = Record.decode(place.read(path, MOST_BYTES), path)
                if record.copies:
                    yield record
                    break


def keep_asset(place: Place, name: str, content: bytes) -> str:
    """Keep a file beside the tables, unless one of that name is there; the SHA-256 of what is there then."""
    path = f"assets/{name}"
    if not place.exists(path):
        with suppress(FileExistsError):  # somebody else was quicker
            place.create(path, [content])
            return digest(content)
    return digest(place.read(path))


def _exists(place: Place) -> RunExistsError:
    anew = "mode='overwrite' to start anew (the old one is renamed aside)"
    if not isinstance(place, LocalPlace):
        anew = "delete what is below it (an object store cannot rename it aside, so mode='overwrite' is for folders)"
    return RunExistsError(f"{place.root} exists; give another path, mode='resume' to continue it, or {anew}")


def _folder(place: Place) -> LocalPlace:
    """The place, if what is there can be renamed aside."""
    if not isinstance(place, LocalPlace):
        raise _exists(place)
    return place


def _continued(place: Place, about: dict[str, Json]) -> RunDocument:
    document = read_document(place, place.root)
    differences = sorted(_differences(document.fingerprint, json.loads(json.dumps(about.get("fingerprint", {})))))
    if differences:
        raise SchemaError(f"{place.root} was recorded from something else and cannot be resumed: {'; '.join(differences)}")
    return document


def _differences(old: Json, new: Json) -> list[str]:
    """What both say, and say differently; of objects within, too."""

    def shown(value: Any) -> str:
        return repr(value)[:60]

    found: list[str] = []
    for key in (key for key in old.keys() & new.keys() if old[key] != new[key]):
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            found += [f"{key}.{difference}" for difference in _differences(old[key], new[key])]
        else:
            found.append(f"{key} was {shown(old[key])} and is now {shown(new[key])}")
    return found


def _make_way(place: LocalPlace, session: str) -> None:
    """Rename the run at a place aside, unless the same session has begun it.

    The new name tells which run it is, and a folder is never renamed onto one with something in it. So of several writers that
    do this at once one succeeds, and none takes the run that another has begun in the meantime for the old one.
    """
    there = _uid_unless_begun_by(place, session)
    if there is None:
        return
    aside = place.root.with_name(f"{place.root.name}.old-{names.to_disk(there[:8])}")
    try:
        place.root.rename(aside)
    except OSError:
        if _uid_unless_begun_by(place, session) != there:
            return
        if aside.exists():
            raise RunExistsError(f"{aside} exists already; move it away before overwriting {place.root} once more") from None
        raise


def _uid_unless_begun_by(place: LocalPlace, session: str) -> str | None:
    """The identity of the run at a place; None for one of this session, or none at all."""
    try:
        document = read_document(place, place.root)
    except NotARunError:
        return None
    return None if document.session == session else document.uid
