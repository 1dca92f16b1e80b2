"""The state of a part whose commit records do not add up any more."""

from __future__ import annotations

from . import commits
from .commits import Record
from .errors import DamagedError
from .names import KEY_TABLES
from .part_state import PartState, begun, list_path, read_list, record_numbers
from .places import Place
from .strict_json import MOST
from .zarr_documents import DOCUMENT, stated_rows

Whole = dict[int, tuple[Record, str]]


def whole_records(place: Place, run: str, part: str) -> Whole:
    """The records that are what was written, with their digests, by number."""
    found: Whole = {}
    for number in record_numbers(place, part):
        path = commits.path_of(part, number)
        try:
            data = place.read(path, commits.MOST_BYTES)
            record = Record.decode(data, path)
        except DamagedError:
            continue
        if (record.run, record.part, record.number) == (run, part, number):
            found[number] = record, commits.digest(data)
    return found


def salvaged(place: Place, run: str, name: str) -> PartState:
    """The latest state that whole records lead to: from the first one on, or from any checkpoint."""
    records = whole_records(place, run, name)
    starts = [number for number, (record, _) in records.items() if number == 1 or _is_usable(place, record)]
    states = [_followed(place, name, records, start) for start in starts]
    return max(states, key=lambda state: state.commits, default=begun(place, name))


def most_examples(place: Place, run: str, part: str) -> int:
    """The most examples that any whole record of a part, or the documents of its ids, speak of."""
    records = [record for record, _ in whole_records(place, run, part).values()]
    said = [record.rows.get(table, 0) for record in records for table in KEY_TABLES]
    documents = [f"parts/{part}/{path}/{DOCUMENT}" for path in ("example/id", "example/id/end", "step/step")]
    return max([*said, *(stated_rows(place.read(path, MOST)) or 0 for path in documents if place.exists(path))], default=0)


def _is_usable(place: Place, record: Record) -> bool:
    """Whether a record is a checkpoint whose list is whole."""
    try:
        for listed in record.listed.values():
            read_list(place, list_path(record.part, record.list_file), listed)
    except DamagedError:
        return False
    return bool(record.listed)


def _followed(place: Place, name: str, records: Whole, start: int) -> PartState:
    """The part as of the last record that follows `start` without a gap."""
    part = begun(place, name)
    for number in range(start, max(records) + 1):
        record, digest = records.get(number, (None, ""))
        if record is None or (part.commits and record.previous != part.last):
            break
        if part.commits or number == 1:
            part.apply(record)
        else:
            part.start_from(record, place)
        part.last = digest
    return part
