"""torch.compile ignores hooks that come later: it is noticed, and there are two ways on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BATCH, LENGTHS, SdpaDecoder, batch, hook_count, observed, packed, padding_mask, seeded

from tensortape.instrument import Recorder, record
from tensortape.instrument.errors import CompiledModelError
from tensortape.stores import Run

# torch looks at tensors in ways that it warns of itself; as errors these warnings would end the tracing
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

MASK = padding_mask()
SITES = ["resid_post", "blocks.*.mlp.0", "embed"]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing compiled in one test is left for the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decoder() -> SdpaDecoder:
    """A small model to compile."""
    return seeded(lambda: SdpaDecoder(layers=2))


def compiled(model: SdpaDecoder, how: str) -> Any:
    """Compiled as a whole, in place, or in part; called with and without gradients, so that it is compiled indeed."""
    if how == "whole":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "block in place":
        model.blocks[1].compile(backend="eager")
    else:
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model(batch(seed=50)["input_ids"])
    with torch.no_grad():
        model(batch(seed=50)["input_ids"])
    return model


WAYS = ["whole", "in place", "block in place", "block"]


def record_three(recorder: Recorder, model: Any) -> None:
    """Three batches, with forwards outside a context between them."""
    for number in range(3):
        with torch.no_grad(), recorder.batch(ids=[f"{number}.{row}" for row in range(BATCH)], mask=MASK):
            model(batch(seed=number)["input_ids"])
        with torch.no_grad():
            model(batch(seed=100)["input_ids"])


def check(run: Run) -> None:
    """Every site of every batch equals what an uncompiled model computes."""
    assert len(run) == 3 * BATCH
    assert {column.site["path"] for column in run.sites} == {"blocks.0", "blocks.1", "blocks.0.mlp.0", "blocks.1.mlp.0", "table"}
    for column in run.sites:
        assert "_orig_mod" not in column.name
        for number in range(3):
            [(_, grid)] = observed(decoder(), {"tokens": batch(seed=number)["input_ids"]}, {column.site["path"]})[
                column.site["path"]
            ]
            rows = column.to_torch()[number * sum(LENGTHS) : (number + 1) * sum(LENGTHS)]
            torch.testing.assert_close(rows, packed(grid, MASK))


@pytest.mark.parametrize("how", WAYS)
def test_a_compiled_model_is_refused(how: str, make: Callable[..., Recorder], tmp_path: Path) -> None:
    """The error names the module and both ways on; no hook is placed and no run begun."""
    model = compiled(decoder(), how)
    with pytest.raises(CompiledModelError, match=r"recorder\.attach\(\).*recompile=True"):
        make(model, SITES)
    assert hook_count(model) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", WAYS)
def test_recompiling(how: str, make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """recompile=True gives the right values in all batches, under the model's own names, and takes its hooks away at the end."""
    model = compiled(decoder(), how)
    recorder = make(model, SITES, recompile=True)
    record_three(recorder, model)
    check(opened(recorder))
    assert hook_count(model) == 0
    tokens = batch(seed=3)["input_ids"]
    torch.testing.assert_close(model(tokens), decoder()(tokens))


@pytest.mark.parametrize("how", WAYS)
def test_attaching_before_compiling(how: str, make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """recorder.attach(), then torch.compile: right values in all batches."""
    model = decoder()
    recorder = make(model, SITES)
    recorder.attach()
    model = compiled(model, how)
    record_three(recorder, model)
    check(opened(recorder))
    assert hook_count(model) == 0
    tokens = batch(seed=3)["input_ids"]
    torch.testing.assert_close(model(tokens), decoder()(tokens))


def test_compiling_for_real(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """The same through AOT autograd, with a backward inside the context."""
    model = decoder()
    recorder = make(model, SITES)
    recorder.attach()
    whole = torch.compile(model, backend="aot_eager")
    for number in range(3):
        with recorder.batch(ids=[f"{number}.{row}" for row in range(BATCH)], mask=MASK):
            whole(batch(seed=number)["input_ids"]).sum().backward()
    check(opened(recorder))
    plain = decoder()
    for number in range(3):
        plain(batch(seed=number)["input_ids"]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


def test_an_exception_between_compiled_batches(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """A batch that fails is left out, and those after it are right."""
    model = compiled(decoder(), "whole")
    recorder = make(model, SITES, recompile=True)
    with suppress(ZeroDivisionError), recorder.batch(ids=list("abcde"), mask=MASK):
        model(batch(seed=9)["input_ids"])
        raise ZeroDivisionError
    record_three(recorder, model)
    check(opened(recorder))


def test_batches_of_other_shapes(make: Callable[..., Recorder], opened: Callable[[Recorder], Run]) -> None:
    """Shapes that make torch compile anew change nothing."""
    model = decoder()
    recorder = make(model, "resid_post[1]")
    recorder.attach()
    whole = torch.compile(model, backend="eager")
    shapes = [(7, 3, 5, 1, 6), (4, 9), (2, 2, 8), (11, 1, 1, 1)]
    for number, lengths in enumerate(shapes):
        inputs = batch(seed=number, lengths=lengths)
        with torch.no_grad(), recorder.batch(ids=[f"{number}.{row}" for row in range(len(lengths))], mask=inputs["attention_mask"]):
            whole(inputs["input_ids"])
    run = opened(recorder)
    wanted = []
    for number, lengths in enumerate(shapes):
        inputs = batch(seed=number, lengths=lengths)
        grid = observed(decoder(), {"tokens": inputs["input_ids"]}, {"blocks.1"})["blocks.1"][0][1]
        wanted.append(packed(grid, inputs["attention_mask"]))
    torch.testing.assert_close(run["blocks.1:out"].to_torch(), torch.cat(wanted))


def test_record_of_a_compiled_model(tmp_path: Path) -> None:
    """record() passes recompile= on."""
    model = compiled(decoder(), "whole")
    data = [{"tokens": batch(seed=number)["input_ids"], "id": [f"{number}.{row}" for row in range(BATCH)]} for number in range(2)]
    with pytest.raises(CompiledModelError):
        record(model, data, to=tmp_path / "run.zarr", sites="resid_post", ids="id", durability="rename")
    run = record(model, data, to=tmp_path / "run.zarr", sites="resid_post", ids="id", durability="rename", recompile=True)
    for number in range(2):
        [(_, grid)] = observed(decoder(), {"tokens": batch(seed=number)["input_ids"]}, {"blocks.1"})["blocks.1"]
        rows = run["blocks.1:out"].to_torch()[number * 35 : (number + 1) * 35]
        torch.testing.assert_close(rows, grid.flatten(0, 1))
