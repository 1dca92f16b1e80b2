"""Hooks: the one file that registers them.

A TapSet is every hook of one recorder, attached and removed together. Hooks only look: they return nothing, copy what they take
before anything can change it, and never raise into the user's forward; what goes wrong is reported to the receiver. They act only
while a forward of the root module runs, so direct calls of submodules are not taken. Of what a checkpoint computes once more during
backward, only gradients are taken, where the first pass had no graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tensortape.stores.patterns import SiteName

from . import listening
from .arguments import arguments_of, leaf_of
from .attention.facts import Attended, Turn
from .attention.watch import Watch
from .leaves import pick
from .modules import named
from .receiver import Receiver
from .recomputed import Recomputed
from .sites import Tap
from .slow_path import SlowPath, needs_slow_path


class TapSet:
    """The hooks of one recorder on one model.

    Args:
        model: the unwrapped model.
        taps: what to capture.
        traceable: the model will be compiled with the hooks in place, so that they must stay out of the traced graph.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap], *, traceable: bool = False) -> None:
        self._model = model
        self._traceable = traceable
        self._receiver: Receiver | None = None
        self._running = False
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._recomputed = Recomputed()
        self._open: defaultdict[str, list[int]] = defaultdict(list)  # calls that have begun and not ended: a module may call itself
        self._handles: list[RemovableHandle] = []
        self._needs_slow_path = False
        self._by_module: defaultdict[str, list[Tap]] = defaultdict(list)
        for tap in taps:
            if not tap.site.is_attention:
                self._by_module[tap.path].append(tap)
        self._attention = [tap for tap in taps if tap.site.is_attention]
        self._watch = Watch(model, self._attended, self._guard, self._recomputes, traceable=traceable) if self._attention else None
        self._has_gradients = any(tap.site.is_gradient for tap in taps)

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def attach(self) -> None:
        """Place all hooks, or none if anything goes wrong."""
        try:
            self._place_hooks()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take all hooks away; doing it twice is fine."""
        while self._handles:
            self._handles.pop().remove()
        if self._watch is not None:
            self._watch.remove()
        if self._needs_slow_path:
            SlowPath.leave()
            self._needs_slow_path = False
        self._running = False

    @contextmanager
    def sending_to(self, receiver: Receiver) -> Iterator[None]:
        """Send what forwards within the block show to this receiver."""
        self._receiver = receiver
        try:
            yield
        finally:
            self._receiver = None
            self._running = False
            if self._watch is not None:
                self._watch.end()  # a KeyboardInterrupt passes the hooks by

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def _place_hooks(self) -> None:
        if needs_slow_path(self._model):
            SlowPath.enter()
            self._needs_slow_path = True
        self._before(self._model, self._begin)
        decoder = _decoder_of(self._model)
        if decoder is not None:
            self._before(decoder, self._begin_decoder)
        if self._watch is not None:
            self._watch.attach()
            for module, before, after in self._watch.hooks():
                self._hook(module, before, after)
        for path, module in named(self._model):
            if path in self._by_module:
                self._tap(path, module)
        self._handles.append(self._model.register_forward_hook(self._guard(self._end), always_call=True))

    def _hook(self, module: nn.Module, before: Callable[..., None] | None, after: Callable[..., None] | None) -> None:
        if before is not None:
            self._before(module, before)
        if after is not None:
            self._after(module, after, always=before is not None)

    def _before(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_pre_hook(self._guard(hook), with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable[..., None], *, always: bool = False) -> None:
        self._handles.append(module.register_forward_hook(self._guard(hook), with_kwargs=True, always_call=always))

    def _tap(self, path: str, module: nn.Module) -> None:
        taps = self._by_module[path]

        own = id(module)  # a deep copy of the model carries these hooks, too

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._acts and id(module) == own:
                self._open[path].append(self._number(path))
                self._take(taps, "in", self._open[path][-1], lambda: arguments_of(module, args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._acts and id(module) == own and self._open[path]:
                self._take(taps, "out", self._open[path].pop(), lambda: output)

        self._before(module, before)
        self._after(module, after)

    @property
    def _acts(self) -> bool:
        return self._running or self._recomputes()

    def _recomputes(self) -> bool:
        """Whether a checkpoint computes part of the recorded forward once more, which matters to gradients alone."""
        return not self._running and self._has_gradients and self._receiver is not None and _in_backward()

    def _number(self, path: str) -> int:
        """Which call of a module this is; 0 for one that a checkpoint computes once more, until its segment is whole."""
        if self._running:
            self._calls[path] += 1
        return self._calls[path] if self._running else 0

    def _take(self, taps: list[Tap], base: str, call: int, value: Callable[[], Any]) -> None:
        for tap in taps:
            site = tap.name(call)
            if self._receiver is None or site.base != base or (call and tap.call not in (None, call)):
                continue
            if site.is_gradient:
                tensor = pick(value(), leaf_of(site, value), str(site))
                self._listen(tap, site, tensor)
            elif self._running:
                self._receiver.captured(tap, site, pick(value(), leaf_of(site, value), str(site)))

    def _attended(self, path: str, attended: Attended) -> None:
        if not self._acts or self._receiver is None:
            return
        call = self._number(f"{path}:attention")
        taps = [tap for tap in self._attention if tap.covers(path, call or tap.call or 1)]
        site = SiteName(path, "attention", call)
        if taps and self._running:
            self._receiver.attended(taps, site, attended)
        for tap in taps:
            if tap.site.is_gradient:
                base = "weights" if attended.q is None else "z"
                port = f"{base}.grad{tap.port.partition('.grad')[2]}"
                self._listen(tap, SiteName(path, port, call), attended.source, attended.turn)

    def _listen(self, tap: Tap, site: SiteName, tensor: torch.Tensor | None, turn: Turn = torch.detach) -> None:
        """Hear of the gradient at a site. A checkpoint that keeps its first graph has been listened to in the first pass."""
        receiver = self._receiver
        if receiver is None:
            return
        if tensor is None or not tensor.requires_grad:
            if site.call:
                receiver.without_gradient(site)
                self._recomputed.expect(tap, site)
            return
        named = (lambda: site) if site.call else self._recomputed.place(tap, site)

        def graded(gradient: torch.Tensor) -> None:
            found = named()
            if found is not None and tap.call in (None, found.call):
                receiver.graded(tap, found, turn(gradient))

        for heard, hook in listening.hooks(tensor, graded):
            heard.register_hook(self._guard(hook))  # type: ignore[no-untyped-call]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._receiver is not None and module is self._model and not _in_backward():
            self._running = True
            self._calls.clear()
            self._open.clear()
            self._recomputed = Recomputed()
            rows = self._receiver.started(arguments_of(module, args, kwargs))
            if self._watch is not None:
                self._watch.begin(rows, self._receiver.widths)

    def _begin_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._receiver is not None and self._running:
            self._receiver.decoder_started(arguments_of(module, args, kwargs))

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self._model and self._running:
            self._running = False
            if self._receiver is not None:
                self._receiver.ended()
            if self._watch is not None:
                self._watch.end()

    def _guard(self, hook: Callable[..., None]) -> Callable[..., None]:
        """A hook that reports instead of raising, and that torch.compile leaves alone."""

        def guarded(*given: Any) -> None:
            try:
                with torch.no_grad():
                    hook(*given)
            except Exception as error:
                if self._receiver is not None:
                    self._receiver.failed(error)

        return _untraced(guarded) if self._traceable else _Own(guarded)


class _Own:
    """A hook of the model it was placed on: a deep copy, or a saved copy, of the model has one that does nothing in its place."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *given: Any) -> Any:
        return self._hook(*given)

    def __deepcopy__(self, memo: object) -> _Own:
        return _Own(_nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Own, (_nothing,)


def _nothing(*_: Any) -> None: ...


@contextmanager
def anchored(modules: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Makes the outputs of some modules the leaves that a graph begins with, whether or not their parameters require gradients.

    The model goes on with a copy of each leaf, since it may change what it gets in place.
    """
    leaves: list[torch.Tensor] = []

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()

    handles = [module.register_forward_hook(after, prepend=True) for module in modules]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def on_gradient(parameter: nn.Parameter, hook: Callable[[], None]) -> RemovableHandle:
    """Hear of it whenever a gradient was added to a parameter's `.grad`."""
    accumulate: Callable[..., RemovableHandle] = parameter.register_post_accumulate_grad_hook
    return accumulate(lambda _: hook())


def on_call(module: nn.Module, hook: Callable[[dict[str, Any]], None]) -> RemovableHandle:
    """See, and change, the keyword arguments of every call of a module before anything else does."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hook(kwargs)
        return args, kwargs

    return module.register_forward_pre_hook(_Own(_untraced(before)), with_kwargs=True, prepend=True)


def on_output(module: nn.Module, hook: Callable[[Any], None]) -> RemovableHandle:
    """See what every call of a module gives."""
    return module.register_forward_hook(_Own(_untraced(lambda module, args, output: hook(output))))


def _in_backward() -> bool:
    """Whether autograd is running: a forward then is a checkpoint's recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    disabled: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled


def _decoder_of(model: nn.Module) -> nn.Module | None:
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()  # type: ignore[operator]
    return decoder if isinstance(decoder, nn.Module) else None
