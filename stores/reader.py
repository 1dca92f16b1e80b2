"""open_run and Run: a recorded run as a snapshot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from . import commits, extension, names, projected, runs, selection
from .attention import Attention, Chosen, Part, Recorded, Saliency, find
from .batches import Batches
from .columns import Column, Table
from .derived import Derived
from .digest import digest
from .dtypes import Array
from .errors import AttentionNotRecordedError, DamagedError, GradientError, RunEndedError, UnknownColumnError
from .following import follow
from .index import Index
from .part_reader import PartReader
from .part_state import PartState, read_parts
from .patterns import Alias, Pattern
from .places import Place, place_at
from .projected import ProjectedColumn
from .reduced import KINDS, ReducedColumn
from .scaled import ScaledColumn
from .schema import Json
from .shard_cache import FETCHED_BYTES, ShardCache
from .verify import Verification, verify_place

if TYPE_CHECKING:
    import pandas as pd


def open_run(
    path: str | os.PathLike[str],
    *,
    verify: Literal["touch", "off"] = "touch",
    cache_bytes: int = FETCHED_BYTES,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """Open a run for reading, as of its last commits; it may still be being written.

    Args:
        path: the run's folder, or `s3://bucket/path`.
        verify: `touch` compares every chunk with its committed checksum when it is first read, `off` trusts the disk.
        cache_bytes: of an object store, how many fetched bytes to keep in memory.
        storage_options: of an object store, what its environment does not say: see docs/object_storage.md.

    Raises:
        NotARunError, FormatVersionError (a newer format), DamagedError (a commit record is damaged).

    >>> from tensortape.stores import RunWriter
    >>> with RunWriter("read.zarr") as writer:
    ...     writer.append(ids=[7, 8], columns={"token/state": [np.ones((3, 2)), np.zeros((5, 2))]})
    >>> run = open_run("read.zarr")
    >>> run.ids, run["token/state"].shape, run["token/state"][1].shape
    ([7, 8], (8, 2), (5, 2))
    >>> run["token/state"].rows([0, -1]).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    >>> run.add_column("example/split", ["train", "test"])
    <Column example/split text (2,)>
    >>> run.verify().ok
    True
    """
    if verify not in ("touch", "off"):
        raise ValueError(f"verify is 'touch' or 'off', not {verify!r}")
    return Run(place_at(path, storage_options=storage_options), verify=verify == "touch", cache_bytes=cache_bytes)


class Run:
    """A snapshot of a run: tables of columns, joined over its parts by key."""

    def __init__(self, place: Place, *, verify: bool = True, cache_bytes: int = FETCHED_BYTES) -> None:
        self.path = place.root
        self._verify = verify
        self._cache_bytes = cache_bytes
        self._place = place
        self._root = runs.read_root(place, place.root)
        self._document = runs.parsed_document(self._root, place.root)
        self._load()

    def _load(self) -> None:
        cache = ShardCache(self._place, self.uid, verify=self._verify, most_bytes=self._cache_bytes)
        states = read_parts(self._place, self._document.uid)
        runs.check_copies(self._root, states)
        self._parts = [PartReader(state, cache) for state in states]
        by_table = {table: [part for part in self._parts if part.state.key_table == table] for table in names.KEY_TABLES}
        self._keyed = {table: (parts, Index(parts)) for table, parts in by_table.items()}
        self.__dict__.pop("tables", None)

    @property
    def _index(self) -> Index:
        """Of the examples."""
        return self._keyed["example"][1]

    @property
    def uid(self) -> str:
        """The run's identity."""
        return self._document.uid

    @property
    def model(self) -> Json:
        """What was recorded of the model."""
        return self._document.model

    @property
    def provenance(self) -> Json:
        """Versions and settings of the recording."""
        return self._document.provenance

    @property
    def parts(self) -> list[PartState]:
        """What each part has committed."""
        return [part.state for part in self._parts]

    @property
    def last_step(self) -> int:
        """The latest training step of the step table, or where there is none of the examples; -1 outside training."""
        parts = self._keyed["step"][0] or self._keyed["example"][0]
        return max((part.last_step() for part in parts), default=-1)

    def refresh(self) -> Self:
        """See what was committed since; columns that were taken from the run before stay as they were.

        Raises:
            LostPartError: another run lies at the path now.
        """
        runs.check_is(self._place, self.uid, self.path)
        self._load()
        return self

    def wait_for(self, *, step: int, timeout: float | None = None, poll: float = 0.5) -> Self:
        """Wait until a training step is committed by a recorder that is still at work, and see it.

        Args:
            step: what `last_step` has to reach.
            timeout: seconds in which nothing is committed; None waits for ever.
            poll: seconds between looks at the run.

        Raises:
            TimeoutError. RunEndedError: every writer has closed, and no such step was reached.
        """
        for found in follow(self, timeout=timeout, poll=poll):
            if found.last_step >= step:
                break
        else:
            raise RunEndedError(f"{self.path} ended with step {self.last_step}, before step {step}; resume it, or ask for less")
        return self

    @property
    def ids(self) -> list[str] | list[int]:
        """Ids of the examples, in order."""
        found: list[str] | list[int] = self._index.keys[0].tolist()
        return found

    @property
    def keys(self) -> list[tuple[str | int, str, int]]:
        """(id, phase, step) of the examples, in order."""
        return self._index.all()

    def where(self, *, id: str | int | None = None, phase: str | None = None, step: int | None = None) -> Array:
        """Numbers of the examples whose key agrees with everything given; int64."""
        chosen = np.ones(len(self._index), bool)
        for column, wanted in zip(self._index.keys, (id, phase, step), strict=True):
            if wanted is not None:
                chosen &= np.array([value == wanted for value in column.tolist()], bool)
        return np.flatnonzero(chosen)

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Tables by name."""
        columns: dict[str, dict[str, Column]] = {}
        for name in dict.fromkeys(name for part in self._parts for name in part.state.columns):
            table, short = names.split(name)
            columns.setdefault(table, {})[short] = Column(name, *self._keyed_by(table))
        for table, short in map(names.split, self._names_of("scaled")):
            columns[table][short] = self._scaled(columns[table][short], columns)
        for table, short in map(names.split, self._names_of(projected.SITE)):
            columns[table][short] = self._projected(columns[table][short], columns[table])
        return {table: Table(table, found, self._keyed_by(table)[1]) for table, found in columns.items()}

    def _keyed_by(self, table: str) -> tuple[list[PartReader], Index]:
        """The parts a table may have rows in, and their join."""
        return self._keyed["step" if table == "step" else "example"]

    @property
    def sites(self) -> list[Column]:
        """The columns of recorded sites, in the order they were recorded."""
        order = dict.fromkeys(name for part in self._parts for name in part.state.columns)
        columns = (self.tables[table][short] for table, short in map(names.split, order))
        return [column for column in columns if column.site is not None and column.site.keys() >= selection.SITE_NAME]

    def __getitem__(self, name: str) -> Column:
        """A column by `<table>/<column>`, a recorded site by its name (`layers.3:out`), or by a pattern that fits just one.

        `<name>|mean` (max, first, last) is one row per example: what was recorded of that name, else a `ReducedColumn`.
        """
        table, slash, short = name.partition("/")
        if table in self.tables and short in self.tables[table]:
            return self.tables[table][short]
        if not any(names.split(column.name)[1] == name for column in self.sites) and name.rpartition("|")[2] in KINDS:
            return self._reduced(*name.rsplit("|", 1))
        if slash:
            raise UnknownColumnError(selection.no_such_column(name, self.tables))
        exact = [column for column in self.sites if names.split(column.name)[1] == name]
        found = exact or self.select(name)
        if len(found) > 1:
            raise UnknownColumnError(
                f"{name!r} fits {len(found)} columns ({', '.join(column.name for column in found)}); use select()"
            )
        return found[0]

    def _reduced(self, name: str, kind: str) -> Column:
        """A site recorded with this reduction, or the reduction of all of its tokens."""
        every = self.select(name) if "/" not in name else [self[name]]
        recorded = [column for column in every if (column.site or {}).get("reduce") == kind]
        whole = [column for column in every if (column.site or {}).get("reduce") is None]
        found = recorded or whole
        if len(found) != 1:
            raise UnknownColumnError(f"{name!r} fits {len(found)} columns ({', '.join(column.name for column in found)})")
        return found[0] if recorded else ReducedColumn(found[0], kind)

    def select(self, pattern: str | Sequence[str]) -> list[Column]:
        """Columns of recorded sites that a pattern, or any of several, selects, in order; UnknownColumnError if none does."""
        return selection.select(self.sites, [pattern] if isinstance(pattern, str) else list(pattern))

    def batches(
        self,
        sites: str | Sequence[str],
        batch_rows: int = 4096,
        *,
        shuffle: bool = True,
        seed: int = 0,
        buffer_rows: int | None = None,
        drop_last: bool = False,
        examples: Any = None,
    ) -> Batches:
        """Batches for training: an epoch is every row, of the examples that have all the columns, once.

        Args:
            sites: one name or pattern, as `run[...]` takes it, gives arrays [batch_rows, *feature]; a list of them, of one table,
                gives dicts of such arrays by column name.
            batch_rows: rows per batch; the last one of an epoch has what is left.
            shuffle: blocks of rows, a chunk each, come in random order into a buffer and are mixed there; else rows come in order.
            seed: the order depends on it, the epoch and what is asked of the run; not on who reads, or with how many workers.
            buffer_rows: about how many rows are mixed at a time, and held in memory; 16 batches, or 1 GiB, if not given.
            drop_last: leave out a last batch that is short.
            examples: numbers of examples (as of `where`), or a mask over them; all if not given.

        Raises:
            UnknownColumnError, MissingExampleError (no rows), SchemaError (columns of several tables; text; no whole batch).

        >>> from tensortape.stores import RunWriter
        >>> with RunWriter("batches.zarr") as writer:
        ...     writer.append(ids=["a", "b"], columns={"token/h": [np.ones((5, 3)), np.zeros((6, 3))]})
        >>> batches = open_run("batches.zarr").batches("token/h", batch_rows=4, seed=1)
        >>> [batch.shape for batch in batches], batches.epoch
        ([(4, 3), (4, 3), (3, 3)], 1)
        """
        columns = [self[sites]] if isinstance(sites, str) else self.columns(sites)
        return Batches(
            self.uid,
            columns,
            single=isinstance(sites, str),
            batch_rows=batch_rows,
            shuffle=shuffle,
            seed=seed,
            buffer_rows=buffer_rows,
            drop_last=drop_last,
            examples=examples,
        )

    def export(
        self,
        to: str | os.PathLike[str],
        format: Literal["safetensors", "npy", "sae-lens"] = "safetensors",
        *,
        sites: str | Sequence[str] | None = None,
        rows_per_file: int | None = None,
        context_size: int | None = None,
    ) -> Path:
        """Write columns into a new folder, for tools that do not read runs; the folder appears when all of it is written.

        Args:
            to: the folder.
            format: `safetensors` (bfloat16 as it is) or `npy` (one file per column; bfloat16 as uint16), with an `index.json` that
                says which rows of which column are where and an `examples.jsonl` that says whose they are; or `sae-lens`, the
                Hugging Face dataset that SAELens reads in place of a model (extra `datasets`).
            sites: names or patterns; if not given, all columns that hold numbers.
            rows_per_file: most rows per file; files of 256 MiB if not given (of `sae-lens`, 500 MB).
            context_size: of `sae-lens`, cut the rows of all examples into sequences of that many; needed where lengths differ.

        Raises:
            OutputExistsError; UnknownColumnError; SchemaError for columns the format cannot hold.

        >>> from tensortape.stores import RunWriter
        >>> with RunWriter("export.zarr") as writer:
        ...     writer.append(ids=[1], columns={"token/h": [np.ones((5, 3), np.float32)]})
        >>> folder = open_run("export.zarr").export("files", "npy")
        >>> np.load(folder / "token" / "h.npy").shape
        (5, 3)
        """
        from .exports import export

        return export(self, to, format, sites=sites, rows_per_file=rows_per_file, context_size=context_size)

    def columns(self, names: str | Sequence[str]) -> list[Column]:
        """Columns by full name, by pattern (as for `select`), or reduced (`<name>|mean`); each once, in the order asked for."""
        texts = [names] if isinstance(names, str) else names
        found = [column for text in texts for column in ([self[text]] if "/" in text or "|" in text else self.select(text))]
        return list({column.name: column for column in found}.values())

    def aliases(self, column: Column) -> list[Alias]:
        """What a recorded site is in every architecture (`resid_post` of layer 3 of 12, say)."""
        return selection.aliases_of(column)

    @property
    def attention_sites(self) -> list[str]:
        """Module paths (with `#2` and so on for later calls) with recorded attention, in call order."""
        return [found.name for found in find(self.sites, lambda column: True)]

    def attention(self, site: str | int, *, heads: Chosen = None, queries: Chosen = None, keys: Chosen = None) -> Attention:
        """Attention probabilities of a site, rebuilt or stored: `run.attention(site)[i]` is example i, [head, query, key].

        Args:
            site: a module path, an alias with a layer (`attention[3]`, `cross_attention[0]`), or a layer's number.
            heads, queries, keys: numbers, a slice or one number (which keeps its axis); only what they need is computed.

        Raises:
            AttentionNotRecordedError: none, or more than one, site of that name has attention.
        """
        return Attention(self._attention_at(site), Part(heads, queries, keys))

    def saliency(
        self,
        site: str | int,
        target: str = "loss",
        *,
        heads: Chosen = None,
        queries: Chosen = None,
        keys: Chosen = None,
        assume: Literal["sum"] | None = None,
    ) -> Saliency:
        """A * dL/dA of a site, rebuilt from q, k, v and dL/dz: `run.saliency(site)[i]` is example i, [head, query, key].

        Args:
            site, heads, queries, keys: as for `attention`.
            target: what was differentiated.
            assume: `sum` takes gradients of an undeclared reduction as they are.

        Raises:
            AttentionNotRecordedError. GradientError: nobody has said how the target joins its examples; or, for an example,
            dropout was active.
        """
        found = self._attention_at(site)
        port = f"weights.grad@{target}" if f"weights.grad@{target}" in found.columns else f"z.grad@{target}"
        said = (found.need(port).site or {})["target"]
        if said["reduction"] is None and assume is None:
            raise GradientError(
                f"{found.name}:{port} is the gradient of a scalar of which nobody has said how it joins the examples of its batch, "
                "so what one example's gradient is cannot be told. Declare it when recording, with recorder.target(..., "
                "reduction='sum' or 'mean'), or pass assume='sum' to take the gradients as they are"
            )
        return Saliency(found, Part(heads, queries, keys), target)

    def _attention_at(self, site: str | int) -> Recorded:
        every = find(self.sites, lambda column: True)
        text = f"attention[{site}]" if isinstance(site, int) else site
        exact = [found for found in every if found.name == text]
        pattern = Pattern(text)
        found = exact or find(
            self.sites,
            lambda column: any(map(pattern.matches_alias, selection.aliases_of(column))) and selection.is_attention(column),
        )
        if len(found) != 1:
            names = ", ".join(one.name for one in found or every) or "none"
            raise AttentionNotRecordedError(
                f"{text!r} fits {len(found)} of the attention sites of this run; {'it fits' if found else 'it has'} {names}"
            )
        return found[0]

    @property
    def examples(self) -> pd.DataFrame:
        """The example table's columns of one value each."""
        return self._frame("example")

    @property
    def tokens(self) -> pd.DataFrame:
        """The token table's columns of one value each."""
        return self._frame("token")

    @property
    def steps(self) -> pd.DataFrame:
        """The step table's columns of one value each, by step (and by rank, where several have written steps)."""
        frame = self._frame("step")
        if not len(frame):
            return frame.reindex(columns=["step"])
        fractions = [name for name in map(str, frame) if self.tables["step"][name].dtype.kind == "f"]
        frame = frame.astype(dict.fromkeys(fractions, float))  # NaN, rather than None, where a step has no value
        frame = frame[sorted(frame, key=_place_in_steps)]
        frame.insert(1, "rank", self._keyed["step"][1].keys[0])
        found = frame.sort_values(["step", "rank"], ignore_index=True)
        return found if found["rank"].nunique() > 1 else found.drop(columns="rank")

    def add_column(self, name: str, values: Any, *, ids: Any = None) -> Column:
        """Add a column beside the recorded ones, as an extension part; the run then shows it.

        Args:
            name: `<table>/<column>`, new to the run.
            values: one entry per example in the run's order (or that of `ids`): an array of T_i rows for ragged tables, a value or
                text for `example`; for ragged tables also one packed array [rows, *feature].
            ids: the examples that get a value, if not all.
        """
        if name.partition("/")[2] in self.tables.get(name.partition("/")[0], {}):
            raise extension.exists(name)
        parts, index = self._keyed["example"]
        extension.add(self._place, self._document, index, [part.state for part in parts], name, values, ids)
        self._load()
        return self[name]

    def verify(self, *, quick: bool = False) -> Verification:
        """Read every committed byte (`quick`: look at sizes only) and compare it with its commit record."""
        return verify_place(self._place, quick=quick)

    def digest(self) -> str:
        """SHA-256 of all keys, lengths and values, by key: the same for runs that hold the same, however they came about."""
        tables: dict[str, list[Column]] = {table: [] for table in names.KEY_TABLES}
        for table, columns in self.tables.items():
            tables["step" if table == "step" else "example"] += columns.values()
        keyed = {table: index.all() for table, (_, index) in self._keyed.items() if table == "example" or len(index)}
        return digest([(every, tables[table]) for table, every in keyed.items()])

    def asset(self, name: str) -> bytes:
        """A file kept beside the tables; FileNotFoundError without one, DamagedError if it is not the one that was written."""
        file = name if name in self._place.names("assets") else names.to_disk(name)
        content = self._place.read(f"assets/{file}")
        stated = {digest for part in self.parts for kept, digest in part.assets.items() if kept == file}
        if stated and commits.digest(content) not in stated:
            raise DamagedError(f"assets/{file}: the file is not the one that was written")
        return content

    @property
    def assets(self) -> list[str]:
        """Names of the files kept beside the tables (of those that were cut, the name on disk)."""
        return [name if "~~" in name else names.from_disk(name) for name in self._place.names("assets")]

    @property
    def derived(self) -> Derived:
        """Numbers computed from the run that are kept in it."""
        return Derived(self._place)

    @property
    def nbytes(self) -> int:
        """Bytes of all values of all columns, before compression."""
        return sum(column.nbytes for table in self.tables.values() for column in table.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the files they are in, checksums and indices included."""
        return sum(column.stored_bytes for table in self.tables.values() for column in table.values())

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        commits = sum(part.commits for part in self.parts)
        state = "closed" if all(part.closed for part in self.parts) else "open"
        head = f"<Run {self.path}: {len(self)} examples, {self.nbytes / 1e6:.1f} MB, {commits} commits, {state}>"
        return "\n".join([head, *(f"  {self._described(table)}" for table in self.tables.values())])

    def _names_of(self, kind: str) -> set[str]:
        """Columns whose site says this of them in any part; parts that disagree on a column are no matter here."""
        schemas = ((name, schema) for part in self._parts for name, schema in part.state.columns.items())
        return {name for name, schema in schemas if (schema.site or {}).get(kind)}

    def _scaled(self, column: Column, columns: dict[str, dict[str, Column]]) -> ScaledColumn:
        found = ScaledColumn(column.name, *self._keyed["example"])
        scale = f"{names.split(column.name)[1]}|scale"
        if scale not in columns["example"]:
            raise DamagedError(f"column {column.name!r} is said to be scaled, but the run has no 'example/{scale}'")
        found.scale = columns["example"][scale]
        return found

    def _projected(self, column: Column, beside: dict[str, Column]) -> ProjectedColumn:
        found = ProjectedColumn(column.name, *self._keyed["example"])
        found.place, found.beside = self._place, beside
        return found

    def _described(self, table: Table) -> str:
        shown = [name for name in table if not name.startswith(("start.", "length."))]
        more = f", ... ({len(shown)} columns)" if len(shown) > 6 else ""
        return f"{table.name} [{table.rows}]: {', '.join(shown[:6])}{more}"

    def _frame(self, table: str) -> pd.DataFrame:
        import pandas as pd

        return self.tables[table].to_pandas() if table in self.tables else pd.DataFrame()


def _place_in_steps(name: Any) -> int:
    """Where a column of the step table is shown: what loops say comes before what was recorded of parameters."""
    first = ("step", "loss", "lr")
    return first.index(name) if name in first else len(first) + str(name).startswith("param.")
