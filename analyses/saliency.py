"""Gradient saliency: how much each token matters to a target, to first order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from copy import copy
from typing import Literal, Self

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array
from tensortape.stores.errors import MissingExampleError

from .errors import AnalysisError
from .examples import Examples, example_mask
from .gradients import Assume, activation_of, gradient_at
from .rows import Rows
from .sweep import Accumulator, Block, Job, sweep
from .token_scores import TokenScores
from .token_texts import TokenTexts

Reduce = Literal["l1", "l2", "max"]


def token_saliency(
    run: Run,
    site: str = "embed",
    target: str = "loss",
    *,
    reduce: Reduce = "l2",
    assume: Assume = None,
    examples: Examples = None,
    seed: int = 0,
    executor: Executor | None = None,
) -> TokenScores:
    """|dy/dx| of each token: the size of the gradient of a target with respect to a site (Simonyan et al. 2013, arXiv 1312.6034).

    Token ids have no gradient; x is a token's vector at the site, by default its row of the embedding, before positions are added.
    The unit is that of the target per unit of the activation, so scores of different sites do not compare.

    Args:
        run: an open run, recorded with `<site>:out.grad`.
        site: what the gradient is with respect to, a name or pattern that fits one recorded site.
        target: what was differentiated.
        reduce: how the d numbers of a token become one: `l1` the sum of their magnitudes, `l2` their Euclidean norm, `max` the
            largest magnitude.
        assume: `sum` takes gradients of an undeclared reduction as they are.
        examples: so many, drawn by `seed`; numbers of examples; or a mask. All if not given.
        seed: of the draw.
        executor: who reads and computes; see `sweep`.

    Raises:
        UnknownColumnError: no such gradient. GradientError: its reduction is undeclared. AnalysisError: it is not of tokens.
        MissingExampleError: none of these examples has it.
    """
    if reduce not in _SIZES:
        raise ValueError(f"reduce is one of {', '.join(_SIZES)}, not {reduce!r}")
    gradient = gradient_at(run, site, target, assume=assume)
    here = example_mask(run, examples, seed)
    return _scores(run, "gradient", (gradient,), _Reduced(_SIZES[reduce]), reduce, here, executor)


def gradient_x_input(
    run: Run,
    site: str = "embed",
    target: str = "loss",
    *,
    assume: Assume = None,
    examples: Examples = None,
    seed: int = 0,
    executor: Executor | None = None,
) -> TokenScores:
    """sum_d a * dy/da of each token (Shrikumar et al. 2016, arXiv 1605.01713): to first order, what the target owes to the token.

    a is the activation at the site, which has to be recorded beside the gradient. The sign is that of the contribution, the unit
    that of the target. It is exact for a target that is linear in a and zero at a = 0, and not elsewhere: what goes through a norm
    right away, as the last residual stream does, has no effect by its size, so there all scores are 0 but for rounding.

    Args:
        run: an open run, recorded with both `<site>` and `<site>:out.grad`.
        site, target, assume, examples, seed, executor: as for `token_saliency`.

    Raises:
        UnknownColumnError: no such gradient, or no activations with it. GradientError: its reduction is undeclared.
        AnalysisError: it is not of tokens. MissingExampleError: none of these examples has both.
    """
    gradient = gradient_at(run, site, target, assume=assume)
    columns = (gradient, activation_of(run, gradient))
    return _scores(run, "gradient x input", columns, _Reduced(_product), "sum", example_mask(run, examples, seed), executor)


class _Reduced(Accumulator):
    """One number per row, in the order of the rows; float64.

    Args:
        score: [n] of the columns' rows [n, d], given as float64.
    """

    found: list[Array]

    def __init__(self, score: Callable[..., Array]) -> None:
        self._score = score

    def init(self) -> Self:
        """One that has seen no rows."""
        empty = copy(self)
        empty.found = []
        return empty

    def update(self, block: Block) -> None:
        """The numbers of a block's rows."""
        self.found.append(self._score(*(one.reshape(len(block.rows), -1).astype(np.float64) for one in block.values)))

    def merge(self, other: Self) -> None:
        """Those of later rows come behind."""
        self.found += other.found

    def finalize(self) -> Array:
        """[rows]."""
        return np.concatenate(self.found) if self.found else np.empty(0)


def _l1(gradient: Array) -> Array:
    found: Array = np.abs(gradient).sum(1)
    return found


def _l2(gradient: Array) -> Array:
    found: Array = np.sqrt(np.square(gradient).sum(1))
    return found


def _max(gradient: Array) -> Array:
    found: Array = np.abs(gradient).max(1)
    return found


def _product(gradient: Array, activation: Array) -> Array:
    found: Array = (gradient * activation).sum(1)
    return found


_SIZES: dict[str, Callable[..., Array]] = {"l1": _l1, "l2": _l2, "max": _max}


def _scores(
    run: Run, method: str, columns: Sequence[Column], reduced: _Reduced, reduce: str, examples: Array, executor: Executor | None
) -> TokenScores:
    gradient = columns[0]
    if gradient.table == "example":
        raise AnalysisError(
            f"{gradient.name!r} has one gradient per example; scores of tokens need it recorded without a reduction"
        )
    here = np.logical_and.reduce([examples, *(column.present for column in columns)])
    if not gradient.lengths[here].sum():
        raise MissingExampleError(f"no example, of those asked for, has tokens in {', '.join(column.name for column in columns)}")
    [[scores]] = sweep([Job(Rows(tuple(columns), here), (reduced,))], executor, title="scoring")
    numbers, lengths, ids = np.flatnonzero(here), gradient.lengths[here], run.ids
    value = gradient.name.partition("/")[2].partition(".grad")[0]
    return TokenScores(
        method=method,
        site=value,
        target=(gradient.site or {})["target"]["name"],
        reduce=reduce,
        ids=tuple(ids[number] for number in numbers.tolist()),
        examples=numbers,
        lengths=lengths,
        values=scores,
        tokens=_tokens(TokenTexts(run, gradient.table), numbers, lengths),
    )


def _tokens(texts: TokenTexts, examples: Array, lengths: Array) -> tuple[str, ...]:
    """The text of every token, empty for those that are not known; none at all where none is known."""
    pairs = zip(examples.tolist(), lengths.tolist(), strict=True)
    found = tuple(text for number, length in pairs for text in texts[number] or [""] * length)
    return found if any(found) else ()
