"""Documents of a run changed at random, by someone who knows the format: checksums and digests are right again afterwards.

Whatever they say, reading raises only errors of ours, takes at most 2 s and 256 MiB, and opens nothing outside of the run.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from strategies import put, small_chunks

from tensortape.stores import commits

from .attacks import read_everything, watched
from .recipe import Recipe, append, record, writing

RECIPE = Recipe(52, 3, 9)
_RECORD = re.compile(r"parts/(p\d+)/commits/\d+\.json")
_NUMBERS = [0, 1, -1, 2, 7, 255, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 200, -(1 << 63), 1.5, 1e308]
_TEXTS = [
    "",
    "x",
    "\0",
    "..",
    "../../../outside/secret",
    "/outside/secret",
    "\ud800",
    "\x1b[31m",
    "a" * 100_000,
    "ff" * 8,
    "text",
    "int8",
]
_OTHERS = [None, True, False, [], {}, [[]], ["x", -1], [1 << 40, 1 << 40], {"x": 1}, {"": {"": []}}]
_RAW = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe",
    b"NaN",
    b"{}" * 9,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"1" * 10_000,
    b'{"a":1,"a":2}',
]


def fuzzed(folder: Path, count: int, seed: int) -> Iterator[list[str]]:
    """One trial per seed: one document of a run, or several, are others."""
    path = folder / "run.zarr"
    (folder / "outside").mkdir(parents=True, exist_ok=True)
    (folder / "outside" / "secret").write_bytes(b"secret")
    with small_chunks(shard_bytes=256):
        record(path, RECIPE, lambda _: None)
        with writing(folder / "coded.zarr") as writer, np.errstate(over="ignore"):
            writer.describe("token/h", quantize="int8")
            writer.describe("token/u", compress="zstd")
            append(writer, RECIPE, lambda _: None)
    for number in range(seed, seed + count):
        dice = random.Random(number)
        run = dice.choice([path, folder / "coded.zarr"])
        yield [f"document {number}: {what}" for what in _trial(run, folder / "outside", dice)]


def _trial(run: Path, outside: Path, dice: random.Random) -> list[str]:
    before = {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("*")) if _is_document(file)}
    after = _changed(before, dice)
    changed = [name for name in after if after[name] != before[name]]
    for name in changed:
        put(run / name, after[name])
    with watched(outside) as harm:
        found = list(read_everything(run))
    for name in changed:
        put(run / name, before[name])
    return [f"{what} ({', '.join(changed)})" for what in [*found, *harm]]


def _is_document(file: Path) -> bool:
    return file.suffix in (".json", ".shards")


def _changed(documents: dict[str, bytes], dice: random.Random) -> dict[str, bytes]:
    """The documents of a run, one of them another, and what vouches for it put right."""
    kind = dice.choice(["/commits/", "/commits/", "/commits/", "/commits/", "zarr.json", "zarr.json", "end.json", ".shards"])
    name = dice.choice([name for name in documents if kind in name])
    if dice.random() < 0.25:
        name = dice.choice(["zarr.json", "parts/p000000/zarr.json"])
    found = dict(documents)
    if name.endswith(".shards"):
        return _vouched(found | {name: _of_bytes(found[name], dice)})
    found[name] = _another(documents, name, dice)
    return found if name.endswith("end.json") else _vouched(found)


def _another(documents: dict[str, bytes], name: str, dice: random.Random) -> bytes:
    """Another content of a document; of a record, what stands in its frame."""
    content = json.loads(documents[name])
    content = content["record"] if _RECORD.fullmatch(name) else content
    how = dice.random()
    if how < 0.05:
        text = dice.choice(_RAW)
    elif how < 0.1:
        text = json.dumps(json.loads(documents[dice.choice([other for other in documents if other.endswith(".json")])])).encode()
    elif how < 0.15:
        text = _of_bytes(json.dumps(content).encode(), dice)
    else:
        for _ in range(dice.choice([1, 1, 1, 2, 4])):
            _mutate(content, dice)
        text = json.dumps(content).encode()
    if how > 0.95:
        text = text.replace(b'"7"', b"[" * 400 + b"]" * 400).replace(b": 3", b": " + b"[" * 500 + b"]" * 500)
    return commits._framed(text) if _RECORD.fullmatch(name) else text


def _mutate(document: Any, dice: random.Random) -> None:
    nodes = list(_nodes(document))
    if not nodes:
        return
    holder, key = dice.choice(nodes)
    how = dice.random()
    if how < 0.15 and isinstance(holder, dict):
        del holder[key]
    elif how < 0.25 and isinstance(holder, dict):
        holder[dice.choice([*_TEXTS, *map(str, _NUMBERS), str(key).upper()])] = holder.pop(key)
    elif how < 0.35 and isinstance(holder, list):
        holder.extend(deepcopy(holder[key]) for _ in range(dice.choice([1, 20])))
    elif how < 0.5:
        other, at = dice.choice(nodes)
        holder[key] = json.loads(json.dumps(other[at])) if at in other or (isinstance(other, list) and at < len(other)) else None
    elif how < 0.7 and type(holder[key]) is int:
        holder[key] += dice.choice([-1, 1, 8, 1 << 20])
    else:
        holder[key] = deepcopy(dice.choice([*_NUMBERS, *_TEXTS, *_OTHERS]))


def _nodes(document: Any) -> Iterator[tuple[Any, Any]]:
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in list(items):
        yield document, key
        yield from _nodes(value)


def _of_bytes(content: bytes, dice: random.Random) -> bytes:
    """A few bytes are others, or it is cut, or goes on."""
    found = bytearray(content)
    for _ in range(dice.choice([0, 1, 3])):
        if found:
            found[dice.randrange(len(found))] = dice.choice([0, 1, 0x7F, 0xFF, dice.randrange(256)])
    return bytes(found[: dice.randrange(len(found) + 1)] if dice.random() < 0.2 else found + b"\0" * dice.choice([0, 0, 24]))


# Who changes a document also puts right what vouches for it.


def _vouched(documents: dict[str, bytes]) -> dict[str, bytes]:
    found = dict(documents)
    for part in sorted({name.split("/")[1] for name in found if _RECORD.fullmatch(name)}):
        digest = ""
        for name in sorted(name for name in found if name.startswith(f"parts/{part}/commits/") and name.endswith(".json")):
            digest = _revouch(found, part, name, digest)
        end = f"parts/{part}/end.json"
        if end in found:
            last = sum(name.startswith(f"parts/{part}/commits/") and name.endswith(".json") for name in found)
            found[end] = commits.End(last, digest).encode()
    return found


def _revouch(found: dict[str, bytes], part: str, name: str, previous: str) -> str:
    """Put right what a record says of others, if it is still one at all; its digest."""
    try:
        said = json.loads(found[name])["record"]
        document = f"parts/{part}/zarr.json"
        said["document"] = commits.digest(found[document])
        said["previous"] = previous if previous else said["previous"]
        said["copies"] = {path: found[path].decode() for path in said["copies"]} if "copies" in said else {}
        if "checkpoint" in said:
            content = found[f"parts/{part}/commits/{said['checkpoint']['file']}"]
            for numbers in said["checkpoint"]["arrays"].values():
                numbers[4] = google_crc32c.value(content[numbers[2] : numbers[2] + numbers[3]])
        found[name] = commits._framed(json.dumps(said).encode())
    except Exception:  # it is not of that form any more
        pass
    return commits.digest(found[name])
