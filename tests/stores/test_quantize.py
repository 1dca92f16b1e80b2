"""int8 columns: held to a plain model of the rule, and to the error that they state of themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, bits, random_values, same_bits, seeds, small_chunks, writer_at

from tensortape.stores import Column, dtypes, open_run, quantize
from tensortape.stores.errors import FormatVersionError, SchemaError
from tensortape.stores.quantize import Int8, Quantization
from tensortape.stores.schema import ColumnSchema, column_schema

QUANTISED = ["bfloat16", "float16", "float32"]


def model_row(row: np.ndarray, outliers: set[int]) -> tuple[list[int], np.float32, list[Any]]:
    """Codes, scale and values read of one row: Python numbers, one feature at a time."""
    kind = row.dtype
    numbers = [0.0 if place in outliers else value for place, value in enumerate(flat(row[None])[0].tolist())]
    peak = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    scale = np.float32(np.float32(peak) / np.float32(126))
    codes, read = [], []
    for place, number in enumerate(numbers):
        if math.isnan(number):
            code = -128
        elif math.isinf(number):
            code = 127 if number > 0 else -127
        else:
            code = round(float(np.float32(number) / scale)) if scale else 0  # to even, as IEEE rounds
        codes.append(code)
        special = {-128: math.nan, 127: math.inf, -127: -math.inf}.get(code)
        value = np.float32(np.float32(code) * scale if special is None else special).astype(kind)
        read.append(row.ravel()[place] if place in outliers else value)
    return codes, scale, read


def coded(values: np.ndarray, plan: Int8) -> tuple[dict[str, np.ndarray], Quantization]:
    """All arrays of rows of the logical dtype, and what they cost."""
    name = dtypes.name_of(values)
    pieces = list(plan.encode(dtypes.to_stored(values), name))
    arrays = {role: np.concatenate([arrays[role] for arrays, _ in pieces]) for role in pieces[0][0]}
    return arrays, sum((cost for _, cost in pieces), Quantization())


def flat(values: np.ndarray) -> np.ndarray:
    """The numbers, float64 [rows, features]. A signalling NaN is one of them."""
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64).reshape(len(values), -1)


def decoded(values: np.ndarray, plan: Int8) -> np.ndarray:
    return plan.decode(coded(values, plan)[0], dtypes.name_of(values))


def ordinary(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(DTYPES[dtype])


@st.composite
def rows_and_outliers(draw):
    """Rows of any bits, or smooth ones; of any feature shape; with any positions as outliers."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=2)))
    count, dtype, rng = draw(st.integers(1, 9)), draw(st.sampled_from(QUANTISED)), np.random.default_rng(draw(seeds))
    features = math.prod(shape)
    outliers = tuple(sorted(draw(st.sets(st.integers(0, features - 1), max_size=features))))
    if draw(st.booleans()):
        return random_values(rng, dtype, (count, *shape)), outliers
    magnitude = draw(st.sampled_from([0, 1e-7, 1, 1e4]))
    return (rng.normal(size=(count, *shape)) * magnitude).astype(DTYPES[dtype]), outliers


@settings(deadline=None, max_examples=200)
@given(rows_and_outliers())
def test_codes_scales_and_values_are_those_of_the_model(drawn):
    """NaN, infinities, subnormals and zeros among them. A scale below float32's normal numbers rounds codes to at most 126."""
    rows, outliers = drawn
    plan = Int8(outliers)
    arrays, _ = coded(rows, plan)
    read = plan.decode(arrays, dtypes.name_of(rows))
    assert (arrays["codes"].dtype, arrays["codes"].shape, arrays["scale"].dtype) == (np.int8, rows.shape, np.float32)
    for number, row in enumerate(rows):
        codes, scale, values = model_row(row, set(outliers))
        assert arrays["scale"][number] == scale
        finite = [max(-126, min(code, 126)) if abs(code) not in (127, 128) else code for code in codes]
        assert arrays["codes"][number].ravel().tolist() == finite
        if finite == codes:
            expected = np.array(values, rows.dtype)
            nan = np.isnan(flat(expected)[:, 0])
            assert (np.isnan(flat(read[number : number + 1])[0]) == nan).all()
            exact = ~nan | np.isin(np.arange(nan.size), outliers)
            assert same_bits(read[number].ravel()[exact], expected[exact])


