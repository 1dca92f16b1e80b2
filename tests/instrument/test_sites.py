"""What users select, and what is then recorded under which name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import (
    BATCH,
    HIDDEN,
    LENGTHS,
    VOCABULARY,
    WIDTH,
    SdpaBlock,
    SharedBlocks,
    Structures,
    batch,
    bert,
    gpt2,
    llama,
    observed,
    packed,
    pair_batch,
    seeded,
    t5,
)
from torch import Tensor, nn

from tensortape.instrument import Recorder, Site
from tensortape.instrument.errors import LayoutError, SiteNotFoundError
from tensortape.instrument.sites import resolve
from tensortape.stores import Run
from tensortape.stores.errors import SchemaError

MASK = batch()["attention_mask"]


def names(model: nn.Module, selection: Any) -> list[str]:
    """Names of the taps that a selection resolves to, in order."""
    return [str(tap.name(tap.call or 1)) for tap in resolve(model, selection)]


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    """A model to select from."""
    return gpt2()


@pytest.fixture
def structures() -> Structures:
    """A model whose modules return anything but tensors."""
    return seeded(Structures)


# --- module paths ---------------------------------------------------------------------------------------------------------------


def test_star_is_one_segment(gpt: nn.Module) -> None:
    """`*` takes one path segment, or a part of one."""
    assert names(gpt, "transformer.h.*.mlp") == [f"transformer.h.{layer}.mlp:out" for layer in range(3)]
    assert names(gpt, "transformer.h.1.ln_*") == ["transformer.h.1.ln_1:out", "transformer.h.1.ln_2:out"]
    assert names(gpt, "transformer.h.*.*.c_f*") == [f"transformer.h.{layer}.mlp.c_fc:out" for layer in range(3)]


def test_two_stars_are_any_number_of_segments(gpt: nn.Module) -> None:
    """`**` takes none, one or many segments."""
    assert names(gpt, "**.mlp") == [f"transformer.h.{layer}.mlp:out" for layer in range(3)]
    assert names(gpt, "transformer.**.h.2.mlp") == ["transformer.h.2.mlp:out"]
    assert names(gpt, "transformer.h.0.**") == [
        f"{path}:out" for path, _ in gpt.named_modules() if (path + ".").startswith("transformer.h.0.")
    ]
    assert len(names(gpt, "**")) == len(list(gpt.modules()))


def test_a_whole_path_selects_one_module(gpt: nn.Module) -> None:
    """Without wildcards exactly that module is meant, at the port asked for."""
    assert names(gpt, "transformer.h.2.attn.c_attn") == ["transformer.h.2.attn.c_attn:out"]
    assert names(gpt, "transformer.h.2:in") == ["transformer.h.2:in"]
    assert names(gpt, "transformer.h.2:in[hidden_states]") == ["transformer.h.2:in[hidden_states]"]


def test_there_are_no_character_classes(gpt: nn.Module) -> None:
    """Brackets and question marks are no wildcards."""
    for pattern in ("transformer.h.[01].mlp", "transformer.h.?.mlp"):
        with pytest.raises(SiteNotFoundError):
            resolve(gpt, pattern)


def test_regular_expressions_match_whole_paths(gpt: nn.Module) -> None:
    """`re:` matches a path, or `path:port`, from its first to its last character."""
    assert names(gpt, r"re:.*\.h\.[02]\.(mlp|attn)") == [
        f"transformer.h.{layer}.{part}:out" for layer in (0, 2) for part in ("attn", "mlp")
    ]
    assert names(gpt, r"re:.*\.1\.mlp:in") == ["transformer.h.1.mlp:in"]
    assert names(gpt, r"re:.*\.1\.mlp:(in|out)") == ["transformer.h.1.mlp:in", "transformer.h.1.mlp:out"]
    with pytest.raises(SiteNotFoundError):
        resolve(gpt, "re:mlp")


def test_lists_come_in_the_models_order_each_site_once(gpt: nn.Module) -> None:
    """However often and in whatever order sites are named."""
    chosen = ["transformer.ln_f", "resid_post[1]", "transformer.h.1", Site("transformer.h.*"), "embed", "transformer.wte"]
    assert names(gpt, chosen) == ["transformer.wte:out", *(f"transformer.h.{n}:out" for n in range(3)), "transformer.ln_f:out"]


def test_callables_choose_ports(gpt: nn.Module) -> None:
    """A callable of (path, module) returns True, a port, several ports, or nothing."""

    def choose(path: str, module: nn.Module) -> Any:
        answers = {"transformer.h.0": True, "transformer.h.1": "in", "transformer.h.2": ["in", "out"], "transformer.wte": False}
        return answers.get(path, [] if isinstance(module, nn.LayerNorm) else None)

    expected = ["transformer.h.0:out", "transformer.h.1:in", "transformer.h.2:in", "transformer.h.2:out"]
    assert names(gpt, choose) == expected
    assert names(gpt, [choose, "transformer.h.0"]) == expected
    assert names(gpt, lambda path, module: isinstance(module, nn.Embedding)) == ["transformer.wte:out", "transformer.wpe:out"]


# --- aliases --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("", [0, 1, 2]), ("[1]", [1]), ("[-1]", [2]), ("[0:3:2]", [0, 2]), ("[1:]", [1, 2]), ("[:-1]", [0, 1]), ("[::-1]", [0, 1, 2])],
)
def test_aliases_with_slices(gpt: nn.Module, layers: str, expected: list[int]) -> None:
    """Indices and slices over layers, also negative ones, as in Python; the order stays the model's."""
    assert names(gpt, f"resid_post{layers}") == [f"transformer.h.{layer}:out" for layer in expected]


