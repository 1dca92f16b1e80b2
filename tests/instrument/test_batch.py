"""What a batch takes from the call and from the user: ids, masks, tokens, packed rows, positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    BATCH,
    DECODER_LENGTHS,
    HIDDEN,
    HUGGING_FACE,
    LENGTHS,
    PAD,
    VOCABULARY,
    WIDTH,
    batch,
    bert,
    gpt2,
    images,
    llama,
    observed,
    opt,
    packed,
    padding_mask,
    pair_batch,
    positions_of,
    random_tokens,
    sdpa_decoder,
    seeded,
    t5,
    torch_encoder,
    vit,
)
from torch import Tensor, nn

from tensortape.instrument import Recorder
from tensortape.instrument.errors import BatchError, InstrumentError, LayoutError
from tensortape.stores import Run
from tensortape.stores.errors import KeyRepeatedError, SchemaError, StoreError
from tensortape.stores.keys import content_id

MASK = batch()["attention_mask"]
SITE = "resid_post[1]"
Make = Callable[..., Recorder]
Opened = Callable[[Recorder], Run]


def record(recorder: Recorder, model: nn.Module, inputs: dict[str, Any], ids: Any, **given: Any) -> None:
    """One batch."""
    with torch.no_grad(), recorder.batch(ids=ids, **given):
        model(**inputs)


# --- ids ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["a", "b c", "ü", "", "\n"], ["a", "b c", "ü", "", "\n"]),
        ([5, -1, 0, 2**40, 7], [5, -1, 0, 2**40, 7]),
        ((1, 2, 3, 4, 5), [1, 2, 3, 4, 5]),
        (range(10, 15), [10, 11, 12, 13, 14]),
        (torch.arange(5) * 3, [0, 3, 6, 9, 12]),
        (np.arange(5, dtype=np.int16), [0, 1, 2, 3, 4]),
        ([np.int64(number) for number in range(5)], [0, 1, 2, 3, 4]),
        (np.array(list("abcde")), list("abcde")),
    ],
)
def test_ids(recorded: Callable[..., Run], ids: Any, expected: list[Any]) -> None:
    """Text or integers, as a sequence, an array or a tensor."""
    run = recorded(llama(), SITE, batch(), ids=ids)
    assert run.ids == expected
    assert [len(run["layers.1:out"][number]) for number in range(BATCH)] == list(LENGTHS)


def test_ids_are_missing(make: Make) -> None:
    """Nothing stands in for ids that are not given."""
    recorder = make(llama(), SITE)
    with pytest.raises(BatchError, match="ids are missing"), recorder.batch(ids=None):
        pass


@pytest.mark.parametrize(
    ("ids", "error", "shown"),
    [
        ([], BatchError, "at least one example"),
        ("abcde", BatchError, "'content'; got 'abcde'"),
        (["a", "b", "c", "d", "a"], KeyRepeatedError, "'a' is given twice"),
        (["a", "b", "c", "d", 5], SchemaError, "int and str"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], SchemaError, "float"),
        ([True, False], SchemaError, "bool"),
        (5, SchemaError, "got 5"),
        (torch.zeros(5, 2), SchemaError, "list"),
        (iter(range(5)), SchemaError, "sequence"),
    ],
)
def test_ids_that_are_none(make: Make, ids: Any, error: type[Exception], shown: str) -> None:
    """Each is refused before the block runs."""
    ran = []
    recorder = make(llama(), SITE)
    with pytest.raises(error, match=shown), recorder.batch(ids=ids):
        ran.append(True)
    assert not ran


def test_ids_of_another_kind_than_before(make: Make, opened: Opened) -> None:
    """Text and integers do not mix in a run; the batch is left out."""
    model = llama()
    recorder = make(model, SITE)
    record(recorder, model, batch(), range(5))
    with pytest.raises(SchemaError, match="one kind throughout"):
        record(recorder, model, batch(seed=1), list("abcde"))
    record(recorder, model, batch(seed=2), range(5, 10))
    assert opened(recorder).ids == list(range(10))


@pytest.mark.parametrize("count", [1, 4, 6, 7, 35])
def test_wrong_number_of_ids(make: Make, opened: Opened, count: int) -> None:
    """One id per example; the error says how many there are of each, and nothing is recorded."""
    model = llama()
    recorder = make(model, SITE)
    with pytest.raises(BatchError, match=f"{count} ids were given for a batch of 5 examples"):
        record(recorder, model, batch(), range(count))
    record(recorder, model, batch(), range(5))
    assert opened(recorder).ids == list(range(5))


def test_wrong_number_of_ids_for_images(make: Make, opened: Opened) -> None:
    """Also where the call shows no tokens, in the first batch and in a later one."""
    model = vit()
    recorder = make(model, SITE)
    with pytest.raises((InstrumentError, StoreError)):
        record(recorder, model, images(12, 20), range(4))
    record(recorder, model, images(12, 20), range(5))
    for count in (4, 6):
        with pytest.raises((InstrumentError, StoreError)):
            record(recorder, model, images(12, 20), range(10, 10 + count))
    record(recorder, model, images(12, 20), range(20, 25))
    assert opened(recorder).ids == [*range(5), *range(20, 25)]


def test_ids_from_content(recorded: Callable[..., Run]) -> None:
    """A hash of the real tokens, the same on whichever side the pads are."""
    right, left = batch(), batch("left")
    tokens = [right["input_ids"][row, :length] for row, length in enumerate(LENGTHS)]
    for row, length in enumerate(LENGTHS):
        left["input_ids"][row, WIDTH - length :] = tokens[row]
    runs = [recorded(llama(), SITE, inputs, ids="content") for inputs in (right, left)]
    assert runs[0].ids == runs[1].ids == [content_id(row.numpy()) for row in tokens]


def test_the_same_content_twice(make: Make) -> None:
    """Two examples with the same tokens are the same example."""
    inputs = batch(lengths=(4, 4, 2))
    inputs["input_ids"][1] = inputs["input_ids"][0]
    model = llama()
    recorder = make(model, SITE)
    with pytest.raises(KeyRepeatedError):
        record(recorder, model, inputs, "content")


def test_content_without_tokens(make: Make) -> None:
    """Images have no tokens to hash."""
    model = vit()
    recorder = make(model, SITE)
    with pytest.raises(InstrumentError, match="ids='content'"):
        record(recorder, model, images(12, 20), "content")


# --- masks and tokens -----------------------------------------------------------------------------------------------------------


def test_no_mask_keeps_every_position(recorded: Callable[..., Run]) -> None:
    """Without an attention mask there are no pads."""
    model, inputs = llama(), {"input_ids": batch()["input_ids"]}
    run = recorded(model, SITE, inputs)
    assert run.tables["token"].lengths.tolist() == [WIDTH] * BATCH
    assert torch.equal(run["layers.1:out"].to_torch(), observed(model, inputs, {"layers.1"})["layers.1"][0][1].flatten(0, 1))
    assert run["token/input_ids"].rows().tolist() == inputs["input_ids"].flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(recorded: Callable[..., Run], dtype: torch.dtype) -> None:
    """1 and 0, True and False."""
    inputs = {**batch(), "attention_mask": MASK.to(dtype)}
    assert recorded(llama(), SITE, inputs).tables["token"].lengths.tolist() == list(LENGTHS)


def test_a_mask_with_holes(recorded: Callable[..., Run]) -> None:
    """Pads may be anywhere; an example may have none but pads."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    model, tokens = sdpa_decoder(), random_tokens(3, WIDTH)
    run = recorded(model, SITE, {"tokens": tokens}, mask=mask)
    grid = observed(model, {"tokens": tokens}, {"blocks.1"})["blocks.1"][0][1]
    assert run.tables["token"].lengths.tolist() == [4, 0, 7]
    assert torch.equal(run["blocks.1:out"].to_torch(), packed(grid, mask))
    assert run["blocks.1:out"][1].shape == (0, HIDDEN)


