"""The root of a run: starting one, finding one, and the keys it already holds."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import keys, zarr_documents
from .errors import LostPartError, NotARunError, RunExistsError, SchemaError
from .keys import KeySet
from .part_reader import PartReader
from .part_state import attributes, read_parts
from .places import LocalPlace, Place
from .schema import FORMAT, Json, RunDocument
from .shard_cache import ShardCache

ROOT = "zarr.json"


def document_for(place: Place, mode: str, about: dict[str, Json]) -> tuple[RunDocument, bool]:
    """The run document for a writer in this mode, and whether the run is there already. Nothing is written yet."""
    if mode not in ("create", "resume", "overwrite"):
        raise ValueError(f"mode is 'create', 'resume' or 'overwrite', not {mode!r}")
    there = _is_taken(place)
    if there and mode == "create":
        raise _exists(place)
    if there and mode == "resume":
        return _continued(place, about), True
    if there:
        read_document(place, place.root)  # only runs are renamed aside
        _folder(place)
    return RunDocument(uid=uuid.uuid4().hex, **about), False


def start(place: Place, mode: str, document: RunDocument) -> None:
    """Begin a new run, once there is something to put into it; an old one that the mode overwrites is renamed aside."""
    if mode == "overwrite" and _is_taken(place):
        _rename_aside(_folder(place))
    place.replace(f"parts/{ROOT}", [zarr_documents.group()])
    try:
        place.create(ROOT, [zarr_documents.group(document.to_attributes())])
    except FileExistsError:
        raise _exists(place) from None
    place.settle()


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
    try:
        content = place.read(ROOT)
    except (FileNotFoundError, NotADirectoryError):
        reason = f"it has no {ROOT}" if place.names("") else "there is no folder with anything in it"
        raise NotARunError(f"{where} is not a tensortape run: {reason}") from None
    found = attributes(content, ROOT)
    if FORMAT not in found:
        raise NotARunError(f"{where} is a Zarr group, but not a tensortape run")
    return RunDocument.from_attributes(found, str(where))


@dataclass(frozen=True)
class Holdings:
    """What a run holds that a resuming writer must know: keys, the kind of its ids, dtype and shape of its columns."""

    keys: KeySet
    id_kind: str | None
    kinds: dict[str, tuple[str, tuple[int, ...]]]


def holdings(place: Place, run: str) -> Holdings:
    """Everything committed so far, by all parts."""
    found, kinds = KeySet(), dict[str, tuple[str, tuple[int, ...]]]()
    cache = ShardCache(place, verify=True)
    for part in read_parts(place, run):
        kinds.update({name: (column.dtype, column.shape) for name, column in part.columns.items()})
        found.add(map(keys.digest, *PartReader(part, cache).keys()))
    return Holdings(found, kinds.get("example/id", (None,))[0], kinds)


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
    def shown(value: Any) -> str:
        return repr(value)[:60]

    return [f"{key} was {shown(old[key])} and is now {shown(new[key])}" for key in old.keys() & new.keys() if old[key] != new[key]]


def _rename_aside(place: LocalPlace) -> None:
    uid = read_document(place, place.root).uid
    aside = place.root.with_name(f"{place.root.name}.old-{uid[:8]}")
    if aside.exists():
        raise RunExistsError(f"{aside} exists already; move it away before overwriting {place.root} once more")
    place.root.rename(aside)