@settings(deadline=None, max_examples=100)
@given(rows_and_outliers())
def test_no_value_is_further_off_than_half_a_step_and_its_rounding(drawn):
    rows, outliers = drawn
    arrays, cost = coded(rows, Int8(outliers))
    exact, read = (flat(array) for array in (rows, Int8(outliers).decode(arrays, dtypes.name_of(rows))))
    finite = np.isfinite(exact)
    assert (np.isfinite(read) == finite).all()
    assert (read[~finite] == exact[~finite])[~np.isnan(exact[~finite])].all()
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}[dtypes.name_of(rows)]
    least = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149}[dtypes.name_of(rows)]
    step = arrays["scale"].astype(np.float64)[:, None]
    allowed = (0.5 + 1e-4) * step + unit * np.abs(np.where(finite, exact, 0)) * 1.02 + 127 * least
    error = np.abs(np.where(finite, read, 0) - np.where(finite, exact, 0))
    assert (error <= allowed).all()
    assert cost.largest_error == pytest.approx(np.delete(error, list(outliers), 1).max(initial=0), rel=1e-5)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_outliers_are_kept_bit_for_bit(dtype):
    """NaNs with payloads too; their codes are 0 and the scale does not know of them."""
    values = ordinary(dtype, (31, 5))
    every = random_values(np.random.default_rng(1), dtype, (31,))
    values[:, 3] = every
    arrays, _ = coded(values, Int8((3,)))
    assert same_bits(Int8((3,)).decode(arrays, dtype)[:, 3], every)
    assert not arrays["codes"][:, 3].any()
    assert arrays["scale"].max() < 0.1


@pytest.mark.parametrize("dtype", QUANTISED)
def test_nan_and_infinities_survive_and_leave_their_row_as_good_as_any(dtype):
    values = ordinary(dtype, (7, 101))
    clean = decoded(values, Int8())
    odd = values.copy()
    odd[2, [5, 50]], odd[2, 6], odd[4, 0], odd[5] = math.nan, math.inf, -math.inf, math.nan
    read = decoded(odd, Int8())
    assert np.isnan(read[2, [5, 50]].astype(float)).all()
    assert (read[2, 6], read[4, 0]) == (math.inf, -math.inf)
    assert np.isnan(read[5].astype(float)).all()
    same = np.isfinite(odd.astype(float))
    same[2], same[4] = False, False  # their scale may have changed
    assert same_bits(read[same], clean[same])
    finite = np.isfinite(odd[2].astype(float))
    assert np.abs(read[2][finite].astype(float) - values[2][finite].astype(float)).max() < 0.02


@pytest.mark.parametrize("extreme", ["largest", "smallest"])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_the_ends_of_a_dtypes_range_stay_finite(dtype, extreme):
    limits = __import__("ml_dtypes").finfo(DTYPES[dtype])
    value = {"largest": limits.max, "smallest": limits.smallest_subnormal}[extreme]
    values = np.array([[value, -value, 0, value]], DTYPES[dtype])
    read = decoded(values, Int8()).astype(np.float64)
    assert np.isfinite(read).all()
    if extreme == "largest":
        np.testing.assert_allclose(read, values.astype(np.float64), rtol=1e-2)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), seeds)
def test_codes_do_not_depend_on_how_rows_were_cut_into_appends(cuts, seed):
    values = ordinary("bfloat16", (sum(cuts) or 1, 7), seed)
    whole, cost = coded(values, Int8((2,)))
    pieces = [coded(piece, Int8((2,))) for piece in np.split(values, np.cumsum(cuts)) if len(piece)]
    for role, array in whole.items():
        assert np.array_equal(np.concatenate([arrays[role] for arrays, _ in pieces]), array)
    total = sum((part for _, part in pieces), Quantization())
    assert total.squared_error == pytest.approx(cost.squared_error)
    assert total.largest_error == cost.largest_error


