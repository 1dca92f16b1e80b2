"""From what users select to the modules that are tapped."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from tensortape.stores import codecs, quantize
from tensortape.stores.errors import SchemaError
from tensortape.stores.patterns import FACT_PORTS, Alias, Pattern, SiteName, parse_site

from . import layouts, parameter_reductions
from .anatomy import aliased_sites, stacks
from .errors import SiteNotFoundError
from .layouts import Layout
from .modules import all_names, named
from .pca import PCA
from .reduce import REDUCTIONS
from .sampling import Sample

Reduction = Literal["mean", "max", "first", "last", "entropy", "received", "flow", "norm", "row_norm", "cosine", "random"]
OF_WEIGHTS = ("entropy", "received", "flow")


@dataclass(frozen=True)
class Site:
    """A pattern with options.

    Args:
        pattern: a module path, glob, `re:` expression, alias or TransformerLens name.
        layout: which axis is what (`example token ...` and so on) where it cannot be inferred.
        reduce: store one row per example instead of all: its mean, max, first or last token; the column is named `<site>|<reduce>`.
            Of `weights`: `entropy` in nats per query and head, `received` mass per key and head, `flow` between segments.
        dtype: cast to this dtype before storing (`float16`, `bfloat16`, `float32`); by default what the model computed.
        compress: store compressed without loss, as `lz4` or `zstd`.
        quantize: `int8` stores float16, bfloat16 and float32 as codes with a scale per row, a few outlying features exactly; the
            column then says what that has cost.
        positions: store only these tokens of each example (-1 is the last): rows [chosen, *feature], one per example; NaN (-1 for
            integers) where an example is too short. The column is named `<site>|positions=<numbers>`.
        sample_tokens: store only this share of each example's tokens, in a table of their own; see `Sample`. Sites with the same
            share and seed have the same tokens. The column is named `<site>|sample<share>.seed<seed>`.
        sample_seed: another seed draws other tokens.
        project: store coordinates in the site's first k principal components (`PCA(k)`) and the norm of the rest instead of whole
            rows. The columns are named `<site>|pca<k>` and `<site>|pca<k>|residual`.
        missing: `error` if the module does not run in some batch, or `absent`: the column then has a table of its own in which such
            examples own no rows.
        store: of `attention`, what to keep: `qk` (queries and keys; the weights themselves only where they cannot be rebuilt from
            those), `weights`, or `auto`: whichever takes fewer bytes in the first batch (queries and keys do where
            T > d (H + Hkv) / H).
        queries, keys: of `weights`, only these tokens of each example (-1 is the last): rows per key, or per query.
        segments: of `flow`, how many segments the label `token/segment` tells apart.
        width: of `reduce="random"`, how many numbers.
        gather: of a parameter that is sharded over ranks, bring all of it together on each (all ranks must record); else each rank
            records the norm of its share.

    Of parameters (`param.<name>.grad`, `.clipped`, `.update`, `.value`), `reduce` is `norm`, `row_norm` (of each row, over all axes
    but the first), `cosine` (with the one recorded before) or `random` (a random projection that keeps inner products on average).
    """

    pattern: str
    layout: str | None = None
    reduce: Reduction | None = None
    dtype: str | None = None
    missing: Literal["error", "absent"] = "error"
    store: Literal["qk", "weights", "auto"] = "qk"
    queries: Sequence[int] | None = None
    keys: Sequence[int] | None = None
    segments: int | None = None
    positions: Sequence[int] | None = None
    sample_tokens: float | None = None
    sample_seed: int = 0
    compress: str | None = None
    quantize: str | None = None
    project: PCA | None = None
    width: int = 256
    gather: bool = False

    def __post_init__(self) -> None:
        self.pinned_layout, self.sample  # noqa: B018 - refuse an unknown layout, and no share, where they are written
        codecs.check(self.compress)
        quantize.check(self.quantize)
        known = parameter_reductions.KINDS if self._is_of_parameters else OF_WEIGHTS if self._is_of_weights else REDUCTIONS
        if self.reduce is not None and self.reduce not in known:
            raise ValueError(f"reduce is one of {', '.join(known)} at {self.pattern!r}, not {self.reduce!r}")
        if self.store not in ("qk", "weights", "auto"):
            raise ValueError(f"store is 'qk', 'weights' or 'auto', not {self.store!r}")
        if (self.queries is not None or self.keys is not None) and not self._is_of_weights:
            raise ValueError(f"queries= and keys= choose among weights; {self.pattern!r} is something else")
        self._check_rows()
        self._check_parameters()
        if self.missing == "absent" and self.dtype == "float16" and self._is_of_gradient:
            raise ValueError(
                "gradients in float16 have a scale per example, which missing='absent' leaves no place for; use bfloat16"
            )
        if (self.reduce == "flow") != (self.segments is not None):
            raise ValueError("reduce='flow' and segments= (how many the label token/segment tells apart) need each other")
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype names a torch dtype such as 'float16', not {self.dtype!r}")
        if self.missing not in ("error", "absent"):
            raise ValueError(f"missing is 'error' or 'absent', not {self.missing!r}")

    def _check_rows(self) -> None:
        """ValueError for ways to choose or shorten rows that do not go together."""
        if self.positions is not None and (self.reduce is not None or self._is_of_attention):
            raise ValueError("positions= picks tokens of a module's input or output, and goes without reduce=")
        whole = self.reduce is None and self.positions is None and not self._is_of_attention
        if self.sample_tokens is not None and (not whole or self.missing == "absent"):
            raise ValueError(
                "sample_tokens= draws tokens of a module's input or output, and goes without reduce=, positions=, missing='absent'"
            )
        if self.project is not None and (not whole or self._is_of_gradient):
            raise ValueError("project= is for a module's input or output, and goes without reduce= and positions=")

    def _check_parameters(self) -> None:
        """ValueError for options that parameters have and activations have not, or the reverse."""
        others = {name for name, value in vars(self).items() if value != getattr(Site, name, None)} - {"pattern", "reduce", "dtype"}
        own = {"width", "gather", "sample_seed"}
        if self._is_of_parameters and others - own:
            raise ValueError(f"{', '.join(sorted(others - own))}= are for activations; {self.pattern!r} selects parameters")
        if not self._is_of_parameters and others & (own - {"sample_seed"}):
            raise ValueError(f"width= and gather= are for parameters (param.<name>.grad); {self.pattern!r} is something else")
        if self.width < 1:
            raise ValueError(f"width= is how many numbers a random projection has, not {self.width!r}")

    @property
    def suffix(self) -> str:
        """Of a parameter, what its column's name ends in."""
        width = f"{self.width}.seed{self.sample_seed}" if self.reduce == parameter_reductions.RANDOM else ""
        return f"|{self.reduce}{width}" if self.reduce else ""

    @property
    def _is_of_parameters(self) -> bool:
        return self.pattern.startswith("param.")

    @property
    def sample(self) -> Sample | None:
        """The tokens asked for, where not all are."""
        return None if self.sample_tokens is None else Sample(self.sample_tokens, self.sample_seed)

    @property
    def _is_of_attention(self) -> bool:
        pattern = Pattern(self.pattern)
        return pattern.is_attention or SiteName("", pattern.port or "out").is_attention

    @property
    def _is_of_gradient(self) -> bool:
        return SiteName("", Pattern(self.pattern).port or "out").is_gradient

    @property
    def _is_of_weights(self) -> bool:
        return Pattern(self.pattern).port == "weights"

    @property
    def pinned_layout(self) -> Layout | None:
        """The layout asked for."""
        return None if self.layout is None else layouts.parse(self.layout)


