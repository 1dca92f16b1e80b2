"""Parameters of a model while it trains: gradients before and after clipping, values and updates, one row per step.

`param.<name>.grad`      the gradient when all backwards of the step are done: before clipping, without a GradScaler's scale
`param.<name>.clipped`   the gradient as the optimizer saw it
`param.<name>.update`    what the step added to the parameter
`param.<name>.value`     the parameter after the step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tensortape.stores.patterns import Pattern, SiteName

from . import parameter_reductions as reductions
from .errors import SiteNotFoundError
from .modules import clean_name
from .sites import Site, nearest
from .taps import on_gradient

PREFIX = "param."
KINDS = ("grad", "clipped", "update", "value")


@dataclass
class ParameterTap:
    """One thing to record of one parameter."""

    name: str
    parameter: nn.Parameter
    kind: str
    options: Site
    cosine: reductions.Cosine = field(default_factory=reductions.Cosine)

    @property
    def column(self) -> str:
        """Its column in the step table."""
        return f"{PREFIX}{self.name}.{self.kind}{self.options.suffix}"

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """What is stored of these values."""
        options, values = self.options, self._local(values.detach())
        if options.reduce == reductions.NORM:
            return reductions.norm(values)
        if options.reduce == reductions.ROW_NORM:
            return reductions.row_norm(values)
        if options.reduce == reductions.COSINE:
            return self.cosine(values)
        if options.reduce == reductions.RANDOM:
            return reductions.random_projection(self.name, options.width, options.sample_seed)(values)
        return values.clone() if options.dtype is None else values.to(getattr(torch, options.dtype), copy=True)

    def _local(self, values: torch.Tensor) -> torch.Tensor:
        """The tensor itself; of one that is sharded over ranks, all of it or this rank's share."""
        if not hasattr(values, "full_tensor"):
            return values
        whole: torch.Tensor = values.full_tensor() if self.options.gather else values.to_local()  # type: ignore[attr-defined]
        return whole


def is_of_parameters(item: Any) -> bool:
    """Whether an item of a selection selects parameters."""
    text = item.pattern if isinstance(item, Site) else item
    return isinstance(text, str) and text.startswith(PREFIX)


def resolve_parameters(model: nn.Module, items: Sequence[str | Site]) -> list[ParameterTap]:
    """What a selection asks for of the parameters that require gradients, in the model's order; SiteNotFoundError for nothing."""
    named = {clean_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, ParameterTap] = {}
    for item in items:
        options = Site(item) if isinstance(item, str) else item
        for tap in _taps(options, named):
            found.setdefault(tap.column, tap)
    return list(found.values())


def _taps(options: Site, named: dict[str, nn.Parameter]) -> list[ParameterTap]:
    path, _, kind = options.pattern.removeprefix(PREFIX).rpartition(".")
    if kind not in KINDS:
        raise SiteNotFoundError(
            f"{options.pattern!r} names no port of a parameter; write 'param.<name>.' and one of {', '.join(KINDS)}"
        )
    pattern = Pattern(path)
    found = [
        ParameterTap(name, parameter, kind, options) for name, parameter in named.items() if pattern.matches_path(SiteName(name))
    ]
    _refuse_shares(found)
    if not found:
        close = ", ".join(f"{PREFIX}{name}.{kind}" for name in nearest(path, list(named))) or "none"
        raise SiteNotFoundError(f"{options.pattern!r} matches no parameter that requires a gradient; closest: {close}")
    return found


def _refuse_shares(taps: Sequence[ParameterTap]) -> None:
    """ValueError for more than the norm of a rank's share of a parameter: ranks would have columns of other shapes."""
    for tap in taps:
        if hasattr(tap.parameter, "full_tensor") and not tap.options.gather and tap.options.reduce != reductions.NORM:
            raise ValueError(
                f"parameter {tap.name!r} is sharded over ranks: record the norm of each rank's share (reduce='norm'), or all of it "
                f"with Site({tap.options.pattern!r}, gather=True)"
            )


class ParameterTaps:
    """Takes what is asked for while one training step is under way.

    Args:
        scale: gives the GradScaler's scale of the backward that is running.
    """

    def __init__(self, taps: Sequence[ParameterTap], scale: Callable[[], float]) -> None:
        self._taps = list(taps)
        self._scale = scale
        self._handles: list[RemovableHandle] = []
        self._before: dict[int, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._queued = False
        self._is_open = False

    def begin(self) -> None:
        """The step begins: listen for gradients, remember the parameters that updates are asked of."""
        self.forget()
        self._is_open = True
        for tap in self._of("update"):
            self._before[id(tap.parameter)] = tap.parameter.detach().clone()
        for parameter in {id(tap.parameter): tap.parameter for tap in self._of("grad")}.values():
            self._handles.append(on_gradient(parameter, self._accumulated))

    def end(self) -> dict[str, torch.Tensor]:
        """The step is over: the columns and what goes into each; nothing if the step was not begun.

        Raises:
            SiteNotFoundError: a parameter has no gradient (any more).
        """
        try:
            found = dict(self._found()) if self._is_open else {}
        finally:
            self.forget()
        for tap in self._taps if found else ():
            tap.cosine.keep()
        return found

    def forget(self) -> None:
        """Remove all hooks and let go of what was taken."""
        while self._handles:
            self._handles.pop().remove()
        self._before, self._gradients, self._queued, self._is_open = {}, {}, False, False

    def _of(self, kind: str) -> list[ParameterTap]:
        return [tap for tap in self._taps if tap.kind == kind]

    def _accumulated(self) -> None:
        """Gradients are final when the whole backward is done, and what DDP does after it."""
        if not self._queued:
            self._queued = True
            _after_backward(lambda: _after_backward(self._take))

    def _take(self) -> None:
        """A backward is done; of several in one step the last one that reaches the parameters counts."""
        self._queued = False
        scale = self._scale()
        with torch.no_grad():
            for tap in self._of("grad"):
                if self._is_open and tap.parameter.grad is not None:
                    gradient = tap.parameter.grad
                    self._gradients[tap.column] = tap.of(gradient if scale == 1 else gradient / scale)

    @torch.no_grad()
    def _found(self) -> Iterator[tuple[str, torch.Tensor]]:
        for tap in self._taps:
            if tap.kind == "grad":
                yield tap.column, _there(self._gradients.get(tap.column), tap)
            elif tap.kind == "clipped":
                yield tap.column, tap.of(_there(tap.parameter.grad, tap))
            elif tap.kind == "update":
                yield tap.column, tap.of(tap.parameter.detach() - self._before[id(tap.parameter)])
            else:
                yield tap.column, tap.of(tap.parameter)


def _after_backward(do: Callable[[], None]) -> None:
    """Do something when the backward that is running is done."""
    torch.autograd.Variable._execution_engine.queue_callback(do)


def _there(gradient: torch.Tensor | None, tap: ParameterTap) -> torch.Tensor:
    if gradient is not None:
        return gradient
    if tap.kind == "clipped":
        raise SiteNotFoundError(f"{tap.column}: the parameter has no gradient; call recorder.step() before optimizer.zero_grad()")
    raise SiteNotFoundError(
        f"{tap.column}: no backward of this step reached the parameter after the step's first recorder.batch(...); open the batch "
        "context before the forward, and leave parameters out that take no part"
    )