@pytest.mark.parametrize("layers", ["[3]", "[-4]", "[5:]", "[2:1]"])
def test_layers_that_are_not_there(gpt: nn.Module, layers: str) -> None:
    """An index beyond the last layer, or an empty slice, matches nothing."""
    with pytest.raises(SiteNotFoundError, match="matches nothing"):
        resolve(gpt, f"resid_post{layers}")


def test_stacks_of_an_encoder_decoder() -> None:
    """`encoder.` and `decoder.` pick a stack, none takes both; negative layers count in each stack."""
    model = t5()
    assert names(model, "encoder.resid_post") == [f"encoder.block.{layer}:out" for layer in range(3)]
    assert names(model, "decoder.resid_post[-1]") == ["decoder.block.1:out"]
    assert names(model, "resid_post[-1]") == ["encoder.block.2:out", "decoder.block.1:out"]
    assert names(model, "resid_post[2]") == ["encoder.block.2:out"]
    assert names(model, "decoder.final_norm") == ["decoder.final_layer_norm:out"]


def test_stacks_inside_a_users_module() -> None:
    """A stack is named by the end of its path, wherever the model stands."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = t5()

    assert names(Holder(), "decoder.resid_post[-1]") == ["inner.decoder.block.1:out"]
    assert names(Holder(), "inner.decoder.resid_post[-1]") == ["inner.decoder.block.1:out"]


def test_a_stack_that_is_not_there() -> None:
    """A model with one stack has no `decoder.`."""
    with pytest.raises(SiteNotFoundError):
        resolve(bert(), "decoder.resid_post")


@pytest.mark.parametrize(
    ("lens", "alias"),
    [
        ("blocks.1.hook_resid_pre", "resid_pre[1]"),
        ("blocks.1.hook_resid_mid", "resid_mid[1]"),
        ("blocks.*.hook_resid_post", "resid_post"),
        ("blocks.2.hook_attn_out", "attn_out[2]"),
        ("blocks.0.hook_mlp_out", "mlp_out[0]"),
        ("hook_embed", "embed"),
        ("ln_final.hook_normalized", "final_norm"),
    ],
)
def test_transformer_lens_names(gpt: nn.Module, lens: str, alias: str) -> None:
    """TransformerLens names are the same sites as the aliases."""
    assert names(gpt, lens) == names(gpt, alias) != []


def test_a_port_an_alias_does_not_have(gpt: nn.Module) -> None:
    """resid_pre is an input and resid_post an output: the other port is no such site."""
    assert names(gpt, "resid_pre[0]:in") == ["transformer.h.0:in"]
    for pattern in ("resid_pre[0]:out", "resid_post[0]:in"):
        with pytest.raises(SiteNotFoundError):
            resolve(gpt, pattern)


# --- nothing matches ------------------------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_names_the_three_closest(gpt: nn.Module) -> None:
    """The error quotes the pattern and the three names nearest to it, modules and aliases alike."""
    with pytest.raises(SiteNotFoundError) as raised:
        resolve(gpt, "transformer.h.1.mpl")
    quoted = re.findall(r"'([^']*)'", str(raised.value))
    assert quoted[0] == "transformer.h.1.mpl"
    assert len(quoted) == 4
    assert "transformer.h.1.mlp" in quoted[1:]
    with pytest.raises(SiteNotFoundError, match=r"'resid_post\[\d\]'"):
        resolve(gpt, "resid_pots")


def test_one_bad_pattern_in_a_list_is_an_error(gpt: nn.Module, make: Callable[..., Recorder]) -> None:
    """The others do not make up for it, and no run is begun."""
    with pytest.raises(SiteNotFoundError, match="'nowhere'"):
        make(gpt, ["resid_post", "nowhere"])


@pytest.mark.parametrize("selection", [[], (), lambda path, module: None])
def test_selecting_nothing(gpt: nn.Module, selection: Any) -> None:
    """An empty selection is an error that shows what to write."""
    with pytest.raises(SiteNotFoundError, match="resid_post"):
        resolve(gpt, selection)


@pytest.mark.parametrize("port", ["r", "out[", "out.gradient", "q.grad", "in[]", "outs", "keys"])
def test_unknown_ports(gpt: nn.Module, port: str) -> None:
    """A port that there is not is refused when it is selected."""
    with pytest.raises(SchemaError, match="no port"):
        resolve(gpt, f"transformer.h.0:{port}")
    with pytest.raises((SchemaError, SiteNotFoundError)):
        resolve(gpt, f"resid_post:{port}")


def test_unknown_ports_from_callables(gpt: nn.Module) -> None:
    """A callable's ports are looked at when it is asked, not in the middle of the forward."""
    with pytest.raises(SchemaError, match="no port"):
        resolve(gpt, lambda path, module: "keys" if path == "transformer.h.0" else None)


