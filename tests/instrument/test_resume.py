"""A run that was interrupted and resumed, or added to, equals one that was recorded in one go."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import PAD, bert, llama, sdpa_decoder
from torch import Tensor, nn

from tensortape.instrument import Recorder, Site, record
from tensortape.instrument.differentiation import differentiate
from tensortape.instrument.provenance import about
from tensortape.stores import Run, open_run
from tensortape.stores.errors import SchemaError

EXAMPLES = 23
SITES: list[Any] = ["resid_post[1]", Site("mlp_out[0]", reduce="mean"), "layers.2.self_attn:q"]


def tokens(number: int) -> Tensor:
    """The tokens of an example: 2 to 12 of them."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, 97, (2 + number * 7 % 11,), generator=generator)


def grid(numbers: Sequence[int]) -> dict[str, Tensor]:
    """A padded batch, as wide as its longest example."""
    rows = torch.nn.utils.rnn.pad_sequence([tokens(number) for number in numbers], batch_first=True, padding_value=PAD)
    return {"input_ids": rows, "attention_mask": (rows != PAD).long()}


def labels(numbers: Sequence[int]) -> dict[str, Any]:
    return {
        "example/topic": [f"topic {number % 3}" for number in numbers],
        "example/score": np.array(numbers, np.float32) / 7,
        "token/tag": [np.arange(len(tokens(number))) + number for number in numbers],
    }


def batches(numbers: Sequence[int], size: int = 5) -> list[list[int]]:
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


class Interrupted(Exception):
    """Stands for whatever ends a recording."""


def go(model: nn.Module, to: Path, given: Sequence[Sequence[int]], sites: Any = SITES, *, stop: int = -1, **options: Any) -> int:
    """Record batches, up to a batch in which the loop is interrupted; the number of forwards that were run."""
    forwards = 0
    with Recorder(model, sites=sites, to=to, durability="rename", **{"mode": "resume", **options}) as recorder, torch.no_grad():
        for place, numbers in enumerate(given):
            with recorder.batch(ids=list(numbers), labels=labels(numbers)) as told:
                if told.recorded:
                    model(**grid(numbers))
                    forwards += 1
                if place == stop:
                    raise Interrupted
    return forwards


def stopped(model: nn.Module, to: Path, given: Sequence[Sequence[int]], stop: int, **options: Any) -> None:
    with pytest.raises(Interrupted):
        go(model, to, given, stop=stop, **options)