# Outliers.


def planned(values: np.ndarray) -> tuple[int, ...]:
    blocks = [dtypes.to_stored(piece) for piece in np.array_split(values, 3)]
    return quantize.plan("token/h", dtypes.name_of(values), blocks).outliers


@pytest.mark.parametrize("dtype", QUANTISED)
def test_outliers_are_features_beyond_six_times_the_median(dtype):
    """The largest magnitude of each feature over all rows of the first append, at most one feature in a hundred, rounded up."""
    values = ordinary(dtype, (97, 331))
    values = np.clip(values, -1, 1)
    values[5] = 1  # now every feature's largest magnitude is 1
    assert planned(values) == ()
    values[50, 200] = -6
    assert planned(values) == ()
    values[50, 200] = -7
    assert planned(values) == (200,)
    values[60, [7, 300]], values[70, 9] = 50, 8
    assert planned(values) == (7, 9, 200, 300)
    values[80, 100:110] = 7.5
    assert planned(values) == (7, 9, 100, 300)  # four of 331: the largest, and of equals the first


def test_positions_are_those_of_the_flattened_features():
    values = ordinary("float32", (31, 3, 67))
    values[:, 2, 5] += 100
    assert planned(values) == (2 * 67 + 5,)


def test_what_is_not_finite_makes_no_outlier():
    values = ordinary("float16", (31, 53))
    values[3, 7], values[5, 8] = math.inf, math.nan
    assert planned(values) == ()


def test_without_rows_there_are_no_outliers():
    assert quantize.plan("token/h", "float32", []).outliers == ()
    assert quantize.plan("token/h", "float32", [np.empty((0, 300), np.float32)]).outliers == ()


def test_features_that_are_mostly_zero():
    """The median is 0 then: whatever is not stands out, but no more than one in a hundred."""
    values = np.zeros((5, 300), np.float32)
    values[0, :7] = np.arange(1, 8)
    assert planned(values) == (4, 5, 6)


# Columns of runs.


def write(path: Path, values: list[np.ndarray], *, name: str = "token/h", mode: str = "create", **options: Any) -> None:
    """An example and a commit per array."""
    with small_chunks(rows=16, chunk_bytes=1 << 10, shard_bytes=1 << 12), writer_at(path, mode=mode) as writer:
        writer.describe(name, **{"quantize": "int8", **options})
        held = len(writer.committed_ids)
        for number, rows in enumerate(values):
            writer.append(ids=[held + number], columns={name: [rows] if name.startswith("token") else rows})
            writer.commit()


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_quantised_column_reads_as_its_logical_dtype_and_shape(tmp_path, dtype, codec):
    """Whole, in blocks, by example and in any order: the same values, those of the rule."""
    values = [ordinary(dtype, (length, 7, 29), length) for length in (13, 0, 101, 2)]
    for rows in values:
        rows[:, 3, 3] += np.asarray(300, rows.dtype)
    write(tmp_path / "run.zarr", values, compress=codec)
    run = open_run(tmp_path / "run.zarr")
    column = run["token/h"]
    expected = decoded(np.concatenate(values), Int8((3 * 29 + 3,)))
    assert (column.shape, column.dtype, column.axes) == ((116, 7, 29), DTYPES[dtype], ("token", "feature.0", "feature.1"))
    assert same_bits(column.rows(), expected)
    assert same_bits(np.concatenate(list(column.blocks(17))), expected)
    assert same_bits(column[2], expected[13:114])
    assert column[1].shape == (0, 7, 29)
    assert same_bits(column.within(2, 5, 9), expected[18:22])
    picked = np.random.default_rng(0).integers(-116, 116, 50)
    assert same_bits(column.rows(picked), expected[picked])
    assert same_bits(column.rows(-1), expected[-1])
    assert column.to_torch().shape == (116, 7, 29)
    assert column.compress == codec
    assert run.verify().ok


