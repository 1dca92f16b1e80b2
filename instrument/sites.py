"""From what users select to the modules that are tapped."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tensortape.stores.patterns import Alias, Pattern, SiteName, parse_site

from . import layouts
from .anatomy import aliased_sites
from .errors import SiteNotFoundError
from .layouts import Layout
from .modules import all_names, named
from .reduce import REDUCTIONS

Reduction = Literal["mean", "max", "first", "last"]


@dataclass(frozen=True)
class Site:
    """A pattern with options.

    Args:
        pattern: a module path, glob, `re:` expression, alias or TransformerLens name.
        layout: which axis is what (`example token ...` and so on) where it cannot be inferred.
        reduce: store one row per example instead of all: its mean, max, first or last token; the column is named `<site>|<reduce>`.
        dtype: cast to this dtype before storing (`float16`, `bfloat16`, `float32`); by default what the model computed.
        missing: `error` if the module does not run in some batch, or `absent`: the column then has a table of its own in which such
            examples own no rows.
    """

    pattern: str
    layout: str | None = None
    reduce: Reduction | None = None
    dtype: str | None = None
    missing: Literal["error", "absent"] = "error"

    def __post_init__(self) -> None:
        self.pinned_layout  # noqa: B018 - refuses an unknown layout where it is written
        if self.reduce is not None and self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce is one of {', '.join(REDUCTIONS)}, not {self.reduce!r}")
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype names a torch dtype such as 'float16', not {self.dtype!r}")
        if self.missing not in ("error", "absent"):
            raise ValueError(f"missing is 'error' or 'absent', not {self.missing!r}")

    @property
    def pinned_layout(self) -> Layout | None:
        """The layout asked for."""
        return None if self.layout is None else layouts.parse(self.layout)


Choose = Callable[[str, nn.Module], "str | Iterable[str] | bool | None"]
Selection = str | Site | Choose | Sequence["str | Site | Choose"]


@dataclass(frozen=True)
class Tap:
    """One thing to capture: a port of a module, at one of its calls or (call None) at every one."""

    path: str
    port: str
    call: int | None
    options: Site

    def name(self, call: int) -> SiteName:
        """The site's name for one call."""
        return SiteName(self.path, self.port, call)


def resolve(model: nn.Module, selection: Selection) -> list[Tap]:
    """The taps that a selection asks for, in the model's order, each once; SiteNotFoundError for a pattern that matches nothing."""
    items = [selection] if isinstance(selection, (str, Site)) or callable(selection) else list(selection)
    modules, names = dict(named(model)), all_names(model)
    aliased = aliased_sites(model)
    found: dict[tuple[str, str, int | None, str | None], Tap] = {}
    for item in items:
        for tap in _taps(item, modules, names, aliased):
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
    item: str | Site | Choose, modules: dict[str, nn.Module], names: dict[str, str], aliased: list[tuple[Alias, SiteName]]
) -> Iterator[Tap]:
    if not isinstance(item, (str, Site)):
        yield from _chosen(item, modules)
        return
    options = Site(item) if isinstance(item, str) else item
    pattern = Pattern(options.pattern)
    found = [*_by_alias(pattern, aliased, options), *_by_path(pattern, names, options)]
    if not found:
        raise SiteNotFoundError(_nothing(options.pattern, names, aliased))
    yield from found


def _by_alias(pattern: Pattern, aliased: list[tuple[Alias, SiteName]], options: Site) -> Iterator[Tap]:
    shared = _repeated(aliased)
    for alias, site in aliased:
        if pattern.matches_alias(alias) and pattern.port in (None, site.port):
            yield Tap(site.path, site.port, site.call if site.path in shared else None, options)


def _repeated(aliased: list[tuple[Alias, SiteName]]) -> set[str]:
    """Modules of which single calls are told apart."""
    return {site.path for _, site in aliased if site.call > 1}


def _by_path(pattern: Pattern, names: dict[str, str], options: Site) -> Iterator[Tap]:
    for path, first in names.items():
        for port in ("out", "in") if pattern.text.startswith("re:") else (pattern.port or "out",):
            call = _call(pattern.text)
            if pattern.matches_path(SiteName(path, port, call or 1)):
                yield Tap(first, port, call, options)


def _call(text: str) -> int | None:
    digits = text.partition("#")[2].partition(":")[0]
    return int(digits) if digits.isdigit() else None


def _chosen(choose: Choose, modules: dict[str, nn.Module]) -> Iterator[Tap]:
    for path, module in modules.items():
        ports = choose(path, module)
        for port in ("out",) if ports is True else (ports,) if isinstance(ports, str) else ports or ():
            parse_site(f"{path}:{port}")  # refuses a port that there is not
            yield Tap(path, port, None, Site(f"{path}:{port}"))


def _add(found: dict[tuple[str, str, int | None, str | None], Tap], tap: Tap) -> None:
    key = (tap.path, tap.port, tap.call, tap.options.reduce)
    earlier = found.setdefault(key, tap)
    _agree(earlier, tap)


def _check_calls(taps: list[Tap]) -> None:
    """A single call that is also selected with all calls must agree with them on its options."""
    every = {(tap.path, tap.port, tap.options.reduce): tap for tap in taps if tap.call is None}
    for tap in taps:
        whole = every.get((tap.path, tap.port, tap.options.reduce), tap)
        _agree(whole, tap)


def _agree(one: Tap, other: Tap) -> None:
    options = [(tap.options.layout, tap.options.dtype, tap.options.missing) for tap in (one, other)]
    if options[0] != options[1]:
        name = other.name(other.call or 1)
        raise ValueError(f"site {name} is selected twice with different options: {one.options} and {other.options}")


def _nothing(pattern: str, names: dict[str, str], aliased: list[tuple[Alias, SiteName]]) -> str:
    known = [path for path in names if path]
    known += sorted({alias.name if alias.layer is None else f"{alias.name}[{alias.layer}]" for alias, _ in aliased})
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
    return f"site {pattern!r} matches nothing in the model; the closest names are {', '.join(map(repr, near))}"
