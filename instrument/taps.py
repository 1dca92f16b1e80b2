"""Hooks: the one file that registers them.

A TapSet is every hook of one recorder, attached and removed together. Hooks only look: they return nothing, copy what they take
before anything can change it, and never raise into the user's forward; what goes wrong is reported to the receiver. They act only
while a forward of the root module runs, so checkpoint recomputation during backward and direct calls of submodules are not taken.
"""

from __future__ import annotations

import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tensortape.stores.patterns import SiteName

from .leaves import Leaf, pick
from .modules import named
from .sites import Tap

Arguments = Mapping[str, Any]


class Receiver(Protocol):
    """Who gets what the taps see."""

    def started(self, arguments: Arguments) -> None:
        """A forward of the root module begins with these arguments."""

    def decoder_started(self, arguments: Arguments) -> None:
        """The decoder of an encoder-decoder begins with these arguments."""

    def captured(self, tap: Tap, site: SiteName, tensor: torch.Tensor) -> None:
        """A tapped tensor; to be copied before returning."""

    def failed(self, error: Exception) -> None:
        """Something went wrong in a hook."""


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
        self._open: defaultdict[str, list[int]] = defaultdict(list)  # calls that have begun and not ended: a module may call itself
        self._handles: list[RemovableHandle] = []
        self._needs_slow_path = False
        self._by_module: defaultdict[str, list[Tap]] = defaultdict(list)
        for tap in taps:
            self._by_module[tap.path].append(tap)

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
        if self._needs_slow_path:
            _SlowPath.leave()
            self._needs_slow_path = False
        self._running = False

    @contextmanager
    def sending_to(self, receiver: Receiver) -> Any:
        """Send what forwards within the block show to this receiver."""
        self._receiver = receiver
        try:
            yield
        finally:
            self._receiver = None
            self._running = False

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def _place_hooks(self) -> None:
        self._disable_fast_path()
        self._handles.append(self._model.register_forward_pre_hook(self._guard(self._begin), with_kwargs=True))
        decoder = _decoder_of(self._model)
        if decoder is not None:
            self._handles.append(decoder.register_forward_pre_hook(self._guard(self._begin_decoder), with_kwargs=True))
        for path, module in named(self._model):
            if path in self._by_module:
                self._tap(path, module)
        self._handles.append(self._model.register_forward_hook(self._guard(self._end), always_call=True))

    def _tap(self, path: str, module: nn.Module) -> None:
        taps = self._by_module[path]

        own = id(module)  # a deep copy of the model carries these hooks, too

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._running and id(module) == own:
                self._calls[path] += 1
                self._open[path].append(self._calls[path])
                self._take(taps, "in", self._calls[path], lambda: _arguments(module, args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._running and id(module) == own:
                self._take(taps, "out", self._open[path].pop(), lambda: output)

        self._handles.append(module.register_forward_pre_hook(self._guard(before), with_kwargs=True))
        self._handles.append(module.register_forward_hook(self._guard(after)))

    def _take(self, taps: list[Tap], base: str, call: int, value: Callable[[], Any]) -> None:
        for tap in taps:
            site = tap.name(call)
            if self._receiver is not None and site.base == base and tap.call in (None, call):
                self._receiver.captured(tap, site, pick(value(), _leaf(site, value), str(site)))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._receiver is not None and module is self._model and not _in_backward():
            self._running = True
            self._calls.clear()
            self._open.clear()
            self._receiver.started(_arguments(module, args, kwargs))

    def _begin_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._receiver is not None and self._running:
            self._receiver.decoder_started(_arguments(module, args, kwargs))

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._running = self._running and module is not self._model

    def _guard(self, hook: Callable[..., None]) -> Callable[..., None]:
        """A hook that reports instead of raising, and that torch.compile leaves alone."""

        def guarded(*given: Any) -> None:
            try:
                with torch.no_grad():
                    hook(*given)
            except Exception as error:
                if self._receiver is not None:
                    self._receiver.failed(error)

        return _untraced(guarded) if self._traceable else guarded

    def _disable_fast_path(self) -> None:
        """nn.TransformerEncoder's fast path computes a layer in one opaque operation, past most hooks."""
        if any(isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention)) for module in self._model.modules()):
            _SlowPath.enter()
            self._needs_slow_path = True


class _SlowPath:
    """The fast path of nn.TransformerEncoder, off as long as any tap set needs it off."""

    users = 0
    before = True
    lock = threading.Lock()

    @classmethod
    def enter(cls) -> None:
        with cls.lock:
            if not cls.users:
                cls.before = torch.backends.mha.get_fastpath_enabled()
            cls.users += 1
            torch.backends.mha.set_fastpath_enabled(False)

    @classmethod
    def leave(cls) -> None:
        with cls.lock:
            cls.users -= 1
            if not cls.users:
                torch.backends.mha.set_fastpath_enabled(cls.before)


def _in_backward() -> bool:
    """Whether autograd is running: a forward then is a checkpoint's recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, in the order of the module's signature, whichever way they were given."""
    signature = inspect.signature(module.forward)
    bound = signature.bind_partial(*args, **kwargs).arguments
    found: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({f"{name}.{number}": inner for number, inner in enumerate(value)})
        else:
            found[name] = value
    return found


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    disabled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled


def _leaf(site: SiteName, value: Callable[[], Any]) -> Leaf:
    """Keys of the leaf; an input may be named by its place among the arguments, too."""
    leaf = site.leaf
    if site.base == "in" and leaf and leaf[0].isdigit():
        names = list(value())
        return (names[int(leaf[0])], *leaf[1:]) if int(leaf[0]) < len(names) else leaf
    return leaf


def _decoder_of(model: nn.Module) -> nn.Module | None:
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()  # type: ignore[operator]
    return decoder if isinstance(decoder, nn.Module) else None