def test_arrays_have_roles_and_say_what_they_are(tmp_path):
    values = ordinary("bfloat16", (50, 64))
    values[:, 9] += np.asarray(100, values.dtype)
    write(tmp_path / "run.zarr", [values], compress="lz4")
    run = open_run(tmp_path / "run.zarr")
    schema = run.parts[0].columns["token/h"]
    assert {role: (array.dtype, array.shape, array.codec) for role, array in schema.arrays.items()} == {
        "codes": ("int8", (64,), "lz4"),
        "scale": ("float32", (), "none"),
        "outliers": ("bfloat16", (1,), "lz4"),
    }
    assert run["token/h"].paths == ["parts/p000000/token/h/codes"]
    assert run["token/h"].nbytes == 50 * (64 + 4 + 2)
    document = json.loads(json.dumps(schema.to_json()))
    assert document["quantized"] == {"codes": "int8", "outliers": [9]}
    assert ColumnSchema.from_json("token/h", document) == schema


def measured(column: Column, values: np.ndarray, outliers: list[int]) -> tuple[float, float]:
    """Relative RMS and largest error, from what is read."""
    exact, read = (np.delete(rows.astype(np.float64).reshape(len(rows), -1), outliers, 1) for rows in (values, column.rows()))
    finite = np.isfinite(exact)
    error = read[finite] - exact[finite]
    return math.sqrt((error**2).sum() / (exact[finite] ** 2).sum()), np.abs(error).max()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1, 1e4])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_the_stated_error_is_that_of_what_is_read(tmp_path, dtype, magnitude):
    """Over several appends and sessions, each with outliers of its own and some rows that are not finite."""
    rng = np.random.default_rng(0)
    scale = min(max(magnitude, 1e-2), 30) if dtype == "float16" else magnitude
    values = [(rng.normal(size=(53, 67)) * scale).astype(DTYPES[dtype]) for _ in range(4)]
    for rows in values:
        rows[:, 12] += np.asarray(300 * scale, rows.dtype)
    values[1][3, 5], values[3][3, 6] = math.nan, -math.inf
    write(tmp_path / "run.zarr", values[:2])
    write(tmp_path / "run.zarr", values[2:], mode="resume")
    column = open_run(tmp_path / "run.zarr")["token/h"]
    assert isinstance(column.quantization, Quantization)
    relative, largest = measured(column, np.concatenate(values), [12])
    assert column.quantization.relative_rms == pytest.approx(relative, rel=1e-4)
    assert column.quantization.largest_error == pytest.approx(largest, rel=1e-5)
    assert 0.003 < relative < 0.02


def test_the_error_is_that_of_the_committed_rows(tmp_path):
    """Cumulative, in every record; a reader sees that of its commit."""
    writer = writer_at(tmp_path / "run.zarr")
    writer.describe("token/h", quantize="int8")
    first, second = ordinary("float32", (20, 11), 1), 10 * ordinary("float32", (20, 11), 2)
    writer.append(ids=["a"], columns={"token/h": [first]})
    writer.commit()
    early = open_run(tmp_path / "run.zarr")["token/h"]
    writer.append(ids=["b"], columns={"token/h": [second]})
    assert early.quantization == open_run(tmp_path / "run.zarr")["token/h"].quantization
    writer.close()
    late = open_run(tmp_path / "run.zarr")["token/h"]
    assert measured(early, first, [])[1] == early.quantization.largest_error
    assert late.quantization.largest_error == measured(late, np.concatenate([first, second]), [])[1]
    assert late.quantization.largest_error > 2 * early.quantization.largest_error


def test_exact_columns_state_no_error(tmp_path):
    with writer_at(tmp_path / "run.zarr") as writer:
        writer.describe("token/h", quantize="int8")
        columns = {"token/h": [ordinary("float32", (3, 5))], "token/x": [ordinary("float32", (3, 5))], "example/t": ["x"]}
        writer.append(ids=["a"], columns=columns)
    run = open_run(tmp_path / "run.zarr")
    assert run["token/x"].quantization is None
    assert run["example/t"].quantization is None
    assert Quantization().relative_rms == 0
    records = sorted((tmp_path / "run.zarr").glob("parts/p*/commits/*.json"))
    stated = json.loads(records[-1].read_bytes())["record"]["quantization"]
    assert stated == {"token/h": list(vars(run["token/h"].quantization).values())}


