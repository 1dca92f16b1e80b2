"""Recorded gradients as analyses need them: one column, of single examples, beside the activations they belong to."""

from __future__ import annotations

from typing import Literal

from tensortape.stores import Column, Run
from tensortape.stores.errors import GradientError, UnknownColumnError
from tensortape.stores.patterns import Pattern
from tensortape.stores.selection import is_companion, site_name

Assume = Literal["sum"] | None


def gradient_at(run: Run, site: str, target: str = "loss", *, assume: Assume = None) -> Column:
    """The gradient of a target with respect to a site, each example's own.

    Args:
        run: an open run.
        site: the site it was differentiated with respect to: a name or a pattern, as for `Run.select`, without `.grad`.
        target: what was differentiated.
        assume: `sum` takes gradients of an undeclared reduction as they are.

    Raises:
        UnknownColumnError: no gradient, or more than one, is of that site and target.
        GradientError: nobody has said how the target joins the examples of its batch.
    """
    every = [column for column in run.sites if site_name(column).is_gradient and not is_companion(column)]
    found = [column for column in every if site_name(column).target == target and _is_of(Pattern(site), column, run)]
    if len(found) != 1:
        names = ", ".join(column.name for column in found or every) or "none; record sites=['resid_post:out.grad'] with targets="
        said = "they are" if found else "the run has"
        raise UnknownColumnError(f"{len(found)} gradients of target {target!r} are with respect to {site!r}; {said} {names}")
    check_declared(found[0], assume)
    return found[0]


def activation_of(run: Run, gradient: Column) -> Column:
    """The activations that a gradient is with respect to, on the same rows; UnknownColumnError where they were not recorded."""
    value, reduce = site_name(gradient).value, (gradient.site or {}).get("reduce")
    for column in run.sites:
        if site_name(column) == value and (column.site or {}).get("reduce") == reduce and column.table == gradient.table:
            return column
    raise UnknownColumnError(
        f"{gradient.name!r} is recorded, but not the activations it belongs to; record {str(value)!r} in the same run"
    )


def _is_of(pattern: Pattern, column: Column, run: Run) -> bool:
    value = site_name(column).value
    if pattern.port not in (None, value.port):
        return False
    return any(map(pattern.matches_alias, run.aliases(column))) or pattern.matches_path(value)


def check_declared(column: Column, assume: Assume) -> None:
    """GradientError where nobody has said how the target of a gradient joins its examples, unless that is assumed."""
    if assume not in (None, "sum"):
        raise ValueError(f"assume is 'sum' or None, not {assume!r}")
    if (column.site or {})["target"]["reduction"] is None and assume is None:
        raise GradientError(
            f"{column.name} is the gradient of a scalar of which nobody has said how it joins the examples of its batch, so what "
            "one example's gradient is cannot be told. Declare it when recording, with recorder.target(..., reduction='sum' or "
            "'mean'), or pass assume='sum' to take the gradients as they are"
        )
