"""The attention sites that an analysis is about, and the sizes of their matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensortape.stores import Column, Run
from tensortape.stores.attention import Attention, find
from tensortape.stores.errors import AttentionNotRecordedError
from tensortape.stores.patterns import Alias, Pattern, SiteName
from tensortape.stores.selection import is_attention

Sites = str | int | Sequence[str | int] | None


def attention_sites(run: Run, sites: Sites = None) -> list[Attention]:
    """Attention of some sites, each once, in the order they were recorded.

    Args:
        run: an open run.
        sites: a layer's number, a name out of `run.attention_sites`, or a pattern (`decoder.attention[0:4]`, `**.self_attn`), or
            several; all if not given.

    Raises:
        AttentionNotRecordedError: one of them names no attention of this run.
    """
    every = run.attention_sites
    asked = every if sites is None else [sites] if isinstance(sites, (str, int)) else sites
    wanted = {name for one in asked for name in _named(run, one)}
    if not wanted:
        raise AttentionNotRecordedError("the run holds no attention; record sites=['attention']")
    return [run.attention(name) for name in every if name in wanted]


def alias_of(attention: Attention) -> Alias:
    """What a site is in every architecture; an alias without a name where that is not known."""
    said = (_main(attention).site or {}).get("aliases") or [("", "")]
    return Alias(*said[0])


def heads_of(attention: Attention) -> int:
    """How many heads a site has."""
    return _main(attention).shape[1]


def size_of(attention: Attention, example: int) -> tuple[int, int]:
    """Queries and keys of an example; MissingExampleError where it was not recorded."""
    columns = attention.recorded.columns
    if "q" in columns:
        return len(columns["q"][example]), len(attention.recorded.need("k")[example])
    queries, keys = (int(count) for count in columns["weights|size"][example])
    return queries, keys


def _main(attention: Attention) -> Column:
    columns = attention.recorded.columns
    return columns["q"] if "q" in columns else columns["weights"]


def _named(run: Run, site: str | int) -> Iterator[str]:
    text = f"attention[{site}]" if isinstance(site, int) else site
    if text in run.attention_sites:
        return iter([text])
    pattern = Pattern(text)
    found = find(run.sites, lambda column: is_attention(column) and _fits(pattern, run.aliases(column), column.site or {}))
    if not found:
        raise AttentionNotRecordedError(f"{text!r} fits no attention site of this run; it has {', '.join(run.attention_sites)}")
    return (one.name for one in found)


def _fits(pattern: Pattern, aliases: Sequence[Alias], site: dict[str, object]) -> bool:
    name = SiteName(str(site["path"]), str(site["port"]), int(str(site["call"])))
    return any(map(pattern.matches_alias, aliases)) or pattern.matches_path(name)
