"""Values as given become blocks of rows; what does not fit is refused before anything is appended."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import features, lengths, same_bits, seeds

from tensortape.stores.errors import SchemaError
from tensortape.stores.ragged import cells, text_bytes


def stacked(found) -> np.ndarray:
    return np.concatenate(found.blocks)


@settings(deadline=None)
@given(features(), lengths, seeds)
def test_one_array_per_example_and_one_packed_array_are_the_same_rows(drawn, lengths, seed):
    rng = np.random.default_rng(seed)
    for feature in drawn:
        values = feature.values(rng, lengths)
        given = cells(feature.name, values, len(lengths), {})
        assert given.dtype == feature.dtype
        assert given.rows == (sum(lengths) if feature.ragged else len(lengths))
        if not feature.ragged:
            assert given.lengths is None
            continue
        packed = cells(feature.name, np.concatenate(values), len(lengths), {feature.name.split("/")[0]: lengths})
        assert given.lengths.tolist() == packed.lengths.tolist() == list(lengths)
        if sum(lengths):
            assert given.shape == packed.shape == feature.shape
            assert same_bits(stacked(given), stacked(packed))


def test_lengths_of_a_table_are_for_its_packed_columns_only():
    """A column given as one array per example says its lengths itself."""
    values = [np.ones(2), np.ones(3)]
    assert cells("token/h", values, 2, {"token": [9, 9]}).lengths.tolist() == [2, 3]
    assert cells("token/h", values, 2, {"pair": [1, 1]}).lengths.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([1, 2], "int64"), ([1.5, 2], "float64"), ([True, False], "bool"), (np.array([1, 2], ">i2"), "int16"), (["a", "b"], "text")],
)
def test_plain_lists_get_the_dtype_of_their_values(values, dtype):
    assert cells("example/y", values, 2, {}).dtype == dtype


@pytest.mark.parametrize("values", [["a", "é"], ("a", "é"), np.array(["a", "é"]), np.array(["a", "é"], object)])
def test_text_may_be_a_list_or_an_array(values):
    found = cells("example/t", values, 2, {})
    assert (found.dtype, found.shape) == ("text", ())
    assert found.blocks[0].tolist() == ["a", "é"]


def test_text_per_token():
    found = cells("token/t", [["a", "b"], np.array([], object), ["c"]], 3, {})
    assert found.dtype == "text"
    assert found.lengths.tolist() == [2, 0, 1]


def test_an_example_without_rows_says_nothing_about_dtype():
    """`[]` is an array of float64 for numpy, but no reason to refuse its neighbours."""
    found = cells("token/h", [[], np.ones((2, 3), np.float16), []], 3, {})
    assert (found.dtype, found.shape, found.lengths.tolist()) == ("float16", (3,), [0, 2, 0])


REFUSED = [
    ("example/y", [1, 2, 3], {}, "needs 2 values, one per row of its table, but got 3"),
    ("example/y", 5, {}, "needs 2 values, one per row of its table, but got a single value"),
    ("example/y", "ab", {}, "got a single value"),
    ("token/h", [np.ones(3)], {}, "needs one array per example, 2 in all, but got 1"),
    ("token/h", np.ones(5), {}, r"rows of all examples in one array need lengths=\{'token'"),
    ("token/h", 5, {}, "needs one array per example, 2 in all, but got int"),
    ("token/h", [1, 2], {}, "needs one array of rows per example, but got single values"),
    ("token/h", ["ab", "cd"], {}, "needs one array of rows per example, but got single values"),
    ("token/h", np.ones(5), {"token": [2, 4]}, "needs 6 values, one per row of its table, but got 5"),
    ("token/h", [np.ones((2, 3)), np.ones((2, 4))], {}, "several dtypes or shapes"),
    ("token/h", [np.ones(2, np.float16), np.ones(2, np.float32)], {}, "several dtypes or shapes"),
    ("token/h", [np.ones(2, ml_dtypes.bfloat16), np.ones(2, np.uint16)], {}, "several dtypes or shapes"),
    ("example/y", [1, None], {}, "'example/y': values of kind list have no numeric dtype"),
    ("example/y", np.array([{}, []], object), {}, "'example/y'"),
    ("example/y", ["a", 1, None], {}, "'example/y'"),
    ("token/h", [np.ones(2), None], {}, "'token/h'"),
    ("example/y", np.zeros(2, np.complex64), {}, "'example/y'.*'complex64' cannot be stored"),
    ("tokens/h", [1, 2], {}, "names no table"),
]


@pytest.mark.parametrize(("name", "values", "lengths", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_what_was_needed(name, values, lengths, message):
    with pytest.raises(SchemaError, match=message):
        cells(name, values, 2, lengths)


@pytest.mark.parametrize("values", [[[1], [1, 2]], [np.ones(2), np.ones(3)]])
def test_rows_of_unequal_shape_are_refused_by_name(values):
    """numpy's own message for such lists does not say which column is meant."""
    with pytest.raises(SchemaError, match="'example/y'"):
        cells("example/y", values, 2, {})


@pytest.mark.parametrize("form", [np.array, lambda texts: np.array(texts, object), list])
def test_several_texts_per_row_are_refused(form):
    """Text has no feature axes."""
    with pytest.raises(SchemaError, match="'example/t'"):
        cells("example/t", form([["a", "b"], ["c", "d"]]), 2, {})


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), max_size=10), st.integers(0, 1000))
def test_text_is_utf8_bytes_and_ends(texts, offset):
    bytes_, ends = text_bytes(np.array(texts, object), offset)
    starts = [offset, *ends.tolist()]
    assert ends.dtype == np.int64
    assert [bytes_[a - offset : b - offset].tobytes().decode() for a, b in zip(starts, ends.tolist(), strict=False)] == texts
    assert len(bytes_) == (ends[-1] - offset if texts else 0)


def test_bytes_are_counted_as_stored():
    found = cells("token/h", [np.ones((2, 3), ml_dtypes.bfloat16), np.ones((1, 3), ml_dtypes.bfloat16)], 2, {})
    assert found.nbytes == 3 * 3 * 2