def test_a_column_may_be_exact_in_one_part_and_quantised_in_another(tmp_path):
    values = [ordinary("bfloat16", (23, 40), seed) for seed in range(2)]
    write(tmp_path / "run.zarr", values[:1])
    write(tmp_path / "run.zarr", values[1:], mode="resume", quantize=None)
    column = open_run(tmp_path / "run.zarr")["token/h"]
    assert same_bits(column[1], values[1])
    assert same_bits(column[0], decoded(values[0], Int8()))
    assert column.paths == ["parts/p000000/token/h/codes", "parts/p000001/token/h"]


def test_a_first_append_without_rows(tmp_path):
    rows = ordinary("float32", (9, 300))
    rows[:, 7] += 100
    write(tmp_path / "run.zarr", [rows[:0], rows])
    column = open_run(tmp_path / "run.zarr")["token/h"]
    assert "outliers" not in column.role_paths
    assert same_bits(column[1], decoded(rows, Int8()))


def test_columns_of_the_example_table_and_scalars(tmp_path):
    values = ordinary("float16", (11,))
    write(tmp_path / "run.zarr", [values[:1], values[1:2]], name="example/score")
    column = open_run(tmp_path / "run.zarr")["example/score"]
    assert column.shape == (2,)
    assert column.dtype == np.float16
    assert column[0] == pytest.approx(values[0], rel=1e-2)


def test_rows_that_are_cut_along_their_features(tmp_path, monkeypatch):
    """A code is one byte: rows of codes are cut later than those of values."""
    from tensortape.stores import layout

    monkeypatch.setattr(layout, "SPLIT_ROW_BYTES", 100)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 50)
    monkeypatch.setattr(layout, "SHARD_BYTES", 1000)
    rows = ordinary("float32", (11, 31, 7))
    for codec in ("none", "zstd"):
        with writer_at(tmp_path / codec) as writer:
            writer.describe("token/h", quantize="int8", compress=codec)
            writer.append(ids=["a", "b"], columns={"token/h": [rows[:6], rows[6:]]})
        column = open_run(tmp_path / codec)["token/h"]
        assert same_bits(column.rows(), decoded(rows, Int8()))
        assert same_bits(column.rows([10, 0, 5]), decoded(rows, Int8())[[10, 0, 5]])


@pytest.mark.parametrize("dtype", ["float64", "int64", "bool"])
def test_other_dtypes_are_refused_by_name(tmp_path, dtype):
    writer = writer_at(tmp_path / "run.zarr")
    writer.describe("token/h", quantize="int8")
    with pytest.raises(SchemaError, match=f"column 'token/h' is {dtype}, but quantize='int8' is for float16, bfloat16, float32"):
        writer.append(ids=["a"], columns={"token/h": [random_values(np.random.default_rng(0), dtype, (3, 4))]})
    assert not (tmp_path / "run.zarr").exists()


def test_text_is_refused(tmp_path):
    writer = writer_at(tmp_path / "run.zarr")
    writer.describe("example/t", quantize="int8")
    with pytest.raises(SchemaError, match="column 'example/t' is text"):
        writer.append(ids=["a"], columns={"example/t": ["x"]})


def test_wrong_names_are_refused_with_the_choices(tmp_path):
    with pytest.raises(SchemaError, match="quantize is one of int8, or None, not 'int4'"):
        writer_at(tmp_path / "run.zarr").describe("token/h", quantize="int4")


def test_codes_of_a_later_version_are_refused():
    document = column_schema("token/h", "float32", (4,), shard_bytes=1 << 20, quantized=Int8((1,))).to_json()
    document["quantized"]["codes"] = "int4"
    with pytest.raises(FormatVersionError, match="quantised to 'int4'; update tensortape"):
        ColumnSchema.from_json("token/h", document)


def test_nothing_given_is_changed():
    values = ordinary("float32", (5, 7))
    values[1, 2] = math.nan
    before = bits(values).copy()
    coded(values, Int8((3,)))
    assert np.array_equal(bits(values), before)
