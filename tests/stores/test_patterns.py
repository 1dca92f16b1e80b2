"""Patterns that select sites, checked against small lists of module paths."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortape.stores.errors import SchemaError
from tensortape.stores.patterns import ALIASES, Alias, Pattern, SiteName, parse_site

PATHS = [
    "",
    "embed",
    "layers.0",
    "layers.0.mlp",
    "layers.0.self_attn.q_proj",
    "layers.11",
    "layers.11.mlp",
    "encoder.layers.0.mlp",
    "model.encoder.layers.0.mlp.act",
]


def matching(text: str, sites=None) -> list[str]:
    return [path for path in sites or PATHS if Pattern(text).matches_path(SiteName(path))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        ("embed", ["embed"]),
        ("layers.0", ["layers.0"]),
        ("layers.*", ["layers.0", "layers.11"]),
        ("layers.1*", ["layers.11"]),
        ("layers.*1", ["layers.11"]),
        ("*", ["embed"]),
        ("*.*", ["layers.0", "layers.11"]),
        ("layers.*.mlp", ["layers.0.mlp", "layers.11.mlp"]),
        ("**.mlp", ["layers.0.mlp", "layers.11.mlp", "encoder.layers.0.mlp"]),
        ("**.layers.0.mlp", ["layers.0.mlp", "encoder.layers.0.mlp"]),
        ("layers.0.**", ["layers.0", "layers.0.mlp", "layers.0.self_attn.q_proj"]),
        ("**", PATHS),
        ("**.layers.**.act", ["model.encoder.layers.0.mlp.act"]),
        ("**.**.mlp", ["layers.0.mlp", "layers.11.mlp", "encoder.layers.0.mlp"]),
        ("layers.0.*_attn.?_proj", []),
        ("layers.[0-9]", []),
        ("layers", []),
        ("layers.0.ml", []),
    ],
)
def test_a_star_is_one_segment_or_a_part_of_one_and_two_stars_any_number(text, expected):
    assert matching(text) == expected


def test_dots_and_other_signs_in_a_pattern_stand_for_themselves():
    assert matching("a+b", ["a+b", "aab"]) == ["a+b"]
    assert matching("layers.0", ["layersx0"]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"re:layers\.\d+", ["layers.0", "layers.11"]),
        (r"re:.*(mlp|attn)", ["layers.0.mlp", "layers.11.mlp", "encoder.layers.0.mlp"]),
        (r"re:mlp", []),
        (r"re:.*q_proj:out", ["layers.0.self_attn.q_proj"]),
        (r"re:.*:in", []),
        (r"re:", [""]),
    ],
)
def test_a_regular_expression_fits_the_whole_path_or_path_and_port(text, expected):
    assert matching(text) == expected


def test_a_regular_expression_for_paths_alone_means_the_port_out():
    site = SiteName("layers.0", "in")
    assert not Pattern(r"re:layers\.0").matches_path(site)
    assert Pattern(r"re:layers\.0:in").matches_path(site)


def test_a_broken_regular_expression_is_refused_with_what_was_given():
    with pytest.raises(SchemaError, match=r"re:\("):
        Pattern("re:(").matches_path(SiteName("layers.0"))


def test_calls_are_picked_by_number_and_all_taken_without():
    calls = [SiteName("head", call=number) for number in (1, 2, 12)]
    assert [site.call for site in calls if Pattern("head#2").matches_path(site)] == [2]
    assert [site.call for site in calls if Pattern("head").matches_path(site)] == [1, 2, 12]


RESID = [Alias("", "resid_post", layer, 12) for layer in range(12)]


def layers_of(text: str, aliases=RESID) -> list[int]:
    return [alias.layer for alias in aliases if Pattern(text).matches_alias(alias)]


SLICES = ["0:12:2", "3", "-1", "-12", "2:5", ":3", "9:", "-3:", ":-10", "::5", "::-1", "10:2:-4", "5:5", ":", "-100:2", "4:100"]


@pytest.mark.parametrize("text", SLICES)
def test_layers_are_picked_as_python_picks_from_a_list(text):
    """An alias with an index or a slice, negative numbers and steps included."""
    picked = eval(f"list(range(12))[{text}]")
    assert layers_of(f"resid_post[{text}]") == sorted([picked] if isinstance(picked, int) else picked)


@pytest.mark.parametrize("text", ["12", "-13", "99"])
def test_a_layer_that_is_not_there_is_not_picked(text):
    assert layers_of(f"resid_post[{text}]") == []


def test_an_alias_without_layers_picks_all_of_them_and_no_other_alias():
    assert layers_of("resid_post") == list(range(12))
    assert layers_of("resid_pre") == []
    assert layers_of("resid_post", [Alias("", "resid_pre", 0, 2)]) == []


def test_an_alias_that_has_no_layers_is_not_picked_by_an_index():
    embed = Alias("", "embed")
    assert Pattern("embed").matches_alias(embed)
    assert not Pattern("embed[0]").matches_alias(embed)


@pytest.mark.parametrize("text", ["resid_post[-]", "resid_post[0:4:0]", "resid_post[:-:]", "resid_post[1:-]"])
def test_broken_slices_are_refused_with_what_was_given(text):
    with pytest.raises(SchemaError, match="resid_post"):
        Pattern(text).matches_alias(RESID[0])


@pytest.mark.parametrize(
    ("text", "stacks"),
    [
        ("resid_post", ["encoder.layers", "decoder", "model.decoder"]),
        ("encoder.layers.resid_post", ["encoder.layers"]),
        ("decoder.resid_post", ["decoder", "model.decoder"]),
        ("model.decoder.resid_post", ["model.decoder"]),
        ("coder.resid_post", []),
        ("encoder.resid_post", []),
    ],
)
def test_a_stack_is_picked_by_its_name_or_the_end_of_it(text, stacks):
    aliases = [Alias(stack, "resid_post", 0, 1) for stack in ("encoder.layers", "decoder", "model.decoder")]
    assert [alias.stack for alias in aliases if Pattern(text).matches_alias(alias)] == stacks


def test_stack_and_layers_together():
    aliases = [Alias(stack, "mlp_out", layer, 3) for stack in ("encoder", "decoder") for layer in range(3)]
    chosen = [alias for alias in aliases if Pattern("decoder.mlp_out[-1]").matches_alias(alias)]
    assert chosen == [Alias("decoder", "mlp_out", 2, 3)]


@pytest.mark.parametrize(
    ("lens", "ours"),
    [
        ("blocks.3.hook_resid_pre", "resid_pre[3]"),
        ("blocks.3.hook_resid_mid", "resid_mid[3]"),
        ("blocks.11.hook_resid_post", "resid_post[11]"),
        ("blocks.0.hook_attn_out", "attn_out[0]"),
        ("blocks.0.hook_mlp_out", "mlp_out[0]"),
        ("blocks.*.hook_mlp_out", "mlp_out"),
        ("hook_embed", "embed"),
        ("ln_final.hook_normalized", "final_norm"),
    ],
)
def test_transformer_lens_names_are_the_same_sites(lens, ours):
    every = [Alias("", name, layer, 12) for name in ALIASES for layer in [None, *range(12)]]
    chosen = [alias for alias in every if Pattern(lens).matches_alias(alias)]
    assert chosen == [alias for alias in every if Pattern(ours).matches_alias(alias)]
    assert chosen
    assert Pattern(lens)._alias is not None


def test_other_text_is_no_alias():
    texts = ["layers.3", "blocks.3", "blocks.x.hook_mlp_out", "blocks.3.hook_nonsense", "resid", "resid_posts", "re:resid_post"]
    assert [text for text in texts if Pattern(text)._alias is not None] == []


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("layers.3", None),
        ("layers.3:in", "in"),
        ("layers.3:out[1]", "out[1]"),
        ("layers.*:out[last_hidden_state][0]", "out[last_hidden_state][0]"),
        ("resid_post[3]:out", "out"),
        ("layers.3#2:in", "in"),
        ("re:layers:in", None),
    ],
)
def test_the_port_a_pattern_asks_for(text, port):
    assert Pattern(text).port == port


@pytest.mark.parametrize("port", ["", "output", "out[", "out[]", "out]", "out[1", "inn", "out[a]b", "OUT", "out.[1]", "out[[1]]"])
def test_a_port_that_there_is_not_is_refused_with_those_there_are(port):
    with pytest.raises(SchemaError, match=r"ports are 'out', 'in'"):
        _ = Pattern(f"layers.3:{port}").port
    if port:
        with pytest.raises(SchemaError, match=r"ports are 'out', 'in'"):
            parse_site(f"layers.3:{port}")


@pytest.mark.parametrize(
    ("text", "base", "leaf"),
    [("a", "out", ()), ("a:in", "in", ()), ("a:out[1]", "out", ("1",)), ("a:in[x][0]", "in", ("x", "0")), (":out", "out", ())],
)
def test_base_and_leaf_of_a_port(text, base, leaf):
    assert (parse_site(text).base, parse_site(text).leaf) == (base, leaf)


@pytest.mark.parametrize("text", ["a#b", "a#", "a##2", "a#2#3"])
def test_text_that_is_no_site_is_refused(text):
    with pytest.raises(SchemaError, match="is not a site"):
        parse_site(text)


paths = st.from_regex(r"([a-z_0-9]+(\.[a-z_0-9]+)*)?", fullmatch=True)
ports = st.from_regex(r"(in|out)(\[[a-z_0-9]+\]){0,2}", fullmatch=True)


@settings(deadline=None)
@given(paths, ports, st.integers(1, 99))
def test_a_site_name_can_be_written_and_parsed(path, port, call):
    site = SiteName(path, port, call)
    assert parse_site(str(site)) == site
    assert Pattern(str(site)).matches_path(site) or Pattern(str(site))._alias is not None


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "ab"]), max_size=5), st.lists(st.sampled_from(["a", "b", "*", "**"]), max_size=4))
def test_globs_agree_with_a_regular_expression_over_segments(path, pattern):
    """Each segment becomes `<segment>/`; `*` is one of them, `**` any number."""
    expression = "".join({"*": "[^/]+/", "**": "([^/]+/)*"}.get(part, f"{part}/") for part in pattern)
    expected = re.fullmatch(expression, "".join(f"{part}/" for part in path)) is not None
    assert Pattern(".".join(pattern)).matches_path(SiteName(".".join(path))) == expected