def assert_same(found: Run, expected: Run, exact: Sequence[int] | None = None) -> None:
    """The same keys, tokens, labels and lengths; values bit for bit (of the `exact` examples; of others nearly)."""
    assert sorted(found.keys) == sorted(expected.keys)
    columns = [column.name for table in expected.tables.values() for column in table.values()]
    assert sorted(columns) == sorted(column.name for table in found.tables.values() for column in table.values())
    for name in columns:
        if name.startswith(("example/start.",)):
            continue  # where the rows lie is the part's own matter
        for number, id_ in enumerate(expected.ids):
            mine, theirs = found[name][found.ids.index(id_)], expected[name][number]
            values = expected[name].site is not None and exact is not None and id_ not in exact
            if values:
                np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_array_equal(mine, theirs)
    assert found.verify().ok


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All examples in one go."""
    to = tmp_path_factory.mktemp("whole") / "run.zarr"
    assert go(llama(), to, batches(range(EXAMPLES)), mode="create") == 5
    return open_run(to)


# --- interrupted and resumed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(5))
def test_interrupted_in_any_batch(to: Path, whole: Run, stop: int) -> None:
    """The batch in which it happened leaves nothing; what came before is not run again."""
    model, given = llama(), batches(range(EXAMPLES))
    stopped(model, to, given, stop)
    assert len(open_run(to) if stop else ()) == 5 * stop
    assert go(model, to, given) == 5 - stop
    assert open_run(to).digest() == whole.digest()
    assert_same(open_run(to), whole)


def test_interrupted_again_and_again(to: Path, whole: Run) -> None:
    model, given = llama(), batches(range(EXAMPLES))
    for stop in (1, 2, 2, 4):
        stopped(model, to, given, stop)
    assert go(model, to, given) == 1
    assert open_run(to).digest() == whole.digest()


def test_resumed_in_another_order(to: Path, whole: Run) -> None:
    """The same batches the other way round: every example meets the batch it would have met."""
    model, given = llama(), batches(range(EXAMPLES))
    stopped(model, to, given, 2)
    assert go(model, to, given[::-1]) == 3
    assert open_run(to).digest() == whole.digest()


def test_resumed_with_other_batches(to: Path, whole: Run) -> None:
    """A batch that overlaps with what is there is run whole, and only its new examples are written."""
    model = llama()
    stopped(model, to, batches(range(EXAMPLES)), 2)
    assert go(model, to, batches(range(EXAMPLES)[::-1], 7)) == 2
    run = open_run(to)
    assert [part.examples for part in run.parts] == [10, 13]
    assert_same(run, whole, exact=range(10))


def test_everything_there_already(to: Path) -> None:
    """Nothing is run, and nothing written."""
    model, given = llama(), batches(range(EXAMPLES))
    go(model, to, given)
    before = {path: path.stat().st_mtime_ns for path in to.rglob("*")}
    for again in (given, given[::-1], batches(range(EXAMPLES), 3)):
        assert go(model, to, again) == 0
    assert {path: path.stat().st_mtime_ns for path in to.rglob("*")} == before


def test_an_example_that_comes_twice_in_a_resumed_loop(to: Path, whole: Run) -> None:
    """It is written once, whether or not it has been committed meanwhile."""
    given = [*batches(range(EXAMPLES)), [0, 1, 2, 3, 4]]
    for options in ({"commit_bytes": 1}, {"commit_seconds": 1e9}):
        go(llama(), to.with_name(f"{len(str(options))}.zarr"), given, **options)
        assert open_run(to.with_name(f"{len(str(options))}.zarr")).digest() == whole.digest()


# --- top-up ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 4])
def test_other_sites(to: Path, tmp_path: Path, size: int) -> None:
    """One after another, in other orders and batches, some overlapping with what is there: one run as if recorded at once."""
    model, every = llama(), range(EXAMPLES)
    further = [Site("resid_post[2]", reduce="last"), "layers.1.mlp:in"]
    steps: list[tuple[Any, Sequence[Sequence[int]]]] = [
        (["resid_post"], batches(every)),
        (["attention"], batches(every, size)[::-1]),
        (["mlp_out", "resid_post[1]"], batches(every, size)),
        (["resid_post", "mlp_out", *further], batches(every, size)),
    ]
    for sites, given in steps:
        assert go(model, to, given, sites) == len(given)
    at_once = tmp_path / "once.zarr"
    go(
        model,
        at_once,
        batches(every),
        ["resid_post", "attention", "mlp_out", *further],
    )
    found, expected = open_run(to), open_run(at_once)
    assert_same(found, expected, exact=None if size == 5 else [])
    assert found.digest() == expected.digest() or size == 4
    for site in expected.attention_sites:
        number = found.ids.index(7)
        np.testing.assert_allclose(found.attention(site)[number], expected.attention(site)[7], atol=1e-5)
    assert go(model, to, batches(every), ["resid_post", "attention"]) == 0


def test_other_examples_and_other_sites(to: Path) -> None:
    """Columns cover different examples; what is missing is filled in last."""
    model = llama()
    go(model, to, batches(range(13)), "resid_post[0]")
    go(model, to, batches(range(7, 23)), "resid_post[1]")
    run = open_run(to)
    assert run["token/layers.0:out"].present.tolist() == [number < 13 for number in run.ids]
    assert run["token/layers.1:out"].present.tolist() == [number >= 7 for number in run.ids]
    go(model, to, batches(range(EXAMPLES)), ["resid_post[0]", "resid_post[1]"])
    run = open_run(to)
    assert run["token/layers.0:out"].present.all()
    assert run["token/layers.1:out"].present.all()
    assert run.verify().ok


def test_other_labels(to: Path) -> None:
    """They come with a forward, which writes nothing of the sites again."""
    model = llama()
    go(model, to, batches(range(EXAMPLES)), "resid_post[0]")
    with Recorder(model, sites="resid_post[0]", to=to, mode="resume", durability="rename") as recorder, torch.no_grad():
        for numbers in batches(range(EXAMPLES), 3):
            given = {"example/length": [len(tokens(number)) for number in numbers], **labels(numbers)}
            with recorder.batch(ids=numbers, labels=given) as told:
                assert told.recorded
                model(**grid(numbers))
    run = open_run(to)
    assert [run["example/length"][run.ids.index(number)] for number in range(EXAMPLES)] == [
        len(tokens(number)) for number in range(EXAMPLES)
    ]
    assert set(run.parts[-1].columns) == {
        *("example/id", "example/phase", "example/step", "example/length"),
    }


def feature(at: int, outputs: Any, entries: Any) -> Tensor:
    """One feature of each example's first token."""
    found: Tensor = outputs.last_hidden_state[:, 0, at]
    return found


def gradients(model: nn.Module, to: Path, names: Sequence[str], sites: Any) -> int:
    """Record gradients of sums of some features of the output; the number of forwards."""
    targets: dict[str, Any] = {name: partial(feature, len(name)) for name in names}
    forwards = 0
    with Recorder(model, sites=sites, to=to, mode="resume", durability="rename") as recorder:
        for numbers in batches(range(EXAMPLES)):
            with recorder.batch(ids=numbers, targets=targets) as told:
                if told.recorded:
                    differentiate(recorder, told, model, grid(numbers), targets, {})
                    forwards += 1
    return forwards


