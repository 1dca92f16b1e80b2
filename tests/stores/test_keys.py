"""What identifies an example: ids, phases and steps."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortape.stores import keys
from tensortape.stores.errors import KeyRepeatedError, SchemaError
from tensortape.stores.keys import KeySet, digest


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (("a",), ["a"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ([3, 4], [3, 4]),
        (range(2), [0, 1]),
        (np.array([3, 4], np.uint8), [3, 4]),
        ([np.int64(3), 4], [3, 4]),
        ([], []),
    ],
)
def test_ids_of_one_kind_become_a_plain_list(ids, expected):
    found = keys.normalise(ids)
    assert found == expected
    assert {type(id_) for id_ in found} <= {str, int}


def test_ids_may_be_a_torch_tensor():
    torch = pytest.importorskip("torch")
    assert keys.normalise(torch.tensor([5, 6])) == [5, 6]


@pytest.mark.parametrize("ids", [None, 5, "abc", 3.5, object(), np.int64(3)])
def test_ids_that_are_no_sequence_are_refused(ids):
    with pytest.raises(SchemaError, match="ids must be a sequence"):
        keys.normalise(ids)


def test_a_single_number_in_an_array_is_no_sequence_of_ids():
    with pytest.raises(SchemaError, match="ids must be a sequence"):
        keys.normalise(np.array(3))


@pytest.mark.parametrize("ids", [["a", 1], [1, None], [None], [1.5], [True], np.array([1.0]), [b"a"], [["a"]], np.array([[1, 2]])])
def test_ids_of_mixed_or_other_kinds_are_refused_with_what_was_given(ids):
    with pytest.raises(SchemaError, match="ids must all be strings or all be integers; got"):
        keys.normalise(ids)


@pytest.mark.parametrize("ids", [{"a", "b"}, b"ab", {1, 2}])
def test_sets_and_bytes_are_refused(ids):
    """A set has no order that examples could follow, and the bytes of a text are not the ids of anything."""
    with pytest.raises(SchemaError, match="ids must be a sequence"):
        keys.normalise(ids)


def test_an_id_given_twice_is_named():
    with pytest.raises(KeyRepeatedError, match="'b' is given twice"):
        keys.check_unique(["a", "b", "c", "b"])


plain_text = st.text(max_size=20)
any_key = st.tuples(st.one_of(plain_text, st.integers(-(2**63), 2**63 - 1)), plain_text, st.integers(-5, 5))


@settings(deadline=None, max_examples=120)
@given(any_key, any_key)
def test_different_keys_have_different_digests(first, second):
    assert (digest(*first) == digest(*second)) == (first == second)


def test_an_integer_and_its_text_are_different_keys():
    assert digest(1) != digest("1")


def test_zero_bytes_in_an_id_do_not_make_it_another_key():
    """The fields of a key must not run into one another: ("a", phase "b\\0c") is not ("a\\0b", phase "c")."""
    assert digest("a", "b\0c", 1) != digest("a\0b", "c", 1)


@pytest.mark.parametrize(("plain", "other"), [(3, np.int64(3)), (3, np.int32(3)), ("a", np.str_("a"))])
def test_numpy_scalars_are_the_same_keys_as_plain_values(plain, other):
    """`row["id"] in writer.committed_ids` must not depend on where the id comes from."""
    held = KeySet()
    held.add([digest(plain)])
    assert plain in held
    assert other in held
    assert (other, "record", -1) in held


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(any_key, max_size=15), max_size=6), st.lists(any_key, max_size=10), st.integers(1, 8))
def test_a_key_set_holds_what_was_added(groups, others, merge_at):
    """Whenever its recent keys are merged into the sorted ones."""
    held, model = KeySet(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_MERGE_AT", merge_at)
        for group in groups:
            new = set(group) - model
            held.add(digest(*key) for key in new)
            model |= new
    assert len(held) == len(model)
    assert all(key in held for key in model)
    assert all((key in held) == (key in model) for key in others)


def test_keys_that_are_merged_already_are_counted_once(monkeypatch):
    """A run with extension parts states its keys several times over."""
    monkeypatch.setattr(keys, "_MERGE_AT", 4)
    held = KeySet()
    held.add(digest(number) for number in range(10))
    held.add(digest(number) for number in range(3))
    assert len(held) == 10


def test_keys_whose_digest_ends_in_a_zero_byte_are_found_after_merging(monkeypatch):
    """numpy drops trailing zero bytes of fixed-width byte strings: one key in 256 has some."""
    monkeypatch.setattr(keys, "_MERGE_AT", 1)
    ending_in_zero = [number for number in range(3000) if digest(number)[-1] == 0]
    assert len(ending_in_zero) > 3
    held = KeySet()
    held.add(map(digest, ending_in_zero))
    assert [number for number in ending_in_zero if number not in held] == []
    assert [number for number in range(3000) if number in held] == ending_in_zero


def test_looking_up_a_key_takes_no_memory_that_grows_with_the_set(monkeypatch):
    """A copy of all keys for each look-up would make a large run quadratic."""
    monkeypatch.setattr(keys, "_MERGE_AT", 1000)
    held = KeySet()
    held.add(digest(number) for number in range(70_000))
    tracemalloc.start()
    try:
        assert [number in held for number in (0, 69_999, 70_000)] == [True, True, False]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10


def test_content_ids_depend_on_tokens_alone():
    assert keys.content_id([1, 2, 3]) == keys.content_id(np.array([1, 2, 3], np.int32))
    assert keys.content_id([1, 2, 3]) != keys.content_id([1, 2, 4])
    assert keys.content_id([1, 2]) != keys.content_id([1, 2, 0])
