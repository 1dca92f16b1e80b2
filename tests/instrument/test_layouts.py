"""Which axis is what: inferred where one reading fits, asked for where several do, pinned from then on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    BATCH,
    DECODER_LENGTHS,
    HIDDEN,
    INNER,
    LENGTHS,
    PAD,
    VOCABULARY,
    WIDTH,
    batch,
    bert,
    features,
    images,
    observed,
    opt,
    packed,
    padding_mask,
    pair_batch,
    random_tokens,
    seeded,
    swin,
    t5,
    torch_encoder,
    vit,
)
from torch import Tensor, nn

from tensortape.instrument import Recorder, Site
from tensortape.instrument.errors import LayoutError
from tensortape.instrument.layouts import Layout, infer, parse
from tensortape.instrument.streams import MAIN, Stream
from tensortape.stores import Run
from tensortape.stores.errors import SchemaError

MASK = padding_mask()
KEPT = sum(LENGTHS)


class Shapes(nn.Module):
    """One embedding seen with its axes in every order."""

    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        for name in ("flat", "kept", "time_first", "pooled", "heads", "channels", "vector", "scalar", "changing"):
            self.add_module(name, nn.Identity())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pool: bool = False) -> Tensor:
        """[B, T] to [B, d]."""
        x = self.table(input_ids)
        self.flat(x.flatten(0, 1))
        self.kept(x[attention_mask.bool()])
        self.time_first(x.transpose(0, 1))
        self.heads(x.unflatten(2, (-1, 1)))
        self.channels(x[:, :4])
        self.vector(x[0, 0])
        self.scalar(x.sum())
        self.changing(x.mean(1) if pool else x)
        return self.pooled(x.mean(1))


@pytest.fixture
def shapes() -> Shapes:
    """With d unlike B and T."""
    return seeded(Shapes)


def embedded(shapes: Shapes) -> Tensor:
    """[B, T, d]."""
    return shapes.table(batch()["input_ids"]).detach()


def stream(width: int = WIDTH, lengths: tuple[int, ...] = LENGTHS) -> Stream:
    """A padded stream."""
    return Stream(len(lengths), width, padding_mask(lengths=lengths, width=width).bool())


# --- inferred -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((BATCH, WIDTH, HIDDEN), "example token ..."),
        ((BATCH, WIDTH, 2, 26), "example token ..."),
        ((WIDTH, BATCH, HIDDEN), "token example ..."),
        ((BATCH * WIDTH, INNER), "(example token) ..."),
        ((BATCH * WIDTH,), "(example token) ..."),
        ((KEPT, INNER), "(example token) ..."),
        ((BATCH, HIDDEN), "example ..."),
    ],
)
def test_one_reading_fits(shape: tuple[int, ...], expected: str) -> None:
    """Every layout is told from the shape where sizes differ."""
    assert str(infer(shape, BATCH, {MAIN: stream()}, "site", opens=None)) == expected


@pytest.mark.parametrize(
    ("shape", "rows", "width", "readings"),
    [
        ((BATCH, WIDTH), BATCH, WIDTH, ["example token", "example"]),
        ((5, 5, HIDDEN), 5, 5, ["example token", "token example"]),
        ((5, 5), 5, 5, ["example token", "token example", "example"]),
    ],
)
def test_several_readings_fit(shape: tuple[int, ...], rows: int, width: int, readings: list[str]) -> None:
    """[B, d] with d == T, and anything with B == T: the error lists the readings and shows how to say which."""
    with pytest.raises(LayoutError, match="several layouts fit") as raised:
        infer(shape, rows, {MAIN: Stream(rows, width)}, "layers.3:out", opens="layers.3")
    for reading in readings:
        assert f"'{reading} ...'" in str(raised.value)
    assert "Site('layers.3:out', layout='example token ...')" in str(raised.value)


def test_as_many_kept_tokens_as_examples() -> None:
    """[kept, d] with one token per example is [B, d] as well."""
    with pytest.raises(LayoutError, match="several layouts fit"):
        infer((3, HIDDEN), 3, {MAIN: stream(2, (1, 2, 0))}, "site", opens=None)


@pytest.mark.parametrize("shape", [(), (HIDDEN,), (WIDTH, HIDDEN), (3, HIDDEN, HIDDEN), (BATCH, 4, HIDDEN, HIDDEN)])
def test_no_reading_fits(shape: tuple[int, ...]) -> None:
    """The error names the shape, the batch, and what can be said."""
    with pytest.raises(LayoutError, match="no layout fits") as raised:
        infer(shape, BATCH, {MAIN: stream()}, "site", opens="site")
    assert str(list(shape)) in str(raised.value)
    assert "token of 7 positions" in str(raised.value)
    assert "'(example token) ...'" in str(raised.value)


def test_unknown_widths_open_a_stream() -> None:
    """[B, T', d] whose T' is no stream's opens one named after the module; one that is open already is not opened again."""
    assert infer((BATCH, 4, HIDDEN), BATCH, {MAIN: stream()}, "site", opens="stage.1") == Layout("example token", "stage.1")
    with pytest.raises(LayoutError):
        infer((BATCH, 4, HIDDEN), BATCH, {MAIN: stream()}, "site", opens=None)


def test_a_width_picks_the_stream() -> None:
    """Of two streams of different widths the one that fits is meant."""
    streams = {MAIN: stream(), "decoder": stream(11, DECODER_LENGTHS)}
    assert infer((BATCH, 11, HIDDEN), BATCH, streams, "site", opens=None) == Layout("example token", "decoder")
    assert str(infer((11, BATCH, HIDDEN), BATCH, streams, "site", opens=None)) == "token.decoder example ..."
    assert str(infer((sum(DECODER_LENGTHS), 3), BATCH, streams, "site", opens=None)) == "(example token.decoder) ..."


def test_home_decides_between_streams_of_equal_width() -> None:
    """A site in a stack belongs to the stack's stream; elsewhere two streams of one width are ambiguous."""
    streams = {MAIN: stream(), "decoder": Stream(BATCH, WIDTH)}
    shape = (BATCH, WIDTH, HIDDEN)
    assert infer(shape, BATCH, streams, "site", opens=None, home="decoder") == Layout("example token", "decoder")
    assert infer(shape, BATCH, streams, "site", opens=None, home=MAIN) == Layout("example token", MAIN)
    with pytest.raises(LayoutError, match=r"'example token \.\.\.', 'example token\.decoder \.\.\.'"):
        infer(shape, BATCH, streams, "site", opens=None)


# --- asked for ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "example token ...",
        "token example ...",
        "(example token) ...",
        "example ...",
        "example token.decoder ...",
        "token.decoder example ...",
        "(example token.encoder.layers.0) ...",
    ],
)
def test_layouts_are_written_as_they_are_read(text: str) -> None:
    """Text to layout and back."""
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "example token",
        "token ...",
        "example example ...",
        "(token example) ...",
        "batch token ...",
        "example, token ...",
    ],
)
def test_layouts_there_are_not(text: str) -> None:
    """The error lists those there are."""
    with pytest.raises(LayoutError, match=r"'token example \.\.\.'"):
        parse(text)