Choose = Callable[[str, nn.Module], "str | Iterable[str] | bool | None"]
Selection = str | Site | Choose | Sequence["str | Site | Choose"]


@dataclass(frozen=True)
class Tap:
    """One thing to capture: a port of a module, at one of its calls or (call None) at every one.

    A port of attention is captured at every attention call in the module or below it; of cross-attention only if `cross`.
    """

    path: str
    port: str
    call: int | None
    options: Site
    cross: bool = False

    def name(self, call: int) -> SiteName:
        """The site's name for one call."""
        return SiteName(self.path, self.port, call)

    @cached_property
    def site(self) -> SiteName:
        """The site's name for the call asked for, or the first."""
        return self.name(self.call or 1)

    @cached_property
    def asked(self) -> str:
        """What was asked for, in the words that recorded columns keep."""
        plain = Site(self.options.pattern, compress=self.options.compress, quantize=self.options.quantize)  # not what, but how
        options = {name: value for name, value in vars(self.options).items() if value != getattr(plain, name)}
        return json.dumps([self.path, self.port, self.call, self.cross, options], default=repr)

    def covers(self, path: str, call: int) -> bool:
        """Whether an attention call of this module is one of those asked for."""
        return self.call in (None, call) and (not self.path or path == self.path or path.startswith(f"{self.path}."))

    def takes(self, site: SiteName) -> bool:
        """Whether a captured site is (part of) what was asked for."""
        if self.call not in (None, site.call):
            return False
        if not self.site.is_attention:
            return (self.path, self.port) in ((site.path, site.port), (site.path, site.port.partition("@")[0]))
        return self.covers(site.path, site.call) and site.base in _parts(self.site) and site.is_gradient == self.site.is_gradient


