"""Sites whose principal components have yet to be found: in the run that is resumed, or on a first look at the data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensortape.stores import Run, open_run
from tensortape.stores.basis import Basis
from tensortape.stores.errors import NotARunError, SchemaError
from tensortape.stores.projected import ProjectedColumn
from tensortape.stores.selection import site_name

from .pca import PCA
from .sites import Selection, Site, Tap

Items = list[Any]  # what a selection is made of


def items_of(sites: Selection) -> Items:
    """The patterns, sites and callables of a selection."""
    return list(sites) if isinstance(sites, Sequence) and not isinstance(sites, str) else [sites]


def unfitted(items: Items) -> list[Site]:
    """The sites that are to be projected, and have nothing to be projected on yet."""
    return [item for item in items if isinstance(item, Site) and item.project is not None and not item.project.bases]


def whole(sites: Sequence[Site]) -> list[Site]:
    """The same sites with all of their rows, as fitting needs them."""
    return [replace(site, project=None, sample_tokens=None, dtype=None) for site in sites]


def fitted_on(run: Run, items: Items) -> Items:
    """The items, with components fitted on a run of whole rows where they have none."""
    return [replace(item, project=_fitted(run, item.pattern, item.project)) if unfitted([item]) else item for item in items]


def resumed(items: Items, to: str | os.PathLike[str]) -> Items:
    """The items, with the components that the run at a path was begun with; SchemaError where they were fitted to others since."""
    if not any(isinstance(item, Site) and item.project is not None for item in items):
        return items
    try:
        run = open_run(to)
    except NotARunError:
        return items
    columns = (column for column in run.sites if isinstance(column, ProjectedColumn))
    known = {(str(site_name(column)), len(column.basis.components)): column.basis for column in columns}
    return [replace(item, project=_known(item.project, known)) if isinstance(item, Site) else item for item in items]


def refuse_unfitted(taps: Sequence[Tap]) -> None:
    """ValueError for a PCA without components: a loop's first batches would have to wait for them."""
    for tap in taps:
        if tap.options.project is not None and not tap.options.project.bases:
            k, pattern = tap.options.project.k, tap.options.pattern
            raise ValueError(
                f"PCA({k}) at {pattern!r} is not fitted: record(...) fits it on the first tokens, but for a Recorder it must be "
                f"fitted before, on a small recording: Site({pattern!r}, project=PCA.from_run(run.select({pattern!r}), {k}))"
            )


def _fitted(run: Run, pattern: str, project: PCA) -> PCA:
    return PCA.from_run(run.select(pattern), project.k, fit_tokens=project.fit_tokens)


def _known(project: PCA | None, known: Mapping[tuple[str, int], Basis]) -> PCA | None:
    if project is None:
        return None
    found = {site: basis for (site, k), basis in known.items() if k == project.k}
    changed = [site for site in found.keys() & project.bases.keys() if found[site].digest != project.bases[site].digest]
    if changed:
        raise SchemaError(
            f"the run to be resumed has {changed[0]} in other components than those given; leave them out (PCA({project.k}) takes "
            "the run's own), or record to a new run"
        )
    return replace(project, bases={**found, **project.bases})
