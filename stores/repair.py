"""Repairing a damaged run: what is whole stays readable, what is not is given up by name.

Nothing is changed in place. Whatever is replaced is first copied to `quarantine/`; documents come back from the copies that commit
records hold; damaged rows become fill values, and the examples they belong to are withdrawn by one more commit record, so that a
resumed recording records them anew.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import chain, commits, runs, zarr_documents
from .errors import DamagedError, SchemaError
from .mending import Mending, wounds
from .part_reader import PartReader
from .part_state import PartState, begun, claimed_parts, list_path, read_list, read_part, record_numbers
from .parts import group_folders
from .places import Place, place_at
from .salvage import most_examples, salvaged
from .schema import PartDocument
from .shapes import stated
from .shard_cache import ShardCache


@dataclass
class Repair:
    """What a repair has done.

    `replaced` are paths of objects that were written anew (what was there lies below `quarantine`), `withdrawn` the ids of examples
    that were given up (their numbers in the part, as text, where the ids are damaged too), and `lost` paths of files beside the
    tables that cannot be had back.
    """

    path: str
    quarantine: str
    replaced: list[str] = field(default_factory=list)
    withdrawn: list[str | int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether there was anything to do."""
        return bool(self.replaced or self.withdrawn)

    def __repr__(self) -> str:
        done = f"{len(self.replaced)} objects replaced, {len(self.withdrawn)} examples withdrawn"
        lost = f", {len(self.lost)} files lost" if self.lost else ""
        return f"<Repair {self.path}: {done if self.changed else 'nothing to repair'}{lost}>"


def repair_run(path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> Repair:
    """Repair a run, part by part; a part that needs it is sealed, so that its writer, should it live, fails at its next commit.

    >>> from tensortape.stores import RunWriter, open_run
    >>> with RunWriter("mended.zarr") as writer:
    ...     writer.append(ids=[7, 8], columns={"example/y": [1.5, 2.5]})
    >>> from pathlib import Path
    >>> shard = Path("mended.zarr/parts/p000000/example/y/c.0")
    >>> _ = shard.write_bytes(b"nonsense")
    >>> repair_run("mended.zarr").withdrawn
    [7, 8]
    >>> open_run("mended.zarr").ids, open_run("mended.zarr").verify().ok
    ([], True)
    """
    place = place_at(path, storage_options=storage_options)
    repairs = _Repairs(place, Repair(str(place.root), f"quarantine/{uuid.uuid4().hex[:8]}"))
    uid = repairs.root()
    for name in claimed_parts(place):
        repairs.part(uid, name)
    place.settle()
    return repairs.done


class _Repairs:
    def __init__(self, place: Place, done: Repair) -> None:
        self._place = place
        self._copies = {path: text for said in runs.statements(place) for path, text in said.copies.items()}
        self.done = done

    def root(self) -> str:
        """The run document, out of any part's copy, and the group above the parts; the run's uid."""
        if runs.ROOT in self._copies:
            self._mend(runs.ROOT, self._copies[runs.ROOT].encode())
        uid = runs.read_document(self._place, self._place.root).uid  # before anything is written to what may be no run
        self._mend("parts/zarr.json", zarr_documents.group())
        return uid

    def part(self, run: str, name: str) -> None:
        """One part: its document, its records, its shards, and what readers of plain Zarr need."""
        self._part_document(run, name)
        part, is_whole = self._state(run, name)
        found = wounds(self._place, part)
        if found and is_whole and not part.closed:
            chain.seal(self._place, run, name)  # its writer must not go on while shards are replaced
            part, is_whole = self._state(run, name)
            found = wounds(self._place, part)
        lost = range(part.examples, part.examples if is_whole else most_examples(self._place, run, name))
        self._documents(part, exactly=bool(found) or not is_whole)
        mending = Mending(self._place, part, self._keep)
        for wound in found:
            mending.mend(wound)
            self.done.replaced.append(wound.path)
        if found or not is_whole:
            self.done.withdrawn += [*_names_of(self._place, part, mending), *(_named(number, part) for number in lost)]
            self._record(part, mending, from_here=not is_whole)
        self._assets(part)

    def _part_document(self, run: str, name: str) -> None:
        """A part's document, out of its records' copy; a new one where nothing was committed that had a copy."""
        where = f"parts/{name}/{zarr_documents.DOCUMENT}"
        if where in self._copies:
            self._mend(where, self._copies[where].encode())
            return
        try:
            begun(self._place, name)
        except (DamagedError, SchemaError):
            self._mend(where, zarr_documents.group(PartDocument(run=run, session=uuid.uuid4().hex).to_attributes()))

    def _record(self, part: PartState, mending: Mending, *, from_here: bool) -> None:
        """Commit what is left."""
        self._keep(commits.end_path(part.name))
        chain.add_repair(self._place, part, mending.shards, from_here=from_here)
        self.done.replaced += [commits.path_of(part.name, part.commits), commits.end_path(part.name)]

    def _state(self, run: str, name: str) -> tuple[PartState, bool]:
        """The part as of its last good record, and whether its records and lists are whole."""
        try:
            part = read_part(self._place, run, name, whole=True)
            for file, arrays in part.lists.items():
                for listed in arrays.values():
                    read_list(self._place, list_path(name, file), listed)
            is_whole = True
        except DamagedError:
            part, is_whole = salvaged(self._place, run, name), False
        # There is one beyond the end if a repair was killed before it named its record there.
        last = max(record_numbers(self._place, name), default=0)
        is_whole, part.commits = is_whole and last <= part.commits, max(last, part.commits)
        return part, is_whole

    def _documents(self, part: PartState, *, exactly: bool) -> None:
        """Documents that only readers of plain Zarr need: they follow from the schema."""
        for folder in group_folders(part.columns.values()):
            self._mend(f"parts/{part.name}/{folder}/{zarr_documents.DOCUMENT}", zarr_documents.group())
        for found in stated(self._place, part):
            if found.is_wrong or (exactly and found.stated != found.rows):
                self._mend(found.path, found.content)

    def _assets(self, part: PartState) -> None:
        for name, digest in part.assets.items():
            path = f"assets/{name}"
            if path not in self.done.lost and hashlib.sha256(self._content(path)).hexdigest() != digest:
                self.done.lost.append(path)

    def _mend(self, path: str, content: bytes) -> None:
        """Write a document anew where it is not what it should be."""
        if self._content(path) != content:
            self._keep(path)
            self._place.replace(path, [content])
            self.done.replaced.append(path)

    def _keep(self, path: str) -> None:
        """Copy an object aside, if there is one."""
        if self._place.exists(path):
            self._place.create(f"{self.done.quarantine}/{path}", [self._place.read(path)])

    def _content(self, path: str) -> bytes:
        return self._place.read(path) if self._place.exists(path) else b""


def _names_of(place: Place, part: PartState, mending: Mending) -> list[str | int]:
    """Ids of the examples given up; where an id itself was damaged, what number of the part it is."""
    reader = PartReader(replace(part, withdrawn=()), ShardCache(place, part.document.run, verify=True))
    named = sorted(mending.withdrawn - mending.nameless)
    ids = [reader.ids_of(np.array([number])) for number in named]
    return [found[0] for found in ids if found] + [_named(number, part) for number in sorted(mending.nameless)]


def _named(number: int, part: PartState) -> str:
    return f"number {number} of {part.name}"
