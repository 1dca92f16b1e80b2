"""Adding to the commit records of a part: what its writer does, and what seals the part of one that is gone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import commits
from .commits import End, Record, ShardRecord
from .errors import LostPartError
from .part_state import PartState, claimed_parts, list_path, read_end, read_part
from .places import Place
from .zarr_documents import DOCUMENT

Shards = Mapping[str, Mapping[int, ShardRecord]]  # by path of the array and number


def add_record(place: Place, part: PartState, kind: str, **said: Any) -> None:
    """Create a part's next record, which `said` fills, and take it into account.

    Every thousandth record and one that closes the part are checkpoints.

    Raises:
        LostPartError: the part has such a record already, or an end: it was sealed or continued by somebody else.
    """
    record = Record(
        run=part.document.run,
        part=part.name,
        number=part.commits + 1,
        previous=part.last,
        kind=kind,
        document=part.stated,
        **{"rows": part.rows, "nonfinite": part.nonfinite, "written": part.written, **said},
    )
    if record.closes or record.number % commits.CHECKPOINT_EVERY == 0:
        record = _checkpoint(place, part, record)
    data = record.encode()
    try:
        place.create(commits.path_of(part.name, record.number), [data])
    except FileExistsError:
        raise _lost(part) from None
    part.apply(record)
    part.last = commits.digest(data)


def check_open(place: Place, part: PartState) -> None:
    """LostPartError if somebody else has sealed or continued a part, before anything is written to it in vain."""
    if place.exists(commits.path_of(part.name, part.commits + 1)) or place.exists(commits.end_path(part.name)):
        raise _lost(part)


def finish(place: Place, part: PartState) -> None:
    """State which record closed the part."""
    end = End(part.commits, part.last).encode()
    where = commits.end_path(part.name)
    try:
        place.create(where, [end])
    except FileExistsError:
        if place.read(where) != end:
            raise _lost(part) from None
    part.ended = True


def seal(place: Place, run: str, name: str) -> bool:
    """Close the part of a writer that is gone, as of its last commit; whether there was anything to do.

    Should the writer not be gone after all, its next commit fails.
    """
    while True:
        part = read_part(place, run, name)
        if part.ended:
            return False
        try:
            if not part.closed:
                add_record(place, part, "sealed", copies=part.copies or copies(place, name))
                place.settle()
            finish(place, part)
        except LostPartError:
            continue  # its writer was quicker, this time
        place.settle()
        return True


def copies(place: Place, part: str) -> dict[str, str]:
    """The run's and a part's documents, for its first record: nothing else could tell if they were damaged."""
    return {path: place.read(path).decode() for path in (DOCUMENT, f"parts/{part}/{DOCUMENT}")}


def add_repair(place: Place, part: PartState, shards: Shards, *, from_here: bool) -> None:
    """Say what a repair has left of a part; with `from_here` no earlier record counts any more."""
    end = None if from_here else read_end(place, part.name)
    rows = {path: part.arrays[path].rows for path in shards}
    add_record(
        place,
        part,
        "repaired",
        array_rows=rows,
        shards=shards,
        withdrawn=part.withdrawn,
        copies=part.copies or copies(place, part.name),
    )
    place.settle()
    first = part.commits if from_here else end.first if end else 1
    place.replace(commits.end_path(part.name), [End(part.commits, part.last, first).encode()])
    part.ended = True


def seal_others(place: Place, run: str, session: str) -> list[str]:
    """Seal every open part that another session has begun; their names."""
    found = [name for name in claimed_parts(place) if not place.exists(commits.end_path(name))]
    open_parts = [name for name in found if read_part(place, run, name).document.session != session]
    return [name for name in open_parts if seal(place, run, name)]


def _checkpoint(place: Place, part: PartState, record: Record) -> Record:
    """The same record, made to stand for all before it; the list of all shards is written first."""
    arrays = {path: (state.rows, state.shards) for path, state in part.arrays.items()}
    for path, rows in record.array_rows.items():
        before = part.arrays[path].shards if path in part.arrays else {}
        arrays[path] = rows, {**before, **record.shards.get(path, {})}
    data, listed = commits.encode_lists(arrays)
    # The name holds the content's digest: a writer that is late must not replace the list of the one that sealed its part.
    file = f"{record.number:012d}.{hashlib.sha256(data).hexdigest()[:16]}.shards"
    if listed:
        place.replace(list_path(part.name, file), [data])
        place.settle()
    return replace(
        record,
        columns={**part.columns, **record.columns},
        copies={**part.copies, **record.copies},
        assets={**part.assets, **record.assets},
        aligned=record.aligned or part.aligned,
        withdrawn=record.withdrawn or part.withdrawn,
        listed=listed,
        list_file=file,
    )


def _lost(part: PartState) -> LostPartError:
    return LostPartError(f"part {part.name} was sealed or continued by somebody else; nothing of theirs was changed")