# --- options --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "error", "shown"),
    [
        ({"layout": "token feature"}, LayoutError, "example token"),
        ({"reduce": "median"}, ValueError, "mean, max, first, last"),
        ({"dtype": "float17"}, ValueError, "float16"),
        ({"dtype": "Tensor"}, ValueError, "float16"),
        ({"missing": "maybe"}, ValueError, "absent"),
    ],
)
def test_options_are_refused_where_they_are_written(option: dict[str, Any], error: type[Exception], shown: str) -> None:
    """Each error says what there is."""
    with pytest.raises(error, match=shown):
        Site("resid_post", **option)


def test_one_site_with_different_options(gpt: nn.Module) -> None:
    """A site cannot be stored in two dtypes under one name; asking twice for the same is fine."""
    with pytest.raises(ValueError, match="selected twice"):
        resolve(gpt, ["resid_post", Site("transformer.h.1", dtype="float16")])
    assert len(resolve(gpt, [Site("resid_post", dtype="float16"), Site("transformer.h.*", dtype="float16")])) == 3


def test_one_call_and_every_call_with_different_options() -> None:
    """A site selected once by its call and once with all calls cannot have two dtypes either."""
    model = seeded(SharedBlocks)
    with pytest.raises(ValueError, match="selected twice"):
        resolve(model, ["blocks.0", Site("blocks.0#2", dtype="float16")])


