"""What a batch context promises: a whole batch or nothing, and a model that computes what it would have computed."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    BATCH,
    HIDDEN,
    LENGTHS,
    Inputs,
    batch,
    gpt2,
    hook_count,
    in_dtype,
    llama,
    llama_lm,
    observed,
    packed,
    sdpa_decoder,
    t5_lm,
    tensors,
)
from torch import Tensor, nn

from tensortape.instrument import Recorder, Site
from tensortape.instrument.errors import ForwardError
from tensortape.stores import Run, open_run
from tensortape.stores.errors import BrokenWriterError, KeyRepeatedError, RunExistsError, SchemaError

MASK = batch()["attention_mask"]
Make = Callable[..., Recorder]
Opened = Callable[[Recorder], Run]


def ids_of(number: int) -> list[int]:
    """Ids of a batch."""
    return list(range(number * BATCH, (number + 1) * BATCH))


def take(recorder: Recorder, model: nn.Module, number: int, inputs: Inputs | None = None, **given: Any) -> None:
    """Record one batch."""
    with torch.no_grad(), recorder.batch(ids=ids_of(number), **given):
        model(**(inputs or batch(seed=number)))


def rows_of(model: nn.Module, path: str, *numbers: int) -> Tensor:
    """What torch's own hooks see at a module's output over some batches, without pads."""
    return torch.cat([packed(observed(model, batch(seed=number), {path})[path][0][1], MASK) for number in numbers])


# --- one forward, or nothing ----------------------------------------------------------------------------------------------------


def test_batches_follow_one_another(make: Make, opened: Opened) -> None:
    """Rows, ids and tokens of several batches, in order."""
    model = llama()
    recorder = make(model, "resid_post")
    for number in range(3):
        take(recorder, model, number)
    run = opened(recorder)
    assert run.ids == list(range(3 * BATCH))
    assert torch.equal(run["token/layers.1:out"].to_torch(), rows_of(model, "layers.1", 0, 1, 2))
    assert run.tables["token"].lengths.tolist() == [*LENGTHS] * 3
    assert run.verify().ok


def test_two_forwards_are_an_error(make: Make, opened: Opened) -> None:
    """A second forward in a context records nothing of either; earlier and later batches stand."""
    model = llama()
    recorder = make(model, "resid_post[1]")
    take(recorder, model, 0)
    with pytest.raises(ForwardError, match="ran 2 times"), recorder.batch(ids=ids_of(1)):
        twice = [model(**batch(seed=1)) for _ in range(2)]
    assert torch.equal(*(output.last_hidden_state for output in twice))
    take(recorder, model, 2)
    run = opened(recorder)
    assert run.ids == [*ids_of(0), *ids_of(2)]
    assert torch.equal(run["layers.1:out"].to_torch(), rows_of(model, "layers.1", 0, 2))


def test_no_forward_is_an_error(make: Make, opened: Opened) -> None:
    """A context without a forward of the model is an error, also if only a part of the model ran."""
    model = llama()
    recorder = make(model, "resid_post[1]")
    with pytest.raises(ForwardError, match="ran 0 times"), recorder.batch(ids=ids_of(0)):
        pass
    with pytest.raises(ForwardError, match="ran 0 times"), recorder.batch(ids=ids_of(0)):
        model.layers[1].mlp(torch.zeros(BATCH, 7, HIDDEN))
    take(recorder, model, 1)
    assert opened(recorder).ids == ids_of(1)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_inside_the_block(error: type[BaseException], make: Make, opened: Opened) -> None:
    """It passes through; nothing of the batch is recorded, no hook stays, the next batch works."""
    model = llama()
    before = hook_count(model)
    recorder = make(model, "resid_post[1]")
    take(recorder, model, 0)
    with suppress(error), recorder.batch(ids=ids_of(1)):
        model(**batch(seed=1))
        raise error
    assert hook_count(model) == before
    take(recorder, model, 1)
    run = opened(recorder)
    assert run.ids == [*ids_of(0), *ids_of(1)]
    assert torch.equal(run["layers.1:out"].to_torch(), rows_of(model, "layers.1", 0, 1))


class Broken(Exception):
    """Raised in the middle of a forward."""


def break_module(module: nn.Module, error: type[BaseException]) -> None:
    """Make a module raise until `del module.forward`."""

    def forward(*args: Any, **kwargs: Any) -> None:
        raise error

    module.forward = forward


@pytest.mark.parametrize("build", [gpt2, lambda: sdpa_decoder(inplace=True)], ids=["gpt2", "sdpa"])
def test_an_exception_in_any_module(build: Callable[[], nn.Module], make: Make, opened: Opened) -> None:
    """Whichever module raises: the error passes through, all hooks are gone, the batch is not recorded, the next one works."""
    model = build()
    inputs = batch() if build is gpt2 else {"tokens": batch()["input_ids"]}
    called = set(observed(model, inputs, {path for path, _ in model.named_modules()}))
    recorder = make(model, "resid_post")
    before, good = hook_count(model), 0
    for number, (path, module) in enumerate(model.named_modules()):
        if path not in called:
            continue
        error = KeyboardInterrupt if number % 5 == 0 else Broken
        break_module(module, error)
        try:
            with pytest.raises(error), torch.no_grad(), recorder.batch(ids=[f"bad {path}", *"abcd"]):
                model(**inputs)
        finally:
            del module.forward
        assert hook_count(model) == before, path
        if number % 7 == 0:
            with torch.no_grad(), recorder.batch(ids=[f"{number}.{row}" for row in range(BATCH)]):
                model(**inputs)
            good += BATCH
    run = opened(recorder)
    assert len(run) == good > BATCH
    assert all(np.array_equal(run.select("resid_post[1]")[0][n], run.select("resid_post[1]")[0][n % BATCH]) for n in range(good))


def test_a_forward_outside_a_context_records_nothing(make: Make, opened: Opened) -> None:
    """Before, between and after the contexts."""
    model = llama()
    recorder = make(model, "resid_post[1]")
    model(**batch(seed=7))
    take(recorder, model, 0)
    model(**batch(seed=8))
    take(recorder, model, 1)
    model(**batch(seed=9))
    assert opened(recorder).ids == [*ids_of(0), *ids_of(1)]


def test_a_part_of_the_model_called_by_itself_is_not_taken(make: Make, opened: Opened) -> None:
    """Within a context only what the forward of the whole model computes is recorded."""
    model = llama()
    recorder = make(model, "layers.1.mlp")
    with torch.no_grad(), recorder.batch(ids=ids_of(0)):
        model.layers[1].mlp(torch.ones(2, 3, HIDDEN))
        model(**batch())
        model.layers[1].mlp(torch.ones(2, 3, HIDDEN))
    assert torch.equal(opened(recorder)["layers.1.mlp:out"].to_torch(), rows_of(model, "layers.1.mlp", 0))


def test_a_failed_first_batch_does_not_shape_the_run(make: Make, opened: Opened) -> None:
    """Dtypes, sites and lengths come from the first batch that was recorded."""
    model = llama()
    recorder = make(model, "resid_post[1]")
    with suppress(Broken), recorder.batch(ids=ids_of(0)):
        model.double()(**batch())
        raise Broken
    take(recorder, model.float(), 0)
    assert opened(recorder)["layers.1:out"].dtype == np.float32


def test_contexts_of_one_recorder_do_not_nest(make: Make) -> None:
    """A context inside another of the same recorder records nothing silently."""
    model = llama()
    recorder = make(model, "resid_post[1]")
    with pytest.raises(ForwardError), recorder.batch(ids=ids_of(0)), recorder.batch(ids=ids_of(1)):
        model(**batch())
    assert hook_count(model) == hook_count(llama())


# --- values ---------------------------------------------------------------------------------------------------------------------


def test_values_are_taken_before_they_are_changed_in_place(recorded: Callable[..., Run]) -> None:
    """ReLU(inplace=True) and add_ into the residual later overwrite what was tapped; the record keeps what it was."""
    sites = ["blocks.*.attention", "blocks.*.mlp.0", "blocks.*.mlp.0:in", "blocks.*.mlp", "resid_pre", "resid_post", "table"]
    inputs = {"tokens": batch()["input_ids"]}
    run = recorded(sdpa_decoder(inplace=True), sites, inputs, mask=MASK)
    plain = observed(sdpa_decoder(), inputs, {column.site["path"] for column in run.sites})
    for column in run.sites:
        grid = plain[column.site["path"]][0][column.site["port"] == "out"]
        assert torch.equal(column.to_torch(), packed(grid, MASK)), column.name
    assert len(run.sites) == 3 * 6 + 1


def test_tokens_are_taken_before_they_are_changed_in_place(make: Make, opened: Opened) -> None:
    """A loop that reuses its buffers within the context does not change what is recorded of the forward."""
    model, inputs = llama(), {**batch(), "position_ids": torch.arange(7).expand(BATCH, 7).clone()}
    recorder = make(model, "resid_post[1]")
    with torch.no_grad(), recorder.batch(ids=ids_of(0)):
        model(**inputs)
        for value in inputs.values():
            value.zero_()
    run = opened(recorder)
    assert run.tables["token"].lengths.tolist() == list(LENGTHS)
    assert torch.equal(run["token/input_ids"].to_torch(), packed(batch()["input_ids"], MASK))
    assert run["token/position"][0].tolist() == list(range(7))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_modes(mode: Callable[[], Any], make: Make, opened: Opened) -> None:
    """Without gradients, with them, or in inference mode: the same rows, and outputs as usable as ever."""
    model = llama()
    recorder = make(model, "resid_post[1]")
    with mode(), recorder.batch(ids=ids_of(0)):
        output = model(**batch()).last_hidden_state
        assert output.requires_grad == torch.is_grad_enabled()
        assert output.is_inference() == torch.is_inference_mode_enabled()
    assert torch.equal(opened(recorder)["layers.1:out"].to_torch(), rows_of(model, "layers.1", 0))


def test_autocast(make: Make, opened: Opened) -> None:
    """Under autocast every site keeps the dtype it was computed in."""
    model = llama()
    recorder = make(model, ["embed", "layers.1.mlp.up_proj", "resid_post[1]"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with recorder.batch(ids=ids_of(0)):
            watched = list(tensors(model(**batch())))
        plain = list(tensors(model(**batch())))
        seen = observed(model, batch(), {"layers.1.mlp.up_proj", "layers.1"})
    run = opened(recorder)
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))
    assert run["embed_tokens:out"].to_torch().dtype == torch.float32
    assert run["layers.1.mlp.up_proj:out"].to_torch().dtype == torch.bfloat16
    for path, [(_, grid)] in seen.items():
        assert torch.equal(run[f"{path}:out"].to_torch(), packed(grid, MASK))


def test_values_that_are_not_finite(recorded: Callable[..., Run]) -> None:
    """NaN and infinity are recorded as they are; the part says how many rows of a column hold some."""
    model = llama()
    token = int(batch()["input_ids"][0, 2])
    with torch.no_grad():
        model.embed_tokens.weight[token, 3], model.embed_tokens.weight[token, 4] = float("nan"), float("-inf")
    run = recorded(model, ["embed", "resid_post[1]"], batch())
    wanted = {path: packed(observed(model, batch(), {path})[path][0][1], MASK) for path in ("embed_tokens", "layers.1")}
    [part] = run.parts
    for path, rows in wanted.items():
        assert np.array_equal(run[f"token/{path}:out"].rows().view("u4"), rows.numpy().view("u4"))
        assert part.nonfinite[f"token/{path}:out"] == int((~rows.isfinite()).any(1).sum()) > 0


def test_finite_models_have_no_nonfinite_rows(recorded: Callable[..., Run]) -> None:
    """Also where the sum over all values overflows half precision."""
    model = llama().to(torch.float16)
    with torch.no_grad():
        model.embed_tokens.weight.fill_(6e4)
    run = recorded(model, ["embed"], batch())
    assert run["embed_tokens:out"].rows().max() == np.float16(6e4)
    assert set(run.parts[0].nonfinite.values()) <= {0}


# --- training -------------------------------------------------------------------------------------------------------------------


def train_once(model: nn.Module, context: Any, inputs: Inputs) -> list[Tensor]:
    """Loss and gradients of one step, with dropout, from the same random state."""
    model.train()
    torch.manual_seed(3)
    with context:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_with_the_backward_inside(make: Make, opened: Opened, dtype: torch.dtype) -> None:
    """Loss and gradients are the same bit for bit with and without recording, dropout included."""
    options = {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.1}
    plain, watched = gpt2(**options).to(dtype), gpt2(**options).to(dtype)
    recorder = make(watched, ["resid_pre", "resid_post", "attn_out", "mlp_out"])
    expected = train_once(plain, nullcontext(), batch())
    found = train_once(watched, recorder.batch(ids=ids_of(0)), batch())
    assert len(found) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(opened(recorder)) == BATCH


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(make: Make, opened: Opened, reentrant: bool) -> None:
    """What the backward computes a second time is not recorded a second time; gradients are the same."""
    plain, watched = llama_lm(), llama_lm()
    for model in (plain, watched):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer transformers call it activation_checkpointing_enable
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    recorder = make(watched, ["resid_pre", "resid_post", "model.layers.*.mlp.up_proj"])
    expected = train_once(plain, nullcontext(), batch())
    found = train_once(watched, recorder.batch(ids=ids_of(0)), batch())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    run = opened(recorder)
    assert {column.site["call"] for column in run.sites} == {1}
    assert len(run.sites) == 9
    for path in ("model.layers.1", "model.layers.1.mlp.up_proj"):
        assert torch.equal(run[f"{path}:out"].to_torch(), rows_of(watched.eval(), path, 0))


def test_several_steps(make: Make, opened: Opened) -> None:
    """Weights that change between batches are recorded as they were."""
    model = gpt2()
    recorder, optimizer = make(model, "resid_post[1]"), torch.optim.SGD(model.parameters(), lr=0.5)
    expected = []
    for number in range(3):
        expected.append(rows_of(model, "transformer.h.1", number))
        with recorder.batch(ids=ids_of(number)):
            model(**batch(seed=number), labels=batch(seed=number)["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(opened(recorder)["transformer.h.1:out"].to_torch(), torch.cat(expected))
    assert not torch.equal(rows_of(model, "transformer.h.1", 0), expected[0])


# --- several recorders, models, threads -----------------------------------------------------------------------------------------


def test_nested_recorders_on_one_model(make: Make, opened: Opened) -> None:
    """Each records its own sites of the same forward."""
    model = llama()
    outer, inner = make(model, ["resid_post", "embed"]), make(model, "resid_post")
    before = hook_count(model)
    with torch.no_grad(), outer.batch(ids=ids_of(0)), inner.batch(ids=[f"x{n}" for n in range(BATCH)]):
        model(**batch())
    assert hook_count(model) == before
    take(outer, model, 1)
    runs = opened(outer), opened(inner)
    assert runs[0].ids == [*ids_of(0), *ids_of(1)]
    assert runs[1].ids == [f"x{n}" for n in range(BATCH)]
    assert torch.equal(runs[0]["layers.1:out"].to_torch()[: sum(LENGTHS)], runs[1]["layers.1:out"].to_torch())
    assert "embed_tokens:out" not in {column.name.partition("/")[2] for column in runs[1].sites}


def test_a_recorder_of_a_part_of_the_model(make: Make, opened: Opened) -> None:
    """A submodule can be recorded while the whole model runs."""
    whole = llama_lm()
    recorder = make(whole.model, "resid_post[1]")
    with torch.no_grad(), recorder.batch(ids=ids_of(0)):
        whole(**batch())
    assert torch.equal(opened(recorder)["layers.1:out"].to_torch(), rows_of(whole, "model.layers.1", 0))


def test_two_models_in_one_context(make: Make, opened: Opened) -> None:
    """Each recorder looks at its own model only."""
    models = sdpa_decoder(seed=1), sdpa_decoder(seed=2)
    recorders = [make(model, "resid_post[1]") for model in models]
    with torch.no_grad(), recorders[0].batch(ids=ids_of(0)), recorders[1].batch(ids=ids_of(0)):
        for model in models:
            model(batch()["input_ids"])
    for recorder, model in zip(recorders, models, strict=True):
        grid = observed(model, {"tokens": batch()["input_ids"]}, {"blocks.1"})["blocks.1"][0][1]
        assert torch.equal(opened(recorder)["blocks.1:out"].to_torch(), grid.flatten(0, 1))


def test_threads(make: Make, opened: Opened) -> None:
    """Four threads, each with a model and a recorder of its own."""
    models = [sdpa_decoder(seed=seed) for seed in range(4)]
    recorders = [make(model, "resid_post[1]") for model in models]

    def work(place: int) -> None:
        for number in range(6):
            with torch.no_grad(), recorders[place].batch(ids=ids_of(number)):
                models[place](batch(seed=10 * place + number)["input_ids"])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, place) for place in range(4)]:
            done.result()
    for place, (recorder, model) in enumerate(zip(recorders, models, strict=True)):
        inputs = [{"tokens": batch(seed=10 * place + number)["input_ids"]} for number in range(6)]
        expected = torch.cat([observed(model, each, {"blocks.1"})["blocks.1"][0][1].flatten(0, 1) for each in inputs])
        assert torch.equal(opened(recorder)["blocks.1:out"].to_torch(), expected)


def test_a_copy_of_the_model_made_inside_a_context(make: Make, opened: Opened) -> None:
    """A copy is another model: its forward counts neither as the recorded one nor as a second one."""
    model = llama()
    recorder = make(model, "resid_post[1]")
    with torch.no_grad(), recorder.batch(ids=ids_of(0)):
        copied = copy.deepcopy(model)
        copied.layers[1].mlp.down_proj.weight.zero_()
        copied(**batch(seed=5))
        model(**batch())
        copied(**batch(seed=6))
    assert torch.equal(opened(recorder)["layers.1:out"].to_torch(), rows_of(model, "layers.1", 0))


def test_a_copy_of_the_model_works_after_the_context(make: Make) -> None:
    """Hooks that were copied along with the model do nothing once the context is over, nor do they fail."""
    model = llama()
    recorder = make(model, "resid_post[1]")
    with torch.no_grad(), recorder.batch(ids=ids_of(0)):
        copied = copy.deepcopy(model)
        model(**batch())
    take(recorder, model, 1)
    recorder.close()
    with torch.no_grad():
        assert torch.equal(copied(**batch()).last_hidden_state, model(**batch()).last_hidden_state)


def test_a_closed_recorder_does_not_keep_the_model_alive(tmp_path: Path) -> None:
    """Once user and recorder let go of it, the model is freed."""
    model = sdpa_decoder()
    gone = weakref.ref(model)
    recorder = Recorder(model, sites="resid_post", to=tmp_path / "run.zarr", durability="rename")
    with recorder, recorder.batch(ids=ids_of(0)):
        model(batch()["input_ids"])
    del model, recorder
    gc.collect()
    assert gone() is None


# --- the run behind it ----------------------------------------------------------------------------------------------------------


def test_modes(tmp_path: Path) -> None:
    """create refuses a run that exists, overwrite starts anew, resume continues."""
    model, to = llama(), tmp_path / "run.zarr"

    def once(mode: Any, number: int) -> None:
        with Recorder(model, sites="resid_post[1]", to=to, mode=mode, durability="rename") as recorder:
            take(recorder, model, number)

    once("create", 0)
    with pytest.raises(RunExistsError, match="resume"):
        once("create", 1)
    assert open_run(to).ids == ids_of(0)
    once("resume", 1)
    assert open_run(to).ids == [*ids_of(0), *ids_of(1)]
    once("overwrite", 2)
    assert open_run(to).ids == ids_of(2)


def test_commit_and_close(make: Make) -> None:
    """Committed batches are visible while recording goes on; nothing can be recorded after close, and closing twice is fine."""
    model = llama()
    recorder = make(model, "resid_post[1]")
    take(recorder, model, 0)
    recorder.commit()
    assert open_run(recorder.writer.path).ids == ids_of(0)
    take(recorder, model, 1)
    recorder.close()
    recorder.close()
    assert open_run(recorder.writer.path).ids == [*ids_of(0), *ids_of(1)]
    with pytest.raises(BrokenWriterError):
        take(recorder, model, 2)
    assert hook_count(model) == hook_count(llama())


def test_an_error_in_the_loop_keeps_what_was_recorded(tmp_path: Path) -> None:
    """Leaving the recorder by an exception commits the batches before it."""
    model, to = llama(), tmp_path / "run.zarr"
    with suppress(Broken), Recorder(model, sites="resid_post[1]", to=to, durability="rename") as recorder:
        take(recorder, model, 0)
        raise Broken
    assert open_run(to).ids == ids_of(0)


def test_repr_says_what_is_recorded(make: Make) -> None:
    """The number of taps, the model's class, the run."""
    recorder = make(llama(), "resid_post")
    assert repr(recorder).startswith("<Recorder of 3 taps on LlamaModel to <RunWriter ")


