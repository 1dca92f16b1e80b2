"""Tensors inside what modules take and return."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from tensortape.instrument.errors import SiteNotFoundError
from tensortape.instrument.leaves import leaves, pick

A, B, N = torch.zeros(2, 3), torch.ones(4), torch.arange(3)


@dataclass
class Pair:
    """A dataclass."""

    left: Any
    right: Any = field(default=None)


Point = namedtuple("Point", ["x", "y"])


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        (A, [()]),
        ((A, B), [("0",), ("1",)]),
        ([A, (B, N)], [("0",), ("1", "0"), ("1", "1")]),
        ({"a": A, "b": {"c": B}}, [("a",), ("b", "c")]),
        (OrderedDict(b=B, a=A), [("b",), ("a",)]),
        (UserDict({"a": A}), [("a",)]),
        ({0: A, 1: B}, [("0",), ("1",)]),
        (Pair(A, Pair(B)), [("left",), ("right", "left")]),
        (Point(A, [B]), [("0",), ("1", "0")]),
        (
            BaseModelOutputWithPast(last_hidden_state=A, hidden_states=(A, B)),
            [("last_hidden_state",), ("hidden_states", "0"), ("hidden_states", "1")],
        ),
        (None, []),
        ("text", []),
        ((None, "text", 3, b"bytes", {A.dtype}), []),
        (Pair, []),
    ],
)
def test_leaves(value: Any, keys: list[tuple[str, ...]]) -> None:
    """Every tensor with its keys, in order; what is none is passed over."""
    assert [at for at, _ in leaves(value)] == keys


def test_caches_are_passed_over() -> None:
    """A key-value cache holds tensors, but they are no output."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    found = list(leaves(BaseModelOutputWithPast(last_hidden_state=A, past_key_values=cache)))
    assert [at for at, _ in found] == [("last_hidden_state",)]


def test_the_first_floating_tensor() -> None:
    """Without keys, integers and booleans are passed over."""
    assert pick((N, N > 1, {"x": [N, B]}, A), (), "site") is B


def test_a_leaf_by_its_keys() -> None:
    """The tensor itself, of whatever dtype."""
    assert pick((N, {"x": [A, B]}), ("1", "x", "1"), "site") is B
    assert pick((N, {"x": [A, B]}), ("0",), "site") is N


@pytest.mark.parametrize("keys", [("2",), ("1",), ("1", "x"), ("1", "x", "1", "0"), ("-1",)])
def test_keys_that_lead_nowhere(keys: tuple[str, ...]) -> None:
    """The error lists the leaves with dtype and shape."""
    with pytest.raises(SiteNotFoundError, match=r"'layers\.3:out'.*\[0\] int64\[3\], \[1\]\[x\]\[0\] float32\[2, 3\]"):
        pick((N, {"x": [A, B]}), keys, "layers.3:out")


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "no tensor at all"), ((N,), r"no floating tensor; it gives \[0\] int64\[3\]"), (N, r"\[\] int64")]
)
def test_nothing_floating(value: Any, shown: str) -> None:
    """Nothing to record."""
    with pytest.raises(SiteNotFoundError, match=shown):
        pick(value, (), "site")