def test_a_mask_of_four_axes(make: Make, opened: Opened) -> None:
    """[B, 1, T, T] does not tell which positions are pads: the error says to give mask=, and that works."""
    causal = torch.ones(WIDTH, WIDTH).tril().bool()
    four = causal[None, None] & MASK[:, None, None, :].bool()
    model, inputs = llama(), {"input_ids": batch()["input_ids"], "attention_mask": four}
    recorder = make(model, SITE)
    with pytest.raises(BatchError, match=r"\[5, 1, 7, 7\].*batch\(mask=\.\.\.\)"):
        record(recorder, model, inputs, range(5))
    record(recorder, model, inputs, range(5), mask=MASK)
    grid = observed(model, inputs, {"layers.1"})["layers.1"][0][1]
    assert torch.equal(opened(recorder)["layers.1:out"].to_torch(), packed(grid, MASK))


def test_a_mask_over_a_cache_as_well(make: Make) -> None:
    """[B, more than T] does not fit the tokens of this call."""
    model = llama()
    recorder = make(model, SITE)
    with pytest.raises(BatchError, match=r"mask.*\[5, 9\]"):
        record(recorder, model, batch(), range(5), mask=torch.ones(5, 9))


def test_tokens_and_mask_given_by_hand(recorded: Callable[..., Run]) -> None:
    """tokens= and mask= count more than what the call shows."""
    shown, given, mask = batch(), random_tokens(BATCH, WIDTH, 9), padding_mask("left")
    run = recorded(llama(), SITE, shown, tokens=given, mask=mask)
    assert torch.equal(run["token/input_ids"].to_torch(), packed(given, mask))
    assert run.tables["token"].lengths.tolist() == list(LENGTHS)