def test_gradients_of_further_targets(to: Path, tmp_path: Path) -> None:
    model = llama()
    go(model, to, batches(range(EXAMPLES)), "resid_post[0]")
    assert gradients(model, to, ["one"], "resid_post[0]:out.grad") == 5
    assert gradients(model, to, ["one"], "resid_post[0]:out.grad") == 0
    assert gradients(model, to, ["one", "second"], ["resid_post[0]:out.grad", "resid_post[0]"]) == 5
    assert gradients(model, to, ["second", "one"], ["resid_post[0]:out.grad", "resid_post[0]"]) == 0
    at_once = tmp_path / "once.zarr"
    gradients(model, at_once, ["one", "second"], "resid_post[0]:out.grad")
    for name in ("one", "second"):
        column = f"token/layers.0:out.grad@{name}"
        for mine, theirs in zip(open_run(to)[column][:], open_run(at_once)[column][:], strict=True):
            assert np.array_equal(mine, theirs)
            assert mine.any()


def test_a_plain_loop_with_targets_is_skipped_without_an_error(to: Path) -> None:
    """`recorder.target` brackets nothing there; a loop need not know."""
    model, numbers = llama(), list(range(5))
    for _ in range(2):
        with (
            Recorder(model, sites="resid_post[0]:out.grad@up", to=to, mode="resume", durability="rename") as recorder,
            recorder.batch(ids=numbers) as told,
            recorder.target("up", reduction="sum"),
        ):
            model(**grid(numbers)).last_hidden_state.sum().backward()
    assert not told.recorded
    assert len(open_run(to).parts) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_partial_batches_in_half_precision(to: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Values per token and per example keep their dtype where only some examples of a batch are written."""
    model = bert().to(dtype)
    sites = ["resid_post[1]", Site("resid_post[2]", reduce="first")]
    go(model, to, [[0, 1, 2, 3]], sites)
    go(model, to, [[3, 4, 1, 5, 0]], sites)
    go(model, tmp_path / "other.zarr", [[3, 4, 1, 5, 0]], sites)
    run, other = open_run(to), open_run(tmp_path / "other.zarr")
    for column in other.sites:
        assert run[column.name].dtype == column.dtype
        for id_ in (4, 5):
            assert np.array_equal(run[column.name][run.ids.index(id_)], column[other.ids.index(id_)])


# --- refused --------------------------------------------------------------------------------------------------------------------


def refused(to: Path, model: nn.Module, message: str, sites: Any = SITES, **options: Any) -> None:
    before = open_run(to).digest()
    with pytest.raises(SchemaError, match=message):
        go(model, to, batches(range(EXAMPLES + 5)), sites, **options)
    assert open_run(to).digest() == before


def once(model: nn.Module, to: Path, sites: Any, ids: Sequence[int], inputs: dict[str, Tensor]) -> None:
    """Add one batch to a run."""
    with (
        Recorder(model, sites=sites, to=to, mode="resume", durability="rename") as recorder,
        torch.no_grad(),
        recorder.batch(ids=ids),
    ):
        model(**inputs)


@pytest.fixture
def begun(to: Path) -> Path:
    go(llama(), to, batches(range(7)))
    return to


def test_other_weights(begun: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    refused(begun, model, r"cannot be resumed: weights was '[0-9a-f]+ and is now '[0-9a-f]+$")


def test_another_config(begun: Path) -> None:
    """With the same weights: what it computes is another thing all the same. Only what differs is named."""
    refused(begun, llama(rms_norm_eps=1e-3), r"cannot be resumed: config\.rms_norm_eps was 1e-06 and is now 0\.001$")


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "99.0"},
        {"name_or_path": "/elsewhere/model"},
        {"architectures": ["Other"]},
        {"use_cache": False},
        {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}},
        {"torch_dtype": "float32"},
        {"_attn_implementation": "eager"},
        {"a_setting_of_a_later_version": 7},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_differs_in_what_does_not_matter(begun: Path, changes: dict[str, Any]) -> None:
    model = llama()
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert go(model, begun, batches(range(7))) == 0


def test_a_nested_config_is_compared_setting_by_setting() -> None:
    model = llama()
    model.config.text_config = {"depth": 3, "id2label": {0: "a"}, "dtype": "float16"}
    assert about(model)["fingerprint"]["config"]["text_config"] == {"depth": 3}
    assert json.dumps(about(model))


def test_another_dtype_of_a_column(begun: Path) -> None:
    refused(begun, llama(), r"'token/layers\.1:out' holds float32 rows.*float16", [Site("resid_post[1]", dtype="float16")])


def test_another_layout_of_a_column(begun: Path) -> None:
    """As many examples as tokens, so that both layouts fit."""
    model, square = llama(), torch.arange(3, 28).reshape(5, 5)

    with pytest.raises(SchemaError, match=r"'token/layers\.1:out'.*layout was 'example token \.\.\.' and is now 'token example"):
        once(model, begun, Site("resid_post[1]", layout="token example ..."), range(50, 55), {"input_ids": square})
    assert len(open_run(begun)) == 7


def test_other_texts_under_the_same_ids(begun: Path) -> None:
    """Cut to other lengths: their rows would not line up."""
    model, cut = llama(), {name: value[:, :5] for name, value in grid([5, 3]).items()}

    given = f"example 3 has {len(tokens(3))} rows in table 'token' of the run, but is given 5; is it cut into the same tokens"
    with pytest.raises(SchemaError, match=given):
        once(model, begun, "resid_post[2]", [5, 3], cut)
    assert len(open_run(begun).parts) == 1


class Words:
    """As much of a tokenizer as `record` needs."""

    is_fast = False
    pad_token_id, eos_token_id, model_max_length = PAD, 2, 512

    def __init__(self, *words: str) -> None:
        self.words = {word: number for number, word in enumerate(words, start=3)}

    def get_vocab(self) -> dict[str, int]:
        return self.words

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "words.json").write_text(json.dumps(self.words))

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.words[word] for word in text.split()]}


TEXTS = ["a b c d", "b a", "d d c b a", "c a b"]


def test_record_again(to: Path) -> None:
    """Texts in another order, some of them new, with the same tokenizer."""
    model, words = bert(), Words("a", "b", "c", "d")
    ids = ["p", "q", "r", "s"]

    def again(order: Sequence[int], sites: Any = "resid_post[1]", **options: Any) -> Run:
        texts, names = [TEXTS[number] for number in order], [ids[number] for number in order]
        return record(model, texts, tokenizer=words, ids=names, to=to, sites=sites, mode="resume", **options)

    again([0, 1, 2])
    run = again([3, 2, 1], batch_size=2)
    assert run.ids == ["p", "q", "r", "s"]
    assert [run["example/text"][number] for number in range(4)] == TEXTS
    targets = {"loss": lambda outputs, entries: outputs.last_hidden_state[:, 0, 0]}
    run = again([1, 3, 0, 2], ["resid_post[1]:out.grad", "attention"], targets=targets)
    assert run["token/encoder.layer.1:out.grad@loss"].present.all()
    parts = len(run.parts)
    assert len(again([0, 1, 2, 3], ["resid_post[1]:out.grad", "attention"], targets=targets).parts) == parts
    with pytest.raises(SchemaError, match="recorded from something else and cannot be resumed: tokenizer was"):
        record(model, TEXTS, tokenizer=Words("b", "a", "c", "d"), to=to, sites="resid_post[1]", mode="resume")


def test_a_model_without_a_config(to: Path) -> None:
    """Its weights tell it."""
    assert set(about(sdpa_decoder())["fingerprint"]) == {"weights"}


def test_labels_and_inputs_may_be_changed_after_the_batch(to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded waits in the background, while the loop fills the same buffers again."""
    import threading

    from tensortape.stores.writer import RunWriter

    go_on = threading.Event()
    write: Callable[..., None] = RunWriter._append
    monkeypatch.setattr(RunWriter, "_append", lambda *given: (go_on.wait(), write(*given)))
    model, numbers = llama(), [0, 8, 5]
    inputs = {name: value.clone() for name, value in grid(numbers).items()}
    inputs["attention_mask"].fill_(1)  # nothing to leave out: what is kept may be the buffer itself
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, -1).clone()
    score, tag, tags = np.arange(3.0), torch.ones_like(inputs["input_ids"]), [np.ones(inputs["input_ids"].shape[1])] * 3
    expected = {name: value.clone() for name, value in inputs.items()}
    with Recorder(model, sites=["embed", "resid_post[2]", "layers.0:in"], to=to, durability="rename") as recorder:
        given = {"example/score": score, "token/tag": tag, "token/tags": tags}
        with torch.no_grad(), recorder.batch(ids=numbers, labels=given):
            states = model(**inputs).last_hidden_state.clone()
        for value in (*inputs.values(), tag):
            value.zero_()
        for array in (score, *tags):
            array.fill(-1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        go_on.set()
    run = open_run(to)
    assert np.array_equal(run["token/input_ids"].rows(), expected["input_ids"].flatten().numpy())
    assert np.array_equal(run["token/position"].rows(), expected["position_ids"].flatten().numpy())
    assert run["example/score"][:] == [0.0, 1.0, 2.0]
    assert (run["token/tag"].rows() == 1).all()
    assert (run["token/tags"].rows() == 1).all()
    assert run["token/layers.2:out"].rows().any()
    assert states.any()
