"""What a run says of itself goes to JSON and back, and newer versions are refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, feature_shapes, unicode_names

from tensortape.stores import names
from tensortape.stores.errors import FormatVersionError, SchemaError
from tensortape.stores.schema import FORMAT, VERSION, ColumnSchema, PartDocument, RunDocument, column_schema

json_objects = st.dictionaries(
    st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.none(), st.lists(st.booleans()))
)


@st.composite
def column_schemas(draw):
    dtype = draw(st.sampled_from([*sorted(DTYPES), "text"]))
    shape = () if dtype == "text" else draw(feature_shapes)
    name = f"{draw(st.sampled_from(['token', 'token.x', 'pair', 'example']))}/{draw(unicode_names)}"
    site = draw(st.one_of(st.none(), json_objects))
    return column_schema(name, dtype, shape, shard_bytes=draw(st.integers(0, 1 << 27)), site=site, attributes=draw(json_objects))


@settings(deadline=None)
@given(column_schemas())
def test_a_column_comes_back_from_json(schema):
    document = json.loads(json.dumps(schema.to_json()))
    assert ColumnSchema.from_json(schema.name, document) == schema


def test_a_text_column_is_two_arrays():
    schema = column_schema("example/title", "text", shard_bytes=1 << 20)
    assert {role: (array.path, array.dtype) for role, array in schema.arrays.items()} == {
        "utf8": ("example/title/utf8", "uint8"),
        "end": ("example/title/end", "int64"),
    }
    assert (schema.table, names.split(schema.name)[1], schema.itemsize) == ("example", "title", 0)


def test_other_columns_are_one_array_in_the_folder_of_their_table():
    schema = column_schema("token.image/layers.3:out", "bfloat16", (7, 5), shard_bytes=1 << 20)
    assert [array.path for array in schema.arrays.values()] == ["token.image/layers.3~3aout"]
    assert (schema.table, names.split(schema.name)[1], schema.itemsize) == ("token.image", "layers.3:out", 2)
    assert schema.axes == ("feature.0", "feature.1")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)])
def test_a_feature_axis_of_no_values_is_refused(shape):
    with pytest.raises(SchemaError, match="every axis needs at least one value"):
        column_schema("token/h", "float32", shape, shard_bytes=1 << 20)


def test_a_codec_of_a_later_version_is_refused():
    document = column_schema("token/h", "float32", shard_bytes=1 << 20).to_json()
    document["arrays"]["values"]["codec"] = "pcodec"
    with pytest.raises(FormatVersionError, match="'pcodec'; update tensortape"):
        ColumnSchema.from_json("token/h", document)


def test_a_dtype_of_a_later_version_is_refused():
    document = column_schema("token/h", "float32", shard_bytes=1 << 20).to_json()
    document["arrays"]["values"]["dtype"] = "float4"
    with pytest.raises((FormatVersionError, SchemaError), match="float4"):
        ColumnSchema.from_json("token/h", document)


@settings(deadline=None)
@given(st.text(min_size=1), json_objects, json_objects, json_objects, json_objects)
def test_a_run_document_comes_back_from_its_attributes(uid, model, provenance, fingerprint, policy):
    document = RunDocument(uid, model, provenance, fingerprint, policy)
    attributes = json.loads(json.dumps(document.to_attributes()))
    assert RunDocument.from_attributes(attributes, "here") == document


def test_a_part_document_comes_back_from_its_attributes():
    document = PartDocument("uid", "session", kind="extension", rank=3, world_size=8, writer="tensortape 0.1.0")
    assert PartDocument.from_attributes(json.loads(json.dumps(document.to_attributes())), "here") == document


@pytest.mark.parametrize("version", [VERSION + 1, 99, "2", None])
def test_a_run_of_another_version_is_refused_by_name(version):
    attributes = RunDocument("uid").to_attributes()
    attributes[FORMAT]["version"] = version
    with pytest.raises(FormatVersionError, match=r"here is a tensortape run of format version .*update tensortape"):
        RunDocument.from_attributes(attributes, "here")


def test_a_part_of_a_newer_version_is_refused_by_name():
    """Whatever fields it has that this version does not know."""
    attributes = PartDocument("uid", "session").to_attributes()
    attributes[FORMAT]["version"] = VERSION + 1
    attributes[FORMAT]["part"]["something_new"] = 1
    with pytest.raises(FormatVersionError, match="here"):
        PartDocument.from_attributes(attributes, "here")


def test_a_part_says_which_step_it_rewinds_to():
    attributes = PartDocument("uid", "session", from_step=7).to_attributes()
    assert PartDocument.from_attributes(attributes, "here").from_step == 7


@pytest.mark.parametrize("attributes", [{}, {"other": {}}, {FORMAT: 1}, {FORMAT: {}}])
def test_other_groups_are_not_ours(attributes):
    with pytest.raises(SchemaError, match="here is a Zarr group, but not one of tensortape's"):
        RunDocument.from_attributes(attributes, "here")