def test_a_site_and_its_reduction_are_two_columns(recorded: Callable[..., Run]) -> None:
    """A site may be recorded in full and reduced, in one run."""
    run = recorded(llama(), ["resid_post[1]", Site("resid_post[1]", reduce="mean"), Site("resid_post[1]", reduce="last")], batch())
    full = run["token/layers.1:out"]
    assert full.shape == (sum(LENGTHS), HIDDEN)
    assert run["example/layers.1:out|mean"].shape == (BATCH, HIDDEN)
    assert torch.equal(torch.stack([torch.tensor(full[n][-1]) for n in range(BATCH)]), run["example/layers.1:out|last"].to_torch())


# --- ports ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        ("tuple_out:out", lambda x, scale: x * scale),
        ("tuple_out:out[1]", lambda x, scale: x * scale),
        ("tuple_out:out[2]", lambda x, scale: x + scale),
        ("tuple_out:in", lambda x, scale: x),
        ("tuple_out:in[x]", lambda x, scale: x),
        ("tuple_out:in[0]", lambda x, scale: x),
        ("dict_out:out", lambda x, scale: x * scale + 1),
        ("dict_out:out[pair][0]", lambda x, scale: x * scale + 1),
        ("dict_out:out[pair][1][deep]", lambda x, scale: x * scale + 2),
        ("dataclass_out:out", lambda x, scale: x * scale + 2 - 1),
        ("dataclass_out:out[scores]", lambda x, scale: x * scale + 2 - 1),
        ("dataclass_out:out[extra][half]", lambda x, scale: (x * scale + 2) / 2),
    ],
)
def test_ports_of_modules_called_with_keywords(
    structures: Structures, recorded: Callable[..., Run], port: str, expected: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Inputs by name or place, leaves of tuples, dicts and dataclasses; by default the first floating tensor."""
    run = recorded(structures, port, batch())
    with torch.no_grad():
        x = structures.table(batch()["input_ids"])
    wanted = expected(x, torch.arange(1.0, HIDDEN + 1))
    assert torch.equal(run[f"token/{port}"].to_torch(), packed(wanted, MASK))


def test_a_leaf_of_one_row_per_example(structures: Structures, recorded: Callable[..., Run]) -> None:
    """A pooled leaf goes to the example table."""
    run = recorded(structures, ["dict_out:out[pooled]", ":out[pooled]"], batch())
    with torch.no_grad():
        assert torch.equal(run["example/:out[pooled]"].to_torch(), structures(**batch())["pooled"])
    assert torch.equal(run["example/dict_out:out[pooled]"].to_torch(), run["example/:out[pooled]"].to_torch())


def test_leaves_of_a_model_output(recorded: Callable[..., Run]) -> None:
    """What the model itself returns is a site too: the path is empty."""
    model = bert()
    run = recorded(model, [":out[last_hidden_state]", ":out[pooler_output]", ":out"], batch())
    with torch.no_grad():
        output = model(**batch())
    assert torch.equal(run["token/:out[last_hidden_state]"].to_torch(), packed(output.last_hidden_state, MASK))
    assert torch.equal(run["token/:out"].to_torch(), packed(output.last_hidden_state, MASK))
    assert torch.equal(run["example/:out[pooler_output]"].to_torch(), output.pooler_output)


def test_inputs_of_a_module_called_with_positions(recorded: Callable[..., Run]) -> None:
    """`in[1]` is the second parameter of the forward, whichever way it is given."""

    class Add(nn.Module):
        def forward(self, first: Tensor, second: Tensor, *, third: float = 0.0) -> Tensor:
            return first + second + third

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.add = nn.Embedding(VOCABULARY, HIDDEN), Add()

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids)
            return self.add(second=x, first=self.add(x, 2 * x, third=1.0))

    model = seeded(Model)
    run = recorded(model, ["add:in", "add:in[1]", "add:in[second]"], {"input_ids": batch()["input_ids"]})
    with torch.no_grad():
        x = model.table(batch()["input_ids"]).flatten(0, 1)
    assert torch.equal(run["token/add:in"].to_torch(), x)
    assert torch.equal(run["token/add:in[1]"].to_torch(), 2 * x)
    assert torch.equal(run["token/add#2:in"].to_torch(), x + 2 * x + 1)
    for leaf in ("1", "second"):
        assert torch.equal(run[f"token/add#2:in[{leaf}]"].to_torch(), x)


def test_inputs_of_a_module_that_takes_anything(recorded: Callable[..., Run]) -> None:
    """`in[0]` is the first argument also of `forward(*args, **kwargs)`."""

    class Anything(nn.Module):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return args[0] + kwargs["more"]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.anything = nn.Embedding(VOCABULARY, HIDDEN), Anything()

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids)
            return self.anything(x, more=x * 2)

    model = seeded(Model)
    run = recorded(model, ["anything:in", "anything:in[more]", "anything:in[0]"], {"input_ids": batch()["input_ids"]})
    with torch.no_grad():
        x = model.table(batch()["input_ids"]).flatten(0, 1)
    assert torch.equal(run["token/anything:in"].to_torch(), x)
    assert torch.equal(run["token/anything:in[more]"].to_torch(), x * 2)
    assert torch.equal(run["token/anything:in[0]"].to_torch(), x)


@pytest.mark.parametrize(
    ("port", "listed"),
    [
        ("tuple_out:out[3]", r"\[0\] int64\[5, 7\], \[1\] float32\[5, 7, 52\], \[2\]"),
        ("dict_out:out[pair]", r"\[pair\]\[0\].*\[pair\]\[1\]\[deep\].*\[pooled\]"),
        ("tuple_out:in[9]", r"\[x\].*\[scale\]"),
        ("dataclass_out:out[other]", r"\[scores\].*\[extra\]\[half\]"),
    ],
)
def test_a_leaf_that_is_not_there(structures: Structures, recorded: Callable[..., Run], port: str, listed: str) -> None:
    """The error lists the leaves there are, with dtypes and shapes."""
    with pytest.raises(SiteNotFoundError, match=listed):
        recorded(structures, port, batch())


def test_a_module_without_floating_output(recorded: Callable[..., Run]) -> None:
    """Without a leaf the first floating tensor is meant; there is none, and the error lists what there is."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.table = Argmax(), nn.Embedding(VOCABULARY, HIDDEN)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.count(self.table(input_ids))

    class Argmax(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x.argmax(-1), None

    model = seeded(Model)
    inputs = {"input_ids": batch()["input_ids"]}
    with pytest.raises(SiteNotFoundError, match=r"no floating tensor; it gives \[0\] int64\[5, 7\]"):
        recorded(model, "count", inputs)
    run = recorded(model, Site("count:out[0]", layout="example token ..."), inputs)
    assert run["token/count:out[0]"].dtype == "int64"
    assert torch.equal(run["token/count:out[0]"].to_torch(), model(**inputs)[0].flatten())


# --- calls ----------------------------------------------------------------------------------------------------------------------


def test_every_call_of_a_module_is_a_column(recorded: Callable[..., Run]) -> None:
    """The first call has no suffix, later ones `#2`, `#3`; ModuleList([block] * 3) is one module."""
    model = seeded(SharedBlocks)
    inputs = {"input_ids": batch()["input_ids"]}
    run = recorded(model, ["blocks.0", "blocks.0:in"], inputs, mask=MASK)
    seen = observed(model, inputs, {"blocks.0"})["blocks.0"]
    for suffix, (before, after) in zip(("", "#2", "#3"), seen, strict=True):
        assert torch.equal(run[f"token/blocks.0{suffix}:in"].to_torch(), packed(before, MASK))
        assert torch.equal(run[f"token/blocks.0{suffix}:out"].to_torch(), packed(after, MASK))
    assert len(run.sites) == 6


def test_one_call_can_be_chosen(recorded: Callable[..., Run]) -> None:
    """`#2` records that call alone."""
    model, inputs = seeded(SharedBlocks), {"input_ids": batch()["input_ids"]}
    run = recorded(model, "blocks.0#2", inputs)
    assert [column.name for column in run.sites] == ["token/blocks.0#2:out"]
    assert torch.equal(run.sites[0].to_torch(), observed(model, inputs, {"blocks.0"})["blocks.0"][1][1].flatten(0, 1))


def test_layers_that_share_a_block_are_told_apart(recorded: Callable[..., Run]) -> None:
    """Aliases count calls: resid_post[1] of shared blocks is the second call."""
    model, inputs = seeded(SharedBlocks), {"input_ids": batch()["input_ids"]}
    run = recorded(model, ["resid_pre[2]", "resid_post[1]"], inputs)
    assert {column.name for column in run.sites} == {"token/blocks.0#3:in", "token/blocks.0#2:out"}
    assert torch.equal(run.select("resid_pre[2]")[0].to_torch(), run.select("resid_post[1]")[0].to_torch())


def test_a_call_that_never_comes(make: Callable[..., Recorder]) -> None:
    """A fourth call of a module that is called three times is an error; nothing is recorded."""
    model = seeded(SharedBlocks)
    recorder = make(model, ["blocks.0", "blocks.0#4"])
    with pytest.raises(SiteNotFoundError, match=r"blocks\.0#4:out.*not called 4 times"), recorder.batch(ids=list(range(BATCH))):
        model(batch()["input_ids"])
    assert "0 pending" in repr(recorder.writer)


class TwoNames(nn.Module):
    """One module under two names, called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.second = self.first

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.second(self.table(input_ids))


def test_a_module_with_two_names_is_recorded_once(recorded: Callable[..., Run]) -> None:
    """One module under two names goes by its first, also when it is called through the second."""
    model, inputs = seeded(TwoNames), {"input_ids": batch()["input_ids"]}
    run = recorded(model, lambda path, module: isinstance(module, nn.Linear), inputs)
    assert [column.name for column in run.sites] == ["token/first:out"]
    assert torch.equal(run.sites[0].to_torch(), model(**inputs).flatten(0, 1))


def test_the_second_name_of_a_module_selects_it() -> None:
    """A name that the model has is found, even if another name stands for the same module; it is one tap."""
    assert names(seeded(TwoNames), "second") == ["first:out"]
    assert names(seeded(TwoNames), ["first", "second"]) == ["first:out"]


def test_a_module_that_is_never_called(structures: Structures, make: Callable[..., Recorder]) -> None:
    """Its site is an error after the first batch, of which nothing is recorded."""
    recorder = make(structures, ["table", "never"])
    with pytest.raises(SiteNotFoundError, match="never:out was never reached"), recorder.batch(ids=list(range(BATCH))):
        structures(**batch())
    assert "0 pending" in repr(recorder.writer)


# --- modules that do not always run ---------------------------------------------------------------------------------------------


class Sometimes(nn.Module):
    """A module that some batches skip."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.extra = SdpaBlock()
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, skip: bool = False) -> Tensor:
        x = self.table(input_ids)
        return self.head(x.mean(1)) if skip else self.head(self.extra(x).mean(1))


def record_sometimes(make: Callable[..., Recorder], sites: Any, skips: list[bool]) -> tuple[Recorder, Sometimes]:
    """Batches that skip the module or not; ids count on."""
    model = seeded(Sometimes)
    recorder = make(model, sites)
    for number, skip in enumerate(skips):
        with torch.no_grad(), recorder.batch(ids=[number * BATCH + row for row in range(BATCH)]):
            model(**batch(seed=number), skip=skip)
    return recorder, model


def test_absent_examples_own_no_rows(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """With missing='absent' the column has a table of its own, in which skipped examples are empty."""
    sites = ["table", Site("extra", missing="absent"), Site("extra.mlp", missing="absent")]
    recorder, model = record_sometimes(make, sites, [False, True, False])
    run = opened(recorder)
    with torch.no_grad():
        seen = [packed(model.extra(model.table(batch(seed=number)["input_ids"])), MASK) for number in (0, 2)]
    column = run["token.extra/extra:out"]
    assert run.tables["token.extra"].lengths.tolist() == [*LENGTHS, *[0] * BATCH, *LENGTHS]
    assert torch.equal(column.to_torch(), torch.cat(seen))
    assert column[BATCH].shape == (0, HIDDEN)
    assert run["token/table:out"].shape == (3 * sum(LENGTHS), HIDDEN)
    assert run["token.extra.mlp/extra.mlp:out"].shape == (2 * sum(LENGTHS), HIDDEN)


def test_absent_rows_of_examples(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """A reduced site that does not always run has one row, or none, per example."""
    recorder, _ = record_sometimes(make, ["table", Site("extra", reduce="mean", missing="absent")], [False, True, False])
    run = opened(recorder)
    assert run.tables["token.extra"].lengths.tolist() == [1] * BATCH + [0] * BATCH + [1] * BATCH


def test_a_module_that_stops_running(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """Without missing='absent' the batch is refused, what came before stands, and the next batch works."""
    recorder, model = record_sometimes(make, ["table", "extra"], [False])
    with pytest.raises(SiteNotFoundError, match=r"did not run: extra:out.*absent"), recorder.batch(ids=list(range(10, 15))):
        model(**batch(seed=1), skip=True)
    with recorder.batch(ids=list(range(20, 25))):
        model(**batch(seed=1))
    assert opened(recorder).ids == [*range(5), *range(20, 25)]


def test_a_module_that_runs_once_more(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """A further call in a later batch would be a column that others lack: an error."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, input_ids: Tensor, times: int) -> Tensor:
            x = self.table(input_ids)
            for _ in range(times):
                x = self.linear(x)
            return x

    model = seeded(Again)
    recorder = make(model, "linear")
    with recorder.batch(ids=range(5)):
        model(batch()["input_ids"], 1)
    with pytest.raises(SiteNotFoundError, match="for the first time: linear#2:out"), recorder.batch(ids=range(5, 10)):
        model(batch()["input_ids"], 2)
    assert opened(recorder).ids == list(range(5))


def test_absent_from_the_first_batch_on(make: Callable[..., Recorder]) -> None:
    """A site never captured in the first batch is an error, even with missing='absent': its columns would have no type."""
    with pytest.raises(SiteNotFoundError, match="never reached"):
        record_sometimes(make, ["table", Site("extra", missing="absent")], [True])


# --- what the run says of its sites ---------------------------------------------------------------------------------------------


def test_selection_offline_equals_selection_of_the_model(recorded: Callable[..., Run]) -> None:
    """The same patterns pick the same sites from the run as from the model."""
    model = t5()
    run = recorded(model, ["resid_pre", "resid_post", "attn_out", "mlp_out", "embed", "final_norm"], pair_batch())
    for pattern in ("resid_post[-1]", "encoder.resid_pre[0:2]", "decoder.attn_out", "embed", "encoder.block.*:out", "re:.*dropout"):
        chosen = [column.name.partition("/")[2] for column in run.select(pattern)]
        assert sorted(chosen) == sorted(
            name for name in names(model, pattern) if name in {c.name.partition("/")[2] for c in run.sites}
        )
        assert chosen


def test_site_table(recorded: Callable[..., Run]) -> None:
    """A recorded site knows its path, port, call, aliases, layout and reduction."""
    run = recorded(llama(), ["resid_post[1]", Site("resid_pre[2]", reduce="max")], batch())
    assert run["layers.1:out"].site == {
        "path": "layers.1",
        "port": "out",
        "call": 1,
        "aliases": [["", "resid_post", 1, 3]],
        "layout": "example token ...",
        "reduce": None,
        "target": None,
        "tap": '["layers.1", "out", null, false, {}]',
    }
    assert run["example/layers.2:in|max"].site["reduce"] == "max"


def test_token_ids_must_fit_the_batch(recorded: Callable[..., Run]) -> None:
    """A model whose first argument is a grid of integers is read as [B, T] tokens."""
    run = recorded(seeded(SharedBlocks), "table", {"input_ids": batch()["input_ids"]})
    assert run["token/input_ids"].shape == (BATCH * WIDTH,)
