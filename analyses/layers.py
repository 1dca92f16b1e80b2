"""What a recorded site is called beside its full name."""

from __future__ import annotations

from tensortape.stores import Column
from tensortape.stores.selection import aliases_of, site_name


def layer_of(column: Column) -> int | None:
    """The layer, None for a site that belongs to none."""
    return next((alias.layer for alias in aliases_of(column) if alias.layer is not None), None)


def short_name(column: Column) -> str:
    """A name for pictures: what the site is in every architecture (`resid_post 3`), else the end of its module's path."""
    for alias in aliases_of(column):
        stack = f"{alias.stack} " if alias.stack else ""
        return f"{stack}{alias.name}{'' if alias.layer is None else f' {alias.layer}'}"
    site = site_name(column)
    return f"{site.path.rpartition('.')[2]}{'' if site.port == 'out' else f':{site.port}'}"
