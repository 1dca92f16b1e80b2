"""Names on disk: reversible, unlike each other on every file system, short enough."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import unicode_names

from tensortape.stores import names
from tensortape.stores.errors import SchemaError

WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


@settings(deadline=None)
@given(unicode_names.filter(lambda name: len(name.encode()) * 3 < names.LIMIT))
def test_short_names_come_back_from_disk(name):
    assert names.from_disk(names.to_disk(name)) == name


@settings(deadline=None)
@given(st.text(max_size=2000))
def test_names_on_disk_are_portable(name):
    """Lower-case letters, digits and `_ . - ~`; at most 200 bytes; nothing that Zarr or an operating system keeps for itself."""
    file_name = names.to_disk(name)
    assert re.fullmatch(r"[a-z0-9_.~-]*", file_name)
    assert len(file_name.encode()) <= names.LIMIT
    assert not file_name.endswith(".")
    assert not file_name.startswith((".", "__", "c."))
    assert file_name not in ("zarr.json", "c")
    assert not WINDOWS.fullmatch(file_name)


@settings(deadline=None, max_examples=120)
@given(unicode_names, unicode_names)
def test_two_names_never_share_a_file_even_where_case_is_ignored(first, second):
    if first != second:
        assert names.to_disk(first).casefold() != names.to_disk(second).casefold()


@settings(deadline=None)
@given(unicode_names, st.sampled_from([str.upper, str.lower, str.title, str.swapcase]))
def test_names_that_differ_in_case_alone_stay_apart(name, change):
    if change(name) != name:
        assert names.to_disk(change(name)).casefold() != names.to_disk(name).casefold()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_letters_stay_apart(form):
    """macOS treats both forms of `é` as one name; on disk they are plain ASCII."""
    names_on_disk = {names.to_disk("é"), names.to_disk(unicodedata.normalize("NFD", "é"))}
    assert len(names_on_disk) == 2
    assert names.from_disk(names.to_disk(unicodedata.normalize(form, "é"))) == unicodedata.normalize(form, "é")


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        ("layers.3:out", "layers.3~3aout"),
        ("a/b", "a~2fb"),
        ("Upper", "~55pper"),
        ("~3a", "~7e3a"),
        ("zarr.json", "~7aarr.json"),
        ("c", "~63"),
        ("c.0.0", "~63.0.0"),
        ("con", "~63on"),
        ("nul.txt", "~6eul.txt"),
        ("com1", "~63om1"),
        (".hidden", "~2ehidden"),
        ("..", "~2e~2e"),
        ("__init__", "~5f_init__"),
        ("trailing.", "trailing~2e"),
        ("layers.3", "layers.3"),
        ("color", "color"),
        ("", ""),
    ],
)
def test_what_a_name_becomes(name, file_name):
    assert names.to_disk(name) == file_name
    assert names.from_disk(file_name) == name


@pytest.mark.parametrize("length", [199, 200])
def test_a_name_of_up_to_200_bytes_is_kept_whole(length):
    assert names.to_disk("x" * length) == "x" * length


@pytest.mark.parametrize("name", ["x" * 201, "x" * 199 + ".", "é" * 67, "C" * 67, "~" * 3000])
def test_a_longer_name_is_cut_and_ends_in_a_hash(name):
    file_name = names.to_disk(name)
    assert len(file_name) <= names.LIMIT
    assert re.fullmatch(r"[^~]*(~[0-9a-f]{2}[^~]*)*~~[0-9a-f]{32}", file_name), "an escape is never cut in two"
    with pytest.raises(ValueError, match="was cut"):
        names.from_disk(file_name)


def test_long_names_with_the_same_beginning_stay_apart():
    assert names.to_disk("x" * 300 + "a") != names.to_disk("x" * 300 + "b")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("token/layers.3:out", ("token", "layers.3:out")),
        ("token.image/h", ("token.image", "h")),
        ("pair.a.b/w", ("pair.a.b", "w")),
        ("example/a/b", ("example", "a/b")),
        ("step/loss", ("step", "loss")),
    ],
)
def test_a_column_is_split_into_table_and_short_name(name, parts):
    assert names.split(name) == parts


@pytest.mark.parametrize("name", ["h", "token", "token/", "/h", "tokens/h", "token./h", "Example/y", "example.x/y", "step.1/y", ""])
def test_a_column_of_no_table_is_refused_with_the_tables_there_are(name):
    with pytest.raises(SchemaError, match=r"write 'example/<name>', 'token/<name>'"):
        names.split(name)


def test_only_tokens_and_pairs_are_ragged():
    tables = ["token", "token.a", "pair", "pair.a.b", "example", "step"]
    assert [table for table in tables if names.is_ragged(table)] == tables[:4]