def _parts(site: SiteName) -> tuple[str, ...]:
    """Ports that show that a port of attention was captured."""
    if site.base != "attention":
        return (site.base,)
    return ("z", "weights") if site.is_gradient else ("q", "weights")


def resolve(model: nn.Module, selection: Selection) -> list[Tap]:
    """The taps that a selection asks for, in the model's order, each once; SiteNotFoundError for a pattern that matches nothing."""
    items = [selection] if isinstance(selection, (str, Site)) or callable(selection) else list(selection)
    modules, names = dict(named(model)), all_names(model)
    aliased = aliased_sites(model)
    found: dict[tuple[Any, ...], Tap] = {}
    for item in items:
        for tap in _taps(item, model, modules, names, aliased):
            _add(found, tap)
    if not found:
        raise SiteNotFoundError("no site is selected; give sites=['resid_post'], for instance")
    _check_calls(list(found.values()))
    order = {path: place for place, path in enumerate(modules)}
    return sorted(found.values(), key=lambda tap: (order[tap.path], tap.port, tap.call or 0))


def aliases_by_site(model: nn.Module) -> dict[SiteName, list[Alias]]:
    """What each site is in every architecture."""
    found: dict[SiteName, list[Alias]] = {}
    for alias, site in aliased_sites(model):
        found.setdefault(site, []).append(alias)
    return found


def _taps(
    item: str | Site | Choose,
    model: nn.Module,
    modules: dict[str, nn.Module],
    names: dict[str, str],
    aliased: list[tuple[Alias, SiteName]],
) -> Iterator[Tap]:
    if not isinstance(item, (str, Site)):
        yield from _chosen(item, modules)
        return
    options = Site(item) if isinstance(item, str) else item
    pattern = Pattern(options.pattern)
    by_path = list(_by_path(pattern, names, options))
    found = [*_by_alias(pattern, aliased, options), *(by_path or _of_attention(pattern, model, options))]
    if not found:
        raise SiteNotFoundError(_nothing(options.pattern, names, aliased))
    yield from found


def _by_alias(pattern: Pattern, aliased: list[tuple[Alias, SiteName]], options: Site) -> Iterator[Tap]:
    shared = _repeated(aliased)
    for alias, site in aliased:
        port = pattern.port or site.port
        if pattern.matches_alias(alias) and port.partition(".grad")[0] == site.port:
            yield Tap(site.path, port, site.call if site.path in shared else None, options)


