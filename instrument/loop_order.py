"""What a loop does in an order that records something else than was meant. It is told so, once, and goes on."""

from __future__ import annotations

import logging

from torch import nn

_log = logging.getLogger(__name__)
_SOME = 3  # parameters from either end that are looked at: an optimizer changes all of them
_AFTERWARDS = {"update", "value", "clipped"}  # of a parameter, what is known once the optimizer has stepped

UNENDED = (
    "the weights have changed and a batch of the same step begins: call recorder.step() after each optimizer.step(), or all "
    "batches are recorded as step %d"
)
BETWEEN = (
    "the weights have changed since step %d: call recorder.step() right after optimizer.step(), and record a probe set or an "
    "evaluation only then, or it is taken for one of weights that are gone"
)
UNSEEN = "step %d was to be recorded, but there was no `with recorder.batch(...)` around a forward of the model"
EARLY = "the weights are those that step %d began with: call recorder.step() after optimizer.step(), not before"


class LoopOrder:
    """Compares how often parameters were written to, which torch counts.

    Args:
        model: its trainable parameters are looked at.
        has_taps: whether anything is recorded of batches.
        kinds: what is recorded of parameters.
    """

    def __init__(self, model: nn.Module, *, has_taps: bool, kinds: set[str]) -> None:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._parameters = trainable[:_SOME] + trainable[_SOME:][-_SOME:]
        self._has_taps, self._looks_back = has_taps, bool(kinds & _AFTERWARDS)
        self._before: list[int] | None = None
        self._batches = 0
        self._said: set[str] = set()

    def batch_begins(self, done: int) -> None:
        """A batch of the step after `done`."""
        if self._have_changed():
            self._say(UNENDED, done + 1)
        self._batches += 1

    def evaluation_begins(self, done: int) -> None:
        """An evaluation of the weights after `done` steps."""
        if self._have_changed():
            self._say(BETWEEN, done)

    def step_ends(self, done: int, *, is_due: bool) -> None:
        """So many steps are done; `is_due` says whether the last of them was recorded."""
        if is_due and self._has_taps and not self._batches:
            self._say(UNSEEN, done)
        if is_due and self._looks_back and self._before == self._versions():
            self._say(EARLY, done)
        self.begin_anew()
        self._before = self._versions()

    def begin_anew(self) -> None:
        """Weights were loaded; nothing is known of them."""
        self._before, self._batches = None, 0

    def _have_changed(self) -> bool:
        now = self._versions()
        self._before = now if self._before is None else self._before
        return now != self._before

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]

    def _say(self, what: str, step: int) -> None:
        if what not in self._said:
            self._said.add(what)
            _log.warning(what, step)
