"""Which axis of a captured tensor is what.

    example token ...      [B, T, *feature]
    token example ...      [T, B, *feature]
    (example token) ...    [B*T, *feature], or [kept tokens, *feature] where pads were dropped already
    example ...            [B, *feature]

Nothing is guessed: a layout is inferred only when exactly one of these fits the number of examples and the widths of the batch's
streams; otherwise the user is asked for `layout=`. Once known it is pinned for the rest of the recording. `token.decoder` in place
of `token` names another stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .errors import LayoutError
from .streams import MAIN, Stream

KINDS = ("example token", "token example", "(example token)", "example")
_KINDS_SHOWN = ", ".join(f"'{kind} ...'" for kind in KINDS)


@dataclass(frozen=True)
class Layout:
    """One of the kinds above, and the stream its token axis belongs to (empty for `example`)."""

    kind: str
    stream: str = ""

    def __str__(self) -> str:
        kind = self.kind if self.stream in ("", MAIN) else self.kind.replace("token", f"token.{self.stream}")
        return f"{kind} ..."

    @property
    def least_axes(self) -> int:
        """Axes a tensor of this layout has at least."""
        return 2 if self.kind in ("example token", "token example") else 1

    def axes(self, tensor: torch.Tensor) -> tuple[int, int | None]:
        """(rows, width T) that the tensor's shape states; no width where the two axes are one."""
        if self.kind == "example token":
            return tensor.shape[0], tensor.shape[1]
        if self.kind == "token example":
            return tensor.shape[1], tensor.shape[0]
        return tensor.shape[0], None

    def rows(self, tensor: torch.Tensor, stream: Stream | None) -> torch.Tensor:
        """The kept rows, one after another, as a tensor that later changes of the original do not reach."""
        if stream is None:
            return tensor.clone()
        if self.kind == "(example token)" and len(tensor) == stream.kept:
            return tensor.clone()
        if self.kind == "(example token)":
            return stream.pack(tensor.reshape(stream.rows, stream.width, *tensor.shape[1:]))
        return stream.pack(tensor if self.kind == "example token" else tensor.transpose(0, 1))


def parse(text: str) -> Layout:
    """A layout as users write it; LayoutError for anything else."""
    found = re.fullmatch(r"(\()?(example|token)(\.\S+?)?( (example|token)(\.\S+?)?)?(\))? \.\.\.", text)
    streams = [part.partition(".")[2] for part in re.findall(r"token[^ )]*", text)]
    kind = re.sub(r"token\.[^ )]+", "token", text.removesuffix(" ..."))
    if found is None or kind not in KINDS:
        raise LayoutError(f"there is no layout {text!r}; layouts are {_KINDS_SHOWN}")
    return Layout(kind, (streams[0] or MAIN) if streams else "")


def infer(
    shape: tuple[int, ...], rows: int, streams: Mapping[str, Stream], site: str, *, opens: str | None, home: str | None = None
) -> Layout:
    """The one layout that fits, or LayoutError.

    Args:
        shape: the captured tensor's shape.
        rows: input rows B of the batch.
        streams: the streams known in this batch.
        site: the site, for the message.
        opens: the name of the stream that a [B, T, feature] tensor opens when its T fits none.
        home: the stream of the stack that the site belongs to, where known; it decides between streams of equal width.
    """
    fitting = list(_fitting(shape, rows, streams))
    if not fitting and len(shape) == 3 and shape[0] == rows and opens is not None:
        return Layout("example token", opens)
    if len({layout.kind for layout in fitting}) == 1 and home in {layout.stream for layout in fitting}:
        return Layout(fitting[0].kind, home or "")
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(f"{name} of {stream.width} positions" for name, stream in streams.items()) or "none"
    verdict = f"several layouts fit ({', '.join(repr(str(layout)) for layout in fitting)})" if fitting else "no layout fits"
    raise LayoutError(
        f"site {site!r} gave a tensor of shape {list(shape)} in a batch of {rows} rows (streams: {known}), and {verdict}; say "
        f"which axis is what with Site({site!r}, layout='example token ...') or another of {_KINDS_SHOWN}"
    )


def _fitting(shape: tuple[int, ...], rows: int, streams: Mapping[str, Stream]) -> Iterator[Layout]:
    tokens = [Layout(kind, name) for name, stream in streams.items() for kind in KINDS[:3] if _fits(kind, shape, rows, stream)]
    yield from tokens
    # [B, T, d] is not also read as one [T, d] feature per example: a width that fits a stream is one. [B, d] with d == T is open.
    if shape and shape[0] == rows and len(shape) == 2:
        yield Layout("example")


def _fits(kind: str, shape: tuple[int, ...], rows: int, stream: Stream) -> bool:
    if kind == "(example token)":
        return bool(shape) and shape[0] in (rows * stream.width, stream.kept) and shape[:2] != (rows, stream.width)
    expected = (rows, stream.width) if kind == "example token" else (stream.width, rows)
    return tuple(shape[:2]) == expected