def _of_attention(pattern: Pattern, model: nn.Module, options: Site) -> Iterator[Tap]:
    """`attention`, `attention.grad`, `weights` and `cross_attention`, at every attention call or at those of some layers."""
    if not pattern.is_attention:
        return
    port = pattern.port or "attention"
    cross = pattern.is_cross_attention
    if pattern.is_everywhere:
        yield Tap("", port, None, options, cross)
        return
    name = "cross_attention" if cross else "attention"
    for stack in stacks(model):
        paths = [block.path for block in stack.blocks]
        for layer, block in enumerate(stack.blocks):
            if pattern.matches_alias(Alias(stack.name, name, layer, len(paths))):
                yield Tap(block.path, port, block.call if paths.count(block.path) > 1 else None, options, cross)


def _repeated(aliased: list[tuple[Alias, SiteName]]) -> set[str]:
    """Modules of which single calls are told apart."""
    return {site.path for _, site in aliased if site.call > 1}


def _by_path(pattern: Pattern, names: dict[str, str], options: Site) -> Iterator[Tap]:
    for path, first in names.items():
        for port in ("out", "in") if pattern.text.startswith("re:") else (pattern.port or "out",):
            call = _call(pattern.text)
            if pattern.matches_path(SiteName(path, port, call or 1)):
                yield Tap(first, _asked(port), call, options)


def _call(text: str) -> int | None:
    digits = text.partition("#")[2].partition(":")[0]
    return int(digits) if digits.isdigit() else None


def _chosen(choose: Choose, modules: dict[str, nn.Module]) -> Iterator[Tap]:
    for path, module in modules.items():
        ports = choose(path, module)
        for port in ("out",) if ports is True else (ports,) if isinstance(ports, str) else ports or ():
            yield Tap(path, _asked(parse_site(f"{path}:{port}").port), None, Site(f"{path}:{port}"))


def _asked(port: str) -> str:
    """A port that users may ask for; SchemaError for one that is recorded beside others only."""
    if SiteName("", port).base in FACT_PORTS:
        raise SchemaError(f"there is no port {port!r} to ask for: it is recorded with 'attention'")
    return port


def _tuple(numbers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(numbers)


def _rows_of(options: Site) -> tuple[Any, ...]:
    """What tells several columns of one site apart."""
    chosen = (_tuple(numbers) for numbers in (options.queries, options.keys, options.positions))
    return (options.reduce, *chosen, options.sample, options.project and options.project.k)


def _add(found: dict[tuple[Any, ...], Tap], tap: Tap) -> None:
    earlier = found.setdefault((tap.path, tap.port, tap.call, tap.cross, _rows_of(tap.options)), tap)
    _agree(earlier, tap)


def _check_calls(taps: list[Tap]) -> None:
    """A single call that is also selected with all calls must agree with them on its options."""
    every = {(tap.path, tap.port, _rows_of(tap.options)): tap for tap in taps if tap.call is None}
    for tap in taps:
        whole = every.get((tap.path, tap.port, _rows_of(tap.options)), tap)
        _agree(whole, tap)


def _agree(one: Tap, other: Tap) -> None:
    names = ("layout", "dtype", "missing", "store", "compress", "quantize", "project")
    if any(getattr(one.options, name) != getattr(other.options, name) for name in names):
        name = other.name(other.call or 1)
        raise ValueError(f"site {name} is selected twice with different options: {one.options} and {other.options}")


def _nothing(pattern: str, names: dict[str, str], aliased: list[tuple[Alias, SiteName]]) -> str:
    known = [path for path in names if path]
    known += sorted({alias.name if alias.layer is None else f"{alias.name}[{alias.layer}]" for alias, _ in aliased})
    return f"site {pattern!r} matches nothing in the model; the closest names are {', '.join(map(repr, nearest(pattern, known)))}"


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """The three names that are most like what was asked for."""
    return difflib.get_close_matches(name, known, n=3, cutoff=0.0)