def test_what_the_run_says_of_the_model(recorded: Callable[..., Run]) -> None:
    """Class, number of parameters, dtype, config; nothing about paths."""
    model = llama()
    model.config._name_or_path = "somebodys/own/models/tiny"
    run = recorded(model, "resid_post[1]", batch())
    assert run.model["class"] == "LlamaModel"
    assert run.model["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert run.model["dtype"] == ["float32"]
    assert run.model["config"]["hidden_size"] == HIDDEN
    assert run.model["name"] == "tiny"
    assert "somebodys" not in str(run.model)
    assert run.provenance["torch"] == importlib.metadata.version("torch")


def test_attached_hooks_stay_until_close(make: Make, opened: Opened) -> None:
    """After attach() hooks stay between batches, still record nothing there, and go with close()."""
    model = llama()
    before = hook_count(model)
    recorder = make(model, "resid_post[1]")
    recorder.attach()
    recorder.attach()
    attached = hook_count(model)
    assert attached > before
    model(**batch(seed=9))
    take(recorder, model, 0)
    with suppress(Broken), recorder.batch(ids=ids_of(1)):
        model(**batch(seed=1))
        raise Broken
    assert hook_count(model) == attached
    take(recorder, model, 1)
    run = opened(recorder)
    assert hook_count(model) == before
    assert torch.equal(run["layers.1:out"].to_torch(), rows_of(model, "layers.1", 0, 1))


# --- resuming -------------------------------------------------------------------------------------------------------------------


def resume(make: Make, model: nn.Module, sites: Any, to: Path) -> Recorder:
    """A recorder that continues a run, or begins it."""
    return make(model, sites, to=to, mode="resume")


def test_resuming_skips_batches_that_are_there(make: Make, tmp_path: Path) -> None:
    """The context says `recorded` is False, and needs no forward; one that is run is ignored."""
    model, to = llama(), tmp_path / "run.zarr"
    first = resume(make, model, "resid_post[1]", to)
    with torch.no_grad(), first.batch(ids=ids_of(0)) as told:
        assert told.recorded
        model(**batch())
    first.close()
    again = resume(make, model, "resid_post[1]", to)
    with again.batch(ids=ids_of(0)) as told:
        assert not told.recorded
        assert hook_count(model) == hook_count(llama())
    take(again, model, 0)
    take(again, model, 1)
    again.close()
    run = open_run(to)
    assert run.ids == [*ids_of(0), *ids_of(1)]
    assert torch.equal(run["layers.1:out"].to_torch(), rows_of(model, "layers.1", 0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_completes_partial_batches(make: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    """Of a batch that overlaps the run only the new examples are added, in every kind of column."""
    model, to = llama().to(dtype), tmp_path / "run.zarr"
    sites = ["resid_post[1]", Site("resid_post[2]", reduce="last"), Site("layers.0.mlp", missing="absent")]
    tags = torch.arange(BATCH * 7).reshape(BATCH, 7)
    words = [[f"{row}{at}" for at in range(length)] for row, length in enumerate(LENGTHS)]

    def record(ids: list[str]) -> None:
        recorder = resume(make, model, sites, to)
        labels = {
            "example/word": [f"{id_}!" for id_ in ids],
            "example/y": [float(ord(id_)) for id_ in ids],
            "token/tag": tags,
            "token/w": words,
        }
        with torch.no_grad(), recorder.batch(ids=ids, labels=labels):
            model(**batch())
        recorder.close()

    record(list("abcde"))
    record(list("xbycz"))
    run = open_run(to)
    assert run.ids == list("abcdexyz")
    places = [0, 1, 2, 3, 4, 0, 2, 4]
    full = {path: observed(model, batch(), {path})[path][0][1] for path in ("layers.0.mlp", "layers.1", "layers.2")}
    for number, row in enumerate(places):
        length = LENGTHS[row]
        for name, path in (("token/layers.1:out", "layers.1"), ("token.layers.0.mlp/layers.0.mlp:out", "layers.0.mlp")):
            assert np.array_equal(run[name][number].astype("f4"), full[path][row, :length].float().numpy())
        assert np.array_equal(
            run["example/layers.2:out|last"][number].astype("f4"), full["layers.2"][row, length - 1].float().numpy()
        )
        assert run["token/tag"][number].tolist() == tags[row, :length].tolist()
        assert run["token/w"][number].tolist() == words[row]
        assert run["token/input_ids"][number].tolist() == batch()["input_ids"][row, :length].tolist()
    assert [run["example/word"][number] for number in range(8)] == [f"{id_}!" for id_ in "abcdexyz"]
    assert run.verify().ok


def test_resuming_counts_only_new_rows_as_nonfinite(make: Make, tmp_path: Path) -> None:
    """Rows that are left out because they are in the run do not count again."""
    model, to = llama(), tmp_path / "run.zarr"
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    for ids in ("abcde", "abcdx"):
        recorder = resume(make, model, "final_norm", to)
        with torch.no_grad(), recorder.batch(ids=list(ids)):
            model(**batch())
        recorder.close()
    counted = [part.nonfinite["token/norm:out"] for part in open_run(to).parts]
    assert counted == [sum(LENGTHS), LENGTHS[4]]


def test_resuming_by_content(make: Make, tmp_path: Path) -> None:
    """Examples known by their tokens are left out as well."""
    model, to = llama(), tmp_path / "run.zarr"
    other = batch(seed=1)
    mixed = {name: torch.cat([batch()[name][:2], other[name][2:]]) for name in other}
    for inputs in (batch(), mixed, mixed):
        recorder = resume(make, model, "resid_post[1]", to)
        with torch.no_grad(), recorder.batch(ids="content"):
            model(**inputs)
        recorder.close()
    run = open_run(to)
    assert len(run) == BATCH + 3
    assert [run["token/input_ids"][BATCH + n].tolist() for n in range(3)] == [
        other["input_ids"][2 + n, : LENGTHS[2 + n]].tolist() for n in range(3)
    ]


def test_resuming_with_other_weights(make: Make, tmp_path: Path) -> None:
    """A run is continued only with the model it was recorded from."""
    to = tmp_path / "run.zarr"
    recorder = resume(make, sdpa_decoder(seed=1), "resid_post[1]", to)
    with recorder.batch(ids=ids_of(0)):
        recorder._model(batch()["input_ids"])
    recorder.close()
    with pytest.raises(SchemaError, match="weights"):
        resume(make, sdpa_decoder(seed=2), "resid_post[1]", to)


def test_an_example_given_twice_without_resuming(make: Make, opened: Opened) -> None:
    """It is an error after the block; the batch is left out and the next one works."""
    model = llama()
    recorder = make(model, "resid_post[1]")
    take(recorder, model, 0)
    with pytest.raises(KeyRepeatedError, match="4"), torch.no_grad(), recorder.batch(ids=[4, 20, 21, 22, 23]):
        model(**batch(seed=1))
    take(recorder, model, 2)
    run = opened(recorder)
    assert run.ids == [*ids_of(0), *ids_of(2)]
    assert torch.equal(run["layers.1:out"].to_torch(), rows_of(model, "layers.1", 0, 2))


# --- options of a site ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(recorded: Callable[..., Run], dtype: str) -> None:
    """Rows are cast to the dtype asked for, other sites are not."""
    model = llama()
    run = recorded(model, [Site("resid_post[1]", dtype=dtype), "resid_post[2]"], batch())
    wanted = rows_of(model, "layers.1", 0).to(getattr(torch, dtype))
    assert run["layers.1:out"].to_torch().dtype == wanted.dtype
    assert torch.equal(run["layers.1:out"].to_torch(), wanted)
    assert run["layers.2:out"].to_torch().dtype == torch.float32


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["mean", "max", "first", "last"])
def test_reduce(recorded: Callable[..., Run], kind: str, side: str) -> None:
    """One row per example, of its real tokens: compared with numpy on the full record."""
    model = llama()
    full = recorded(model, "resid_post[1]", batch(side))["layers.1:out"]
    run = recorded(model, Site("resid_post[1]", reduce=kind), batch(side))
    of = {
        "mean": lambda rows: rows.mean(0),
        "max": lambda rows: rows.max(0),
        "first": lambda rows: rows[0],
        "last": lambda rows: rows[-1],
    }
    wanted = np.stack([of[kind](full[number]) for number in range(BATCH)])
    found = run[f"example/layers.1:out|{kind}"]
    assert found.shape == (BATCH, HIDDEN)
    if kind == "mean":
        np.testing.assert_allclose(found.rows(), wanted, rtol=1e-5, atol=1e-6)
    else:
        assert np.array_equal(found.rows(), wanted)


def test_a_reduction_alone_needs_no_token_rows(recorded: Callable[..., Run]) -> None:
    """Tokens are still listed, but no site has a row per token."""
    run = recorded(llama(), Site("resid_post", reduce="mean"), batch())
    assert set(run.tables["token"]) == {"input_ids", "position"}
    assert len(run.sites) == 3


def test_a_model_in_half_precision_keeps_its_dtype(recorded: Callable[..., Run]) -> None:
    """Nothing is cast unasked, also not by a reduction."""
    model = llama().to(torch.bfloat16)
    run = recorded(model, ["resid_post[1]", Site("resid_post[2]", reduce="mean")], in_dtype(batch(), torch.bfloat16))
    assert run["layers.1:out"].to_torch().dtype == torch.bfloat16
    assert run["example/layers.2:out|mean"].to_torch().dtype == torch.bfloat16
    assert torch.equal(run["layers.1:out"].to_torch(), rows_of(model, "layers.1", 0))


def test_labels_make_the_decoders_stream(recorded: Callable[..., Run]) -> None:
    """T5 turns labels into decoder inputs; positions whose label is -100 are pads."""
    labels = torch.arange(3, 3 + BATCH * 11).reshape(BATCH, 11)
    lengths = (2, 11, 4, 8, 3)
    labels = labels.masked_fill(torch.arange(11) >= torch.tensor(lengths)[:, None], -100)
    model, inputs = t5_lm(), {**batch(), "labels": labels}
    run = recorded(model, ["decoder.resid_post", "encoder.resid_post"], inputs)
    assert run.tables["token.decoder"].lengths.tolist() == list(lengths)
    assert run.tables["token"].lengths.tolist() == list(LENGTHS)
    grid = observed(model, inputs, {"decoder.block.1"})["decoder.block.1"][0][1]
    assert torch.equal(run["token.decoder/decoder.block.1:out"].to_torch(), packed(grid, labels != -100))
    shifted = model._shift_right(labels)
    assert torch.equal(run["token.decoder/input_ids"].to_torch(), packed(shifted, labels != -100))