def test_tokens_for_a_model_that_takes_vectors(recorded: Callable[..., Run]) -> None:
    """nn.TransformerEncoder sees no tokens; tokens= stores them beside its rows."""
    tokens = random_tokens(BATCH, WIDTH)
    src = torch.randn(BATCH, WIDTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    run = recorded(torch_encoder(batch_first=True, norm_first=True), SITE, {"src": src}, tokens=tokens, mask=MASK)
    assert torch.equal(run["token/input_ids"].to_torch(), packed(tokens, MASK))
    assert run["layers.1:out"].shape == (sum(LENGTHS), HIDDEN)


@pytest.mark.parametrize("masked", [True, False])
def test_input_embeddings_instead_of_tokens(recorded: Callable[..., Run], masked: bool) -> None:
    """A model called with inputs_embeds has positions, but no tokens: nothing else passes for them."""
    model = llama()
    embeds = model.embed_tokens(batch()["input_ids"]).detach()
    inputs = {"inputs_embeds": embeds, **({"attention_mask": MASK} if masked else {})}
    run = recorded(model, SITE, inputs)
    assert "input_ids" not in run.tables["token"]
    assert run.tables["token"].lengths.tolist() == (list(LENGTHS) if masked else [WIDTH] * BATCH)
    grid = observed(model, inputs, {"layers.1"})["layers.1"][0][1]
    assert torch.equal(run["layers.1:out"].to_torch(), packed(grid, MASK if masked else None))


@pytest.mark.parametrize("given", ["mask", "tokens"])
def test_a_grid_that_is_not_the_models(make: Make, given: str) -> None:
    """tokens= or mask= of another width than what the model computes is an error: else its pads would be recorded unseen."""
    model, src = torch_encoder(batch_first=True, norm_first=True), torch.randn(BATCH, WIDTH, HIDDEN)
    wrong = {"mask": padding_mask(lengths=(6, 3, 5, 1, 6)), "tokens": random_tokens(BATCH, 6)}[given]
    recorder = make(model, SITE)
    with pytest.raises((BatchError, LayoutError)):
        record(recorder, model, {"src": src}, range(5), **{given: wrong})


def test_tokens_are_found_by_place(recorded: Callable[..., Run]) -> None:
    """A model whose first argument is a grid of integers, whatever its name, takes tokens."""
    run = recorded(sdpa_decoder(), SITE, {"tokens": batch()["input_ids"]}, mask=MASK)
    assert torch.equal(run["token/input_ids"].to_torch(), packed(batch()["input_ids"], MASK))


def test_tokens_given_positionally(make: Make, opened: Opened) -> None:
    """Arguments are told by the signature, not by how they were given."""
    model = llama()
    recorder = make(model, SITE)
    with torch.no_grad(), recorder.batch(ids=range(5)):
        model(batch()["input_ids"], MASK)
    run = opened(recorder)
    assert run.tables["token"].lengths.tolist() == list(LENGTHS)
    assert torch.equal(run["token/input_ids"].to_torch(), packed(batch()["input_ids"], MASK))


def test_a_scalar_argument_first(recorded: Callable[..., Run]) -> None:
    """With ids='content' and a number before the tokens, examples are still counted by the tokens given."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, HIDDEN)

        def forward(self, scale: Tensor, input_ids: Tensor) -> Tensor:
            return scale * self.table(input_ids)

    run = recorded(seeded(Scaled), "table", {"scale": torch.tensor(2.0), "input_ids": batch()["input_ids"]}, ids="content")
    assert run.ids == [content_id(row.numpy()) for row in batch()["input_ids"]]


def test_decoder_without_a_mask(recorded: Callable[..., Run]) -> None:
    """The decoder's stream is as wide as its tokens."""
    inputs = {name: value for name, value in pair_batch().items() if name != "decoder_attention_mask"}
    run = recorded(t5(), "decoder.resid_post", inputs)
    assert run.tables["token.decoder"].lengths.tolist() == [max(DECODER_LENGTHS)] * BATCH
    assert run.tables["token"].lengths.tolist() == list(LENGTHS)


def test_batches_of_other_sizes(make: Make, opened: Opened) -> None:
    """Every batch may have other rows and widths, with and without pads."""
    model = llama()
    recorder = make(model, SITE)
    sizes = [LENGTHS, (2,), (9, 9, 9), (1, 1), (4, 11)]
    for number, lengths in enumerate(sizes):
        record(recorder, model, batch(seed=number, lengths=lengths), [f"{number}.{row}" for row in range(len(lengths))])
    run = opened(recorder)
    assert run.tables["token"].lengths.tolist() == [length for lengths in sizes for length in lengths]
    assert run["token/position"].rows().tolist() == [at for lengths in sizes for length in lengths for at in range(length)]


# --- packed rows ----------------------------------------------------------------------------------------------------------------

PACKED = [(3, 4), (5, 1, 1), (2, 2)]  # several examples in one row; the last row ends in pads
PACKED_LENGTHS = [length for row in PACKED for length in row]
PACKED_MASK = padding_mask(lengths=tuple(map(sum, PACKED)), width=WIDTH)
PACKED_POSITIONS = torch.tensor([[at for length in row for at in range(length)] + [0] * (WIDTH - sum(row)) for row in PACKED])
PACKED_SEGMENTS = torch.tensor(
    [[n for n, length in enumerate(row) for _ in range(length)] + [9] * (WIDTH - sum(row)) for row in PACKED]
)


def packed_batch() -> dict[str, Tensor]:
    """Three rows of seven examples."""
    tokens = random_tokens(3, WIDTH).masked_fill(PACKED_MASK == 0, PAD)
    return {"input_ids": tokens, "attention_mask": PACKED_MASK, "position_ids": PACKED_POSITIONS}


@pytest.mark.parametrize("by", ["positions", "segments"])
def test_rows_of_several_examples(recorded: Callable[..., Run], by: str) -> None:
    """position_ids that start anew, or segments=, tell where an example ends; one id each."""
    model, inputs = llama(), packed_batch()
    given: dict[str, Any] = {}
    if by == "segments":
        inputs["position_ids"], given["segments"] = torch.arange(WIDTH).expand(3, WIDTH), PACKED_SEGMENTS
    labels = {"example/length": PACKED_LENGTHS, "token/tag": torch.arange(3 * WIDTH).reshape(3, WIDTH)}
    run = recorded(model, [SITE, "embed"], inputs, ids=list("abcdefg"), labels=labels, **given)
    grid = observed(model, inputs, {"layers.1"})["layers.1"][0][1]
    assert run.ids == list("abcdefg")
    assert run.tables["token"].lengths.tolist() == PACKED_LENGTHS
    assert torch.equal(run["layers.1:out"].to_torch(), packed(grid, PACKED_MASK))
    assert torch.equal(run["token/tag"].to_torch(), packed(labels["token/tag"], PACKED_MASK))
    assert torch.equal(run["token/input_ids"].to_torch(), packed(inputs["input_ids"], PACKED_MASK))
    assert torch.equal(run["token/position"].to_torch(), packed(inputs["position_ids"], PACKED_MASK))
    assert np.array_equal(run["layers.1:out"][1], grid[0, 3:7].numpy())
    assert run["example/length"].rows().tolist() == PACKED_LENGTHS


def test_packed_rows_without_pads(recorded: Callable[..., Run]) -> None:
    """Full rows need no mask."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]])
    model, inputs = llama(), {"input_ids": random_tokens(2, WIDTH), "position_ids": positions}
    run = recorded(model, SITE, inputs, ids=list("abcd"))
    assert run.tables["token"].lengths.tolist() == [3, 4, 1, 6]
    grid = observed(model, inputs, {"layers.1"})["layers.1"][0][1]
    assert torch.equal(run["layers.1:out"].to_torch(), grid.flatten(0, 1))


def test_packed_rows_by_content(recorded: Callable[..., Run]) -> None:
    """Segments split the tokens that are hashed, too."""
    run = recorded(llama(), SITE, packed_batch(), ids="content", segments=PACKED_SEGMENTS)
    tokens = packed(packed_batch()["input_ids"], PACKED_MASK).split(PACKED_LENGTHS)
    assert run.ids == [content_id(piece.numpy()) for piece in tokens]


def test_packed_rows_and_a_wrong_number_of_ids(make: Make) -> None:
    """The error counts examples, not rows."""
    model = llama()
    recorder = make(model, SITE)
    with pytest.raises(BatchError, match="6 ids were given for a batch of 7 examples"):
        record(recorder, model, packed_batch(), range(6))
    with pytest.raises(BatchError, match="3 ids were given for a batch of 7 examples"):
        record(recorder, model, packed_batch(), range(3), segments=PACKED_SEGMENTS)


def test_segments_of_another_shape(make: Make) -> None:
    """Segments must lie on the batch's grid."""
    model = llama()
    recorder = make(model, SITE)
    for wrong in (PACKED_SEGMENTS[:, :5], PACKED_SEGMENTS[:2], PACKED_SEGMENTS[0]):
        with pytest.raises(BatchError, match="segments"):
            record(recorder, model, packed_batch(), range(7), segments=wrong)


def test_one_id_per_packed_row_is_one_example_per_row(recorded: Callable[..., Run]) -> None:
    """As many ids as rows: each row is an example, whatever its positions."""
    run = recorded(llama(), SITE, packed_batch(), ids=range(3))
    assert run.tables["token"].lengths.tolist() == [sum(row) for row in PACKED]
    assert run["token/position"].rows().tolist() == packed(PACKED_POSITIONS, PACKED_MASK).tolist()


def test_rows_per_example_of_packed_rows(make: Make) -> None:
    """One vector per input row is not one per example there: an error, not a guess."""
    model = bert()
    recorder = make(model, [SITE, ":out[pooler_output]"])
    with pytest.raises(InstrumentError, match="pooler_output"):
        record(recorder, model, packed_batch(), range(7))


@pytest.mark.parametrize("shape", ["one row", "one axis"])
def test_positions_shared_by_all_rows(recorded: Callable[..., Run], shape: str) -> None:
    """position_ids [1, T] or [T] are every row's."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.places = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(99, HIDDEN)

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.table(input_ids) + self.places(position_ids)

    positions = torch.arange(20, 27)
    given = positions[None] if shape == "one row" else positions
    run = recorded(seeded(Positions), "table", {"input_ids": batch()["input_ids"], "position_ids": given}, mask=MASK)
    assert [run["token/position"][row].tolist() for row in range(BATCH)] == [list(range(20, 20 + n)) for n in LENGTHS]


# --- positions of left-padded batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert", "albert", "electra", "bart"])
def test_left_padding_moves_absolute_positions(name: str, make: Make) -> None:
    """A model with absolute positions and no position_ids gives real tokens other positions: a warning says so."""
    model, inputs = HUGGING_FACE[name].build(), HUGGING_FACE[name].inputs("left")
    inputs.pop("position_ids", None)
    recorder = make(model, "resid_post")
    with pytest.warns(UserWarning, match="padded on the left and has no position_ids"):
        record(recorder, model, inputs, range(5))


def test_the_warning_is_right(make: Make) -> None:
    """Activations do differ then, and are the same with position_ids."""
    tokens = random_tokens(1, 3)
    left = {"input_ids": torch.cat([torch.full((1, 4), PAD), tokens], 1), "attention_mask": torch.tensor([[0] * 4 + [1] * 3])}
    for model, path in ((gpt2(), "transformer.h.1"), (bert(), "encoder.layer.1")):
        alone = observed(model, {"input_ids": tokens}, {path})[path][0][1]
        moved = observed(model, left, {path})[path][0][1][:, 4:]
        told = observed(model, {**left, "position_ids": positions_of(left["attention_mask"])}, {path})[path][0][1][:, 4:]
        assert not torch.allclose(alone, moved, atol=1e-2)
        torch.testing.assert_close(alone, told)


@pytest.mark.parametrize(
    "build",
    [llama, opt, HUGGING_FACE["roberta"].build, HUGGING_FACE["gpt_neox"].build, t5],
    ids=["llama", "opt", "roberta", "neox", "t5"],
)
def test_left_padding_without_a_warning(build: Callable[[], nn.Module], recorded: Callable[..., Run]) -> None:
    """Relative positions, and absolute ones that the model counts from its mask, are right on either side."""
    inputs = pair_batch("left") if build is t5 else batch("left")
    recorded(build(), "encoder.resid_post" if build is t5 else "resid_post", inputs)  # warnings are errors


@pytest.mark.parametrize("build", [gpt2, bert])
def test_left_padding_with_positions(build: Callable[[], nn.Module], recorded: Callable[..., Run]) -> None:
    """position_ids settle it, and are what is stored."""
    inputs = batch("left")
    inputs["position_ids"] = positions_of(inputs["attention_mask"])
    run = recorded(build(), "resid_post", inputs)
    assert [run["token/position"][row].tolist() for row in range(BATCH)] == [list(range(n)) for n in LENGTHS]


def test_right_padding_never_warns(recorded: Callable[..., Run]) -> None:
    """Absolute positions of real tokens are right when pads follow."""
    assert recorded(gpt2(), "resid_post", batch()).tables["token"].lengths.tolist() == list(LENGTHS)
