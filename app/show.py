"""What the command line prints of a run."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tensortape.stores import Column, Run

Json = dict[str, Any]


def info(run: Run) -> Json:
    """Tables, columns, model and commits of a run."""
    nonfinite = _nonfinite(run)
    return {
        "path": str(run.path),
        "uid": run.uid,
        "examples": len(run),
        "bytes": run.nbytes,
        "model": {key: value for key, value in run.model.items() if key != "config"},
        "provenance": run.provenance,
        "parts": [_part(part) for part in run.parts],
        "write_amplification": _amplification(run),
        "tables": {
            table.name: {
                "rows": table.rows,
                "columns": [_column(column, nonfinite.get(column.name, 0)) for column in table.values()],
            }
            for table in run.tables.values()
        },
        "assets": run.assets,
    }


def info_lines(found: Json) -> Iterable[str]:
    """The same for people."""
    model = found["model"]
    yield f"{found['path']}: {found['examples']} examples, {megabytes(found['bytes'])}, uid {found['uid'][:8]}"
    if model:
        yield f"model: {', '.join(_of_model(model))}"
    for part in found["parts"]:
        rows = f"{part['steps']} steps" if "steps" in part else f"{part['examples']} examples"
        yield f"part {part['name']}: {part['kind']}, {rows}, {part['commits']} commits, {part['state']}"
    yield f"written {found['write_amplification']:.2f} bytes per byte kept"
    for name, table in found["tables"].items():
        yield f"table {name}: {table['rows']} rows"
        for column in table["columns"]:
            shape, notes = f"[{', '.join(map(str, column['shape']))}]", "".join(_notes(column))
            yield f"  {column['name']:<44} {column['dtype']:<9} {shape:<16} {megabytes(column['bytes']):>10}{notes}"


def repair_lines(found: Json) -> Iterable[str]:
    """What a repair has done, for people."""
    yield from (f"replaced {path}" for path in found["replaced"])
    if found["withdrawn"]:
        named = ", ".join(map(repr, found["withdrawn"][:20])) + (", ..." if len(found["withdrawn"]) > 20 else "")
        yield f"{len(found['withdrawn'])} examples withdrawn: {named}; record them again with mode='resume'"
    yield from (f"lost {path}: copy it back from another run of the same model" for path in found["lost"])
    kept = f"; what was there before lies in {found['quarantine']}" if found["replaced"] else ""
    yield f"{found['path']}: {len(found['replaced'])} objects replaced{kept}"


def head(run: Run, *, examples: int, tokens: int, sites: list[str] | None, tokenizer: Any) -> list[Json]:
    """The first tokens of the first examples, with the norm of each site's row."""
    columns = run.select(sites) if sites else run.sites
    shown = [column for column in columns if column.name.startswith("token/") and len(column.shape) > 1]
    return [_example(run, number, shown, tokens, tokenizer) for number in range(min(examples, len(run)))]


def head_lines(found: list[Json], most: int = 8) -> Iterable[str]:
    """The same for people, the first few sites side by side."""
    for example in found:
        sites = list(example["norms"])[:most]
        yield f"example {printable(str(example['id']))}: {example['length']} tokens; L2 norms of {', '.join(sites)}"
        for place, token in enumerate(example["tokens"]):
            norms = "".join(f"{example['norms'][site][place]:>10.3f}" for site in sites)
            yield f"  {place:>4} {printable(token):<20}{norms}"


def exported(folder: Path) -> Json:
    """The files of an export."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    return {"path": str(folder), "bytes": sum(sizes.values()), "files": sizes}


def exported_lines(found: Json) -> Iterable[str]:
    """The same for people."""
    yield f"{found['path']}: {len(found['files'])} files, {megabytes(found['bytes'])}"


def printable(text: str) -> str:
    """Text that does nothing to a terminal: control characters and the like are shown as escapes."""
    return "".join(char if unicodedata.category(char)[0] != "C" else ascii(char)[1:-1] for char in text)


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _of_model(model: Json) -> Iterator[str]:
    """Class and name, parameters and dtypes, as far as a run has them: whoever made it may have said anything."""
    yield " ".join(str(model[key]) for key in ("class", "name") if model.get(key))
    parameters, kinds = model.get("parameters"), model.get("dtype")
    if type(parameters) is int and 0 <= parameters < 1 << 63:
        yield f"{parameters / 1e6:.1f} M parameters"
    if isinstance(kinds, list):
        yield ", ".join(map(str, kinds))


def _part(part: Any) -> Json:
    state = "closed" if part.closed else "open"
    return {
        "name": part.name,
        "kind": part.document.kind,
        f"{part.key_table}s": part.examples,
        "commits": part.commits,
        "state": state,
    }


def _column(column: Column, nonfinite: int) -> Json:
    dtype = "text" if column.dtype == object else column.dtype.name
    short = column.name.partition("/")[2]
    cost = column.quantization
    return {
        "name": short,
        "dtype": dtype,
        "shape": list(column.shape),
        "bytes": column.nbytes,
        "compress": column.compress,
        "stored_bytes": column.stored_bytes,
        "quantization": None if cost is None else {"relative_rms": cost.relative_rms, "largest_error": cost.largest_error},
        "nonfinite": nonfinite,
    }


def _notes(column: Json) -> Iterator[str]:
    """What else there is to say of a column."""
    if column["compress"] != "none":
        yield f"  {column['compress']}: {megabytes(column['stored_bytes'])} stored"
    if column["quantization"]:
        yield f"  int8: relative RMS error {100 * column['quantization']['relative_rms']:.2g} %"
    if column["nonfinite"]:
        yield f"  {column['nonfinite']} rows with NaN or infinity"


def _nonfinite(run: Run) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in run.parts:
        for name, count in part.nonfinite.items():
            found[name] = found.get(name, 0) + count
    return found


def _amplification(run: Run) -> float:
    """Bytes written to shards, rewritten tails included, per byte of the shards that are there."""
    return sum(part.written for part in run.parts) / max(run.stored_bytes, 1)


def _example(run: Run, number: int, columns: list[Column], most: int, tokenizer: Any) -> Json:
    norms = {column.name.partition("/")[2]: _norms(column[number][:most]) for column in columns if column.present[number]}
    ids = run["token/input_ids"][number].tolist() if "input_ids" in run.tables.get("token", {}) else []
    length = len(ids) or max((len(column[number]) for column in columns if column.present[number]), default=0)
    shown = [tokenizer.decode([token]) for token in ids[:most]] if tokenizer is not None else [str(token) for token in ids[:most]]
    names = shown or [""] * min(most, length)
    return {"id": run.ids[number], "length": length, "tokens": names, "norms": norms}


def _norms(rows: Any) -> list[float]:
    found: list[float] = np.linalg.norm(rows.reshape(len(rows), -1).astype(np.float64), axis=1).tolist()
    return found
