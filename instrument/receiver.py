"""Who gets what the taps see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from tensortape.stores.patterns import SiteName

from .arguments import Arguments
from .attention.facts import Attended
from .sites import Tap


class Receiver(Protocol):
    """What a TapSet reports; of a batch being recorded, say."""

    def started(self, arguments: Arguments) -> int:
        """A forward of the root module begins with these arguments; returns its number of input rows, 0 if not known."""

    def decoder_started(self, arguments: Arguments) -> None:
        """The decoder of an encoder-decoder begins with these arguments."""

    def ended(self) -> None:
        """The forward has ended."""

    def widths(self) -> Sequence[int]:
        """Positions of each stream of tokens in the present forward, where the call has shown them."""

    def captured(self, tap: Tap, site: SiteName, tensor: torch.Tensor) -> None:
        """A tapped tensor; to be copied before returning."""

    def attended(self, taps: Sequence[Tap], site: SiteName, attended: Attended) -> None:
        """An attention call that some taps cover; to be copied before returning."""

    def graded(self, tap: Tap, site: SiteName, gradient: torch.Tensor) -> None:
        """The gradient at a tapped tensor, or at an attention call; to be copied before returning."""

    def without_gradient(self, site: SiteName) -> None:
        """A gradient was asked for at a tensor that has none."""

    def failed(self, error: Exception) -> None:
        """Something went wrong in a hook."""
