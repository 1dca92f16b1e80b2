"""Watching a model for attention calls: the four tiers together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from ..anatomy import is_attention
from ..arguments import arguments_of
from ..modules import named
from . import functions, interface, mha, sdpa, softmax
from .facts import Attended
from .masks import Readings

OnAttended = Callable[[str, Attended], None]
Hooks = tuple[nn.Module, Callable[..., None] | None, Callable[..., None] | None]


class Watch:
    """Reports every attention call of a model as (module path, what it was); of a module's tiers the first that shows a call wins.

    Args:
        model: the unwrapped model.
        on_attended: told of each call, with the tensors the function saw.
        guard: makes a function report its errors instead of raising them.
        recomputes: whether a checkpoint is computing part of the forward once more, where function modes are off.
        traceable: the model will be compiled, so that only what torch.compile can trace may be in place.
    """

    def __init__(
        self,
        model: nn.Module,
        on_attended: OnAttended,
        guard: Callable[[Callable[..., None]], Callable[..., None]],
        recomputes: Callable[[], bool],
        *,
        traceable: bool,
    ) -> None:
        self._modules = dict(named(model))
        self._paths = {id(module): path for path, module in self._modules.items()}
        self._on_attended = on_attended
        self._guard = guard
        self._recomputes = recomputes
        self._sees_functions = not traceable or any(_calls_functions(module) for module in self._modules.values())
        self._frames: list[str] = []
        self._tiers: dict[str, str] = {}
        self._readings = Readings()
        self._rows = 0
        self._widths: Callable[[], Sequence[int]] = list
        self._mode: functions.Functions | None = None
        self._observation: interface.Observation | None = None

    def attach(self) -> None:
        """Observe transformers' attention interface."""
        self._observation = interface.Observation(self._modules.values(), self._guard(self._interface))

    def remove(self) -> None:
        """Stop observing."""
        self.end()
        if self._observation is not None:
            self._observation.remove()
            self._observation = None

    def hooks(self) -> Iterator[Hooks]:
        """(module, before, after) of the forward hooks that tiers 2 to 4 need; each takes (module, args, kwargs[, output])."""
        for path, module in self._modules.items():
            if isinstance(module, nn.MultiheadAttention):
                yield module, None, self._of_mha(path, module)
            elif self._sees_functions and _has_own_code(module):
                yield module, self._enter(path, module), self._leave(path, module)

    def begin(self, rows: int, widths: Callable[[], Sequence[int]]) -> None:
        """A forward of the root module begins, with so many input rows; `widths` are those of its streams, where known."""
        self._frames.clear()
        self._tiers.clear()
        self._readings = Readings()
        self._rows, self._widths = rows, widths
        self._enter_mode()

    def _enter_mode(self) -> None:
        if self._sees_functions and self._mode is None:
            self._mode = functions.Functions(self._guard(self._function))
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """The forward has ended, one way or another."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None
            if self._seen_without_functions():
                self._sees_functions = False  # later forwards are spared what the mode costs
        self._readings = Readings()

    def _seen_without_functions(self) -> bool:
        """Whether all that looks like attention was shown, or is inside of what was, by tiers that need no function mode."""
        looks = (path for path, module in self._modules.items() if is_attention(path, module))
        return set(self._tiers.values()) <= {"interface", "mha"} and all(
            any(_inside(path, shown) or _inside(shown, path) for shown in self._tiers) for path in looks
        )

    def _interface(self, module: nn.Module, call: dict[str, Any]) -> None:
        self._report(self._paths[id(module)], interface.attended(call, self._readings))

    def _of_mha(self, path: str, own: nn.MultiheadAttention) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if module is own:
                with functions.handled():  # z is computed once more, by a function that tier 3 looks for
                    found = mha.attended(own, arguments_of(module, args, kwargs), output)
                self._report(path, found)

        return after

    def _function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._frames:
            return
        if function is functions.SDPA:
            self._report(self._frames[-1], sdpa.attended(args, kwargs, output, self._readings))
            return
        owner = next((path for path in reversed(self._frames) if is_attention(path, self._modules[path])), None)
        if owner is not None:
            self._report(owner, softmax.attended(output, self._rows, self._widths()))

    def _report(self, path: str, attended: Attended | None) -> None:
        if attended is not None and self._tiers.setdefault(path, attended.tier) == attended.tier:
            self._on_attended(path, attended)

    def _enter(self, path: str, own: nn.Module) -> Callable[..., None]:
        def before(module: nn.Module, *_: Any) -> None:
            if module is own:
                if not self._frames and self._recomputes():
                    self._enter_mode()
                self._frames.append(path)

        return before

    def _leave(self, path: str, own: nn.Module) -> Callable[..., None]:
        def after(module: nn.Module, *_: Any) -> None:
            if module is own and path in self._frames:
                while self._frames.pop() != path:
                    pass  # frames of modules that raised
                if not self._frames and self._recomputes():
                    self.end()

        return after


def _inside(path: str, other: str) -> bool:
    """Whether a module is another, or one inside of it."""
    return path == other or path.startswith(f"{other}.")


def _has_own_code(module: nn.Module) -> bool:
    """Whether a module's forward may call attention functions: torch's own layers do not, apart from nn.MultiheadAttention."""
    return not type(module).__module__.startswith("torch.nn.")


def _calls_functions(module: nn.Module) -> bool:
    """Whether a module looks like attention that does not go through transformers' interface."""
    source = sys.modules.get(type(module).__module__)
    return is_attention("", module) and _has_own_code(module) and not hasattr(source, "ALL_ATTENTION_FUNCTIONS")