@pytest.mark.parametrize(
    ("site", "layout"),
    [
        ("table", "example token ..."),
        ("time_first", "token example ..."),
        ("flat", "(example token) ..."),
        ("kept", "(example token) ..."),
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_every_layout_gives_the_same_rows(
    shapes: Shapes, recorded: Callable[..., Run], site: str, layout: str, asked: bool
) -> None:
    """Inferred or asked for, padded or not: rows are the real tokens, example after example."""
    run = recorded(shapes, Site(site, layout=layout) if asked else site, batch())
    assert run[f"token/{site}:out"].site["layout"] == layout
    assert torch.equal(run[f"token/{site}:out"].to_torch(), packed(embedded(shapes), MASK))


def test_more_feature_axes(shapes: Shapes, recorded: Callable[..., Run]) -> None:
    """[B, T, head, feature] keeps its feature axes."""
    run = recorded(shapes, "heads", batch())
    assert run["token/heads:out"].shape == (KEPT, HIDDEN, 1)


def test_one_row_per_example(shapes: Shapes, recorded: Callable[..., Run]) -> None:
    """[B, d] goes to the example table."""
    run = recorded(shapes, ["pooled", Site(":out", layout="example ...")], batch())
    assert torch.equal(run["example/pooled:out"].to_torch(), embedded(shapes).mean(1))
    assert torch.equal(run["example/:out"].to_torch(), embedded(shapes).mean(1))


@pytest.mark.parametrize("layout", ["example token ...", "token example ...", "(example token) ...", "example ..."])
@pytest.mark.parametrize("site", ["vector", "scalar"])
def test_asking_for_axes_that_are_not_there(shapes: Shapes, make: Callable[..., Recorder], site: str, layout: str) -> None:
    """A tensor with too few axes, or none, is a LayoutError that shows its shape."""
    recorder = make(shapes, Site(site, layout=layout))
    with pytest.raises(LayoutError, match=site), recorder.batch(ids=range(BATCH)):
        shapes(**batch())


@pytest.mark.parametrize(
    ("site", "layout"), [("time_first", "example token ..."), ("flat", "example ..."), ("channels", "(example token) ...")]
)
def test_asking_for_a_layout_that_does_not_fit(shapes: Shapes, make: Callable[..., Recorder], site: str, layout: str) -> None:
    """What was asked for is held against every tensor."""
    recorder = make(shapes, Site(site, layout=layout))
    with pytest.raises(LayoutError, match=rf"{site}:out"), recorder.batch(ids=range(BATCH)):
        shapes(**batch())


def test_asking_for_a_stream_that_is_not_there(shapes: Shapes, make: Callable[..., Recorder]) -> None:
    """Flattened rows of an unknown stream have no known width."""
    recorder = make(shapes, Site("flat", layout="(example token.nowhere) ..."))
    with pytest.raises(LayoutError, match="'nowhere' is not known"), recorder.batch(ids=range(BATCH)):
        shapes(**batch())


def test_features_that_equal_positions(recorded: Callable[..., Run], make: Callable[..., Recorder]) -> None:
    """With d == T a pooled [B, d] reads as [B, T] too: an error, until `layout=` says it; [B, T, d] stays clear."""
    model = bert(hidden_size=WIDTH, num_attention_heads=1)
    recorder = make(model, ["resid_post", ":out[pooler_output]"])
    with pytest.raises(LayoutError, match=r"layout='example token \.\.\.'"), recorder.batch(ids=range(BATCH)):
        model(**batch())
    run = recorded(model, ["resid_post", Site(":out[pooler_output]", layout="example ...")], batch())
    with torch.no_grad():
        output = model(**batch())
    assert torch.equal(run["example/:out[pooler_output]"].to_torch(), output.pooler_output)
    assert torch.equal(run.select("resid_post[-1]")[0].to_torch(), packed(output.last_hidden_state, MASK))


def test_as_many_examples_as_positions(shapes: Shapes, recorded: Callable[..., Run], make: Callable[..., Recorder]) -> None:
    """With B == T the first batch needs `layout=`."""
    lengths = (7, 3, 5, 1, 6, 2, 4)
    square = batch(lengths=lengths)
    recorder = make(shapes, "table")
    with pytest.raises(LayoutError, match="several layouts fit"), recorder.batch(ids=range(7)):
        shapes(**square)
    sites = [Site("table", layout="example token ..."), Site("time_first", layout="token example ...")]
    run = recorded(shapes, sites, square)
    wanted = packed(shapes.table(square["input_ids"]).detach(), square["attention_mask"])
    assert torch.equal(run["token/table:out"].to_torch(), wanted)
    assert torch.equal(run["token/time_first:out"].to_torch(), wanted)


# --- pinned ---------------------------------------------------------------------------------------------------------------------


def test_a_pinned_layout_settles_later_batches(
    shapes: Shapes, make: Callable[..., Recorder], opened: Callable[[Recorder], Run]
) -> None:
    """A square batch is clear once an earlier one was; other widths and batch sizes are fine too."""
    recorder = make(shapes, ["table", "time_first", "flat", "kept", "pooled"])
    sizes = [LENGTHS, (7, 3, 5, 1, 6, 2, 4), (2, 9, 1)]
    for number, lengths in enumerate(sizes):
        with recorder.batch(ids=[f"{number}:{row}" for row in range(len(lengths))]):
            shapes(**batch(seed=number, lengths=lengths))
    run = opened(recorder)
    given = [batch(seed=number, lengths=lengths) for number, lengths in enumerate(sizes)]
    wanted = torch.cat([packed(shapes.table(each["input_ids"]).detach(), each["attention_mask"]) for each in given])
    for site in ("table", "time_first", "flat", "kept"):
        assert torch.equal(run[f"token/{site}:out"].to_torch(), wanted)


def test_a_later_misfit_is_an_error(shapes: Shapes, make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """A site that changes its axes is refused in that batch; what came before stands and the next batch works."""
    recorder = make(shapes, ["table", "changing"])
    with recorder.batch(ids=range(BATCH)):
        shapes(**batch())
    misfit = pytest.raises(LayoutError, match=r"changing:out has the layout 'example token \.\.\.'.*\[5, 52\]")
    with misfit, recorder.batch(ids=range(10, 15)):
        shapes(**batch(), pool=True)
    with recorder.batch(ids=range(20, 25)):
        shapes(**batch())
    assert opened(recorder).ids == [*range(5), *range(20, 25)]


def test_an_example_level_site_that_gains_tokens(shapes: Shapes, make: Callable[..., Recorder]) -> None:
    """One row per example is pinned as well."""
    recorder = make(shapes, "changing")
    with recorder.batch(ids=range(BATCH)):
        shapes(**batch(), pool=True)
    with pytest.raises((LayoutError, SchemaError), match="changing:out"), recorder.batch(ids=range(10, 15)):
        shapes(**batch())


# --- models ---------------------------------------------------------------------------------------------------------------------


def test_flattened_rows_of_opt(recorded: Callable[..., Run]) -> None:
    """OPT's MLP works on [B * T, d]."""
    model = opt()
    run = recorded(model, ["decoder.layers.*.fc1", "mlp_out"], batch())
    seen = observed(model, batch(), {"decoder.layers.1.fc1", "decoder.layers.1.fc2"})
    for name in ("fc1", "fc2"):
        flat = seen[f"decoder.layers.1.{name}"][0][1]
        assert flat.ndim == 2
        assert torch.equal(run[f"token/decoder.layers.1.{name}:out"].to_torch(), packed(flat.unflatten(0, (BATCH, WIDTH)), MASK))


def equal_widths() -> dict[str, Tensor]:
    """A batch for T5 whose decoder is as wide as its encoder, with other lengths."""
    lengths = (2, 7, 4, 6, 5)
    mask = padding_mask(lengths=lengths)
    tokens = random_tokens(BATCH, WIDTH, 1).masked_fill(mask == 0, PAD)
    return {**batch(), "decoder_input_ids": tokens, "decoder_attention_mask": mask}


def test_equal_widths_of_encoder_and_decoder(recorded: Callable[..., Run]) -> None:
    """Aliases know which stack they are of, and so whose pads to drop."""
    run = recorded(t5(), ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"], equal_widths())
    with torch.no_grad():
        output = t5()(**equal_widths(), output_hidden_states=True)
    masks = {"encoder": MASK, "decoder": equal_widths()["decoder_attention_mask"]}
    for stack, mask in masks.items():
        for layer, grid in enumerate(output[f"{stack}_hidden_states"][:-1]):
            [column] = run.select(f"{stack}.resid_pre[{layer}]")
            assert torch.equal(column.to_torch(), packed(grid, mask))
    assert {column.name.split("/")[0] for column in run.select("decoder.resid_post")} == {"token.decoder"}


@pytest.mark.parametrize("alias", ["embed", "final_norm"])
def test_equal_widths_outside_the_blocks(recorded: Callable[..., Run], alias: str) -> None:
    """Aliases outside the blocks belong to a stack, too."""
    run = recorded(t5(), alias, equal_widths())
    assert len(run.select(f"encoder.{alias}")[0]) == sum(LENGTHS)
    assert len(run.select(f"decoder.{alias}")[0]) == 24


def test_equal_widths_without_an_alias(recorded: Callable[..., Run], make: Callable[..., Recorder]) -> None:
    """Other modules need `layout=`, which may name the stream."""
    model, site = t5(), "decoder.block.0.layer.0.SelfAttention.q"
    recorder = make(model, site)
    with pytest.raises(LayoutError, match=r"'example token\.decoder \.\.\.'"), recorder.batch(ids=range(BATCH)):
        model(**equal_widths())
    run = recorded(model, Site(site, layout="example token.decoder ..."), equal_widths())
    grid = observed(model, equal_widths(), {site})[site][0][1]
    assert torch.equal(run[f"token.decoder/{site}:out"].to_torch(), packed(grid, equal_widths()["decoder_attention_mask"]))


def test_streams_of_an_encoder_decoder(recorded: Callable[..., Run]) -> None:
    """Each stream has a table with its own tokens, positions and lengths."""
    run = recorded(t5(), "resid_post[0]", pair_batch())
    assert run.tables["token"].lengths.tolist() == list(LENGTHS)
    assert run.tables["token.decoder"].lengths.tolist() == list(DECODER_LENGTHS)
    inner = packed(pair_batch()["decoder_input_ids"], pair_batch()["decoder_attention_mask"])
    assert torch.equal(run["token.decoder/input_ids"].to_torch(), inner)
    assert [len(run["token.decoder/position"][number]) for number in range(BATCH)] == list(DECODER_LENGTHS)


def test_images(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """A vision model's residual stream is the main table; patches before the class token have a table of their own."""
    model = vit()
    recorder = make(model, ["embed", "resid_post", ":out[pooler_output]"])
    for number in range(2):
        with torch.no_grad(), recorder.batch(ids=range(number * BATCH, (number + 1) * BATCH)):
            model(**images(12, 20))
    run = opened(recorder)
    assert set(run.tables) == {"example", "token", "token.embeddings.patch_embeddings"}
    assert run["token/layers.0:out"].shape == (2 * BATCH * 16, HIDDEN)
    assert run["token.embeddings.patch_embeddings/embeddings.patch_embeddings:out"].shape == (2 * BATCH * 15, HIDDEN)
    assert run["example/:out[pooler_output]"].shape == (2 * BATCH, HIDDEN)
    assert "input_ids" not in run.tables["token"]
    with torch.no_grad():
        grid = observed(model, images(12, 20), {"layers.0"})["layers.0"][0][1]
    assert torch.equal(run["token/layers.0:out"].to_torch(), torch.cat([grid.flatten(0, 1)] * 2))


def test_stages(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """Swin's stages have fewer and fewer positions: the first is the main table, each other one opens its own."""
    model = swin()
    recorder = make(model, ["resid_pre", "resid_post"])
    for number in range(2):
        with torch.no_grad(), recorder.batch(ids=range(number * BATCH, (number + 1) * BATCH)):
            model(**images(16, 16))
    run = opened(recorder)
    assert set(run.tables) == {"example", "token", "token.encoder.layers.1.blocks.0"}
    assert run.tables["token"].lengths.tolist() == [64] * 10
    assert run.tables["token.encoder.layers.1.blocks.0"].lengths.tolist() == [16] * 10
    with torch.no_grad():
        hidden = model(**images(16, 16), output_hidden_states=True).hidden_states
    assert torch.equal(run.select("resid_pre[0]")[0].to_torch()[: BATCH * 64], hidden[0].flatten(0, 1))
    assert torch.equal(run.select("resid_pre[1]")[0].to_torch()[: BATCH * 16], hidden[1].flatten(0, 1))
    assert torch.equal(run.select("resid_post[2]")[0].to_torch()[BATCH * 16 :], hidden[2].flatten(0, 1))


def test_a_failed_first_batch_of_images_leaves_no_trace(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """What a batch that failed opened does not change the tables of the next one."""
    model = swin()
    recorder = make(model, ["resid_pre", "resid_post"])
    with suppress(KeyError), torch.no_grad(), recorder.batch(ids=range(BATCH)):
        model(**images(16, 16))
        raise KeyError("in the middle")
    with torch.no_grad(), recorder.batch(ids=range(BATCH)):
        model(**images(16, 16))
    assert set(opened(recorder).tables) == {"example", "token", "token.encoder.layers.1.blocks.0"}


def test_vectors_without_a_mask(recorded: Callable[..., Run]) -> None:
    """[B, T, d] inputs tell nothing of pads: all rows are kept; with time first `layout=` is needed."""
    run = recorded(torch_encoder(batch_first=True, norm_first=True), "resid_post[0]", {"src": features()["src"]})
    assert run.tables["token"].lengths.tolist() == [WIDTH] * BATCH
    model, src = torch_encoder(batch_first=False, norm_first=True), features(batch_first=False)["src"]
    with pytest.raises(LayoutError, match="no layout fits"):
        recorded(model, "resid_post[0]", {"src": src}, ids=range(BATCH))
    run = recorded(model, Site("resid_post[0]", layout="token example ..."), {"src": src}, ids=range(BATCH))
    grid = observed(model, {"src": src}, {"layers.0"})["layers.0"][0][1]
    assert torch.equal(run["token/layers.0:out"].to_torch(), grid.transpose(0, 1).flatten(0, 1))


def test_a_slice_of_the_tokens_opens_a_table(shapes: Shapes, recorded: Callable[..., Run]) -> None:
    """A tensor over other positions than the tokens' has a table named after its module."""
    run = recorded(shapes, ["table", "channels"], batch())
    assert run.tables["token.channels"].lengths.tolist() == [4] * BATCH
    assert torch.equal(run["token.channels/channels:out"].to_torch(), embedded(shapes)[:, :4].flatten(0, 1))


# --- packing equals a plain loop ------------------------------------------------------------------------------------------------


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """[B, T, *feature] of distinct values and a [B, T] mask of any pattern."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    feature = draw(st.lists(st.integers(1, 3), max_size=2))
    mask = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    grid = torch.arange(float(rows * width * max(1, torch.tensor(feature).prod().int()))).reshape(rows, width, *feature)
    return grid, torch.tensor(mask).reshape(rows, width)


def looped(grid: Tensor, mask: Tensor) -> list[Any]:
    """Kept positions by two loops."""
    return [grid[row, at].tolist() for row in range(mask.shape[0]) for at in range(mask.shape[1]) if mask[row, at]]


@settings(deadline=None, max_examples=200)
@given(grids(), st.sampled_from(["example token", "token example", "(example token)"]), st.booleans())
def test_packing_equals_a_loop(drawn: tuple[Tensor, Tensor], kind: str, without_pads: bool) -> None:
    """Whatever the mask, the layout and the strides, rows are the kept positions in order, as a copy."""
    grid, mask = drawn
    expected = looped(grid, mask)
    of = Stream(*mask.shape, None if bool(mask.all()) else mask)
    if kind == "token example":
        given_tensor = grid.transpose(0, 1).contiguous()
    elif kind == "(example token)":
        given_tensor = grid[mask] if without_pads else grid.flatten(0, 1)
    else:
        given_tensor = grid.transpose(0, 1).contiguous().transpose(0, 1) if without_pads else grid.clone()
    rows = Layout(kind, MAIN).rows(given_tensor, of)
    given_tensor.fill_(-1)
    assert rows.tolist() == expected
    assert of.kept == len(expected)
    assert of.lengths == mask.sum(1).tolist()
