"""Gradients of a linear layer's weight, one per example, from the layer's inputs and the gradients of its outputs.

With y_t = W x_t + b, the gradient of an example's loss is G = sum_t g_t x_t^T, where g_t = dL/dy_t (Goodfellow 2015, arXiv
1510.01799). What was recorded are the factors; nothing as large as the weight is stored, or made where that can be avoided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensortape.stores import Column, Run
from tensortape.stores.dtypes import Array
from tensortape.stores.errors import UnknownColumnError
from tensortape.stores.selection import is_companion, site_name

from .errors import AnalysisError
from .examples import Examples, example_mask
from .gradients import Assume, check_declared
from .outer_products import Factors, Plan, Sums


@dataclass(frozen=True, repr=False)
class ExampleGradients:
    """dL/dW of each example of a run. `gradients[i]` is example i: [out, in], float64.

    Args:
        run: where the columns are from.
        module: the layer's path.
        target: what was differentiated.
        inputs, outputs: its inputs and the gradients of its outputs; one column for each call of the layer, which add up.
    """

    run: Run
    module: str
    target: str
    inputs: tuple[Column, ...]
    outputs: tuple[Column, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(examples, out, in)."""
        return len(self), self.outputs[0].shape[1], self.inputs[0].shape[1]

    @property
    def present(self) -> Array:
        """Per example of the run whether it has a gradient; bool."""
        found: Array = np.logical_and.reduce([column.present for column in (*self.inputs, *self.outputs)])
        return found

    def bias(self, example: int) -> Array:
        """dL/db of an example: [out], float64."""
        found: Array = self._factors(np.array([example])).g.sum(0)
        return found

    def norms(self, examples: Examples = None) -> Array:
        """Frobenius norms |G_i|, one for each example; float64.

        Args:
            examples: numbers of examples, in any order, or a mask; all that have a gradient if not given.

        Raises:
            MissingExampleError: one of them has none.
        """
        every = [np.array([number]) for number in self._numbers(examples)]
        squares = [self._products(one, one)[0, 0] for one in every]
        return np.sqrt(np.maximum(np.array(squares, np.float64), 0))

    def dot(self, first: int, second: int) -> float:
        """<G_i, G_j> of two examples, the sum over all entries."""
        return float(self.inner_products([first], [second])[0, 0])

    def inner_products(self, examples: Examples = None, others: Examples = None) -> Array:
        """<G_i, G_j> of each example and each other one; [examples, others], float64.

        They are sums over pairs of tokens, sum_ts (g_it . g_js)(x_it . x_js). Where examples are too long for that to be less work,
        their gradients are made, 64 MiB at a time.

        Args:
            examples: as for `norms`.
            others: the same examples if not given.
        """
        rows = self._numbers(examples)
        return self._products(rows, rows if others is None else self._numbers(others))

    def __getitem__(self, example: int) -> Array:
        one = self._factors(np.array([example]))
        found: Array = one.g.T @ one.x
        return found

    def __len__(self) -> int:
        return len(self.run)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape[1:]))
        return f"<ExampleGradients of {self.module} ({size}), target {self.target!r}: {int(self.present.sum())} examples>"

    def _numbers(self, examples: Examples) -> Array:
        if examples is None:
            return np.flatnonzero(self.present)
        given = np.asarray(examples)
        return np.flatnonzero(example_mask(self.run, examples)) if given.ndim == 0 or given.dtype == bool else given.astype(int)

    def _products(self, rows: Array, columns: Array) -> Array:
        plan = Plan(self._lengths(rows), self._lengths(columns), *self.shape[1:])
        found = np.empty((len(rows), len(columns)))
        taken: Callable[[Array], Any] = self._factors if plan.is_of_factors else self._sums
        for down in plan.blocks(plan.rows):
            here = taken(rows[down])
            for across in plan.blocks(plan.columns):
                if rows is columns and across.start < down.start:
                    found[down, across] = found[across, down].T
                    continue
                found[down, across] = here.products(here if rows is columns and across == down else taken(columns[across]))
        return found

    def _lengths(self, numbers: Array) -> Array:
        """Tokens of some examples, over all calls."""
        found: Array = np.sum([np.maximum(column.lengths, 0) for column in self.inputs], axis=0)[numbers]
        return found

    def _sums(self, numbers: Array) -> Sums:
        """The gradients of some examples."""
        flat = np.empty((len(numbers), self.shape[1] * self.shape[2]))
        for row, number in zip(flat, numbers.tolist(), strict=True):
            row[:] = self[number].ravel()
        return Sums(flat)

    def _factors(self, numbers: Array) -> Factors:
        """What they are made of."""
        g, x = ([_rows(column, number) for number in numbers.tolist() for column in of] for of in (self.outputs, self.inputs))
        return Factors(np.concatenate(g), np.concatenate(x), self._lengths(numbers))


def example_gradients(run: Run, module: str, target: str = "loss", *, assume: Assume = None) -> ExampleGradients:
    """The gradient of each example's target with respect to the weight (and bias) of a linear layer.

    The layer is an `nn.Linear` with a weight of its own, which no other layer shares (transformers' Conv1D, in GPT-2, keeps the
    transposed weight). Tokens that a recording leaves out as pads count as having no gradient; they have none where no loss depends
    on them. In models whose examples interact (BatchNorm, balanced experts), no example has a gradient of its own.

    Args:
        run: an open run, recorded with sites `<module>:in` and `<module>:out.grad`.
        module: the layer's path.
        target: what was differentiated.
        assume: `sum` takes gradients of an undeclared reduction as they are.

    Raises:
        UnknownColumnError: inputs or gradients of the layer were not recorded, or only reduced. GradientError: nobody has said how
            the target joins the examples of its batch. AnalysisError: they are not those of a linear layer.
    """
    outputs, inputs = _calls(run, module, f"out.grad@{target}"), _calls(run, module, "in")
    if not outputs or outputs.keys() - inputs.keys():
        missing = f"{module}:in" if outputs else f"{module}:out.grad of target {target!r}"
        known = ", ".join(column.name for column in run.sites if site_name(column).is_gradient) or "no gradients"
        raise UnknownColumnError(
            f"gradients of single examples need '{module}:in' and '{module}:out.grad', whole rows of both; {missing} was not "
            f"recorded so. The run has {known}"
        )
    for call, column in outputs.items():
        check_declared(column, assume)
        _check_rows(inputs[call], column)
    return ExampleGradients(run, module, target, tuple(inputs[call] for call in outputs), tuple(outputs.values()))


def _calls(run: Run, module: str, port: str) -> dict[int, Column]:
    """Whole rows of a module's port, by call."""
    named = [(site_name(column), column) for column in run.sites if not is_companion(column)]
    return {
        name.call: column
        for name, column in named
        if (name.path, name.port) == (module, port) and (column.site or {}).get("reduce") is None
    }


def _check_rows(inputs: Column, outputs: Column) -> None:
    if inputs.table != outputs.table or len(inputs.shape) != 2 or len(outputs.shape) != 2:
        raise AnalysisError(
            f"{inputs.name!r} {list(inputs.shape)} and {outputs.name!r} {list(outputs.shape)} are not the inputs and outputs of a "
            "linear layer: one vector of each per row, of the same table"
        )


def _rows(column: Column, example: int) -> Array:
    """[rows, features] of an example, float64."""
    found: Array = np.atleast_2d(column[example]).astype(np.float64)
    return found
