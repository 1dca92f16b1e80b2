"""Attention in the scalars that go to a tracker, against an eager copy of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attention_models import INTERFACE, SOFTMAX, SWIN, Family, attentions, kept
from tiny_models import Inputs, random_tokens

from tensortape.instrument import Recorder, Site, metrics
from tensortape.instrument.attention import summary

Make = Callable[..., Recorder]
FAMILIES = {name: {**INTERFACE, **SOFTMAX}[name] for name in ("gpt2", "llama", "gemma2", "gpt_oss", "t5", "albert", "bert", "vit")}
WEIGHTS = {name: SOFTMAX[name] for name in ("bloom", "deberta_v2")}


def logged(make: Make, family: Family, sites: Any, inputs: Inputs | None = None) -> dict[str, float]:
    """What a tracker is given of attention after one recorded step, by `<module path>/<number>`."""
    found: dict[str, float] = {}
    recorder = make(family.build(), sites, every=1, log=lambda scalars, step: found.update(scalars))
    inputs = inputs or family.inputs("right")
    with torch.no_grad(), recorder.batch(ids=list(range(len(next(iter(inputs.values())))))):
        recorder.model(**inputs)
    recorder.step()
    names = [name.removeprefix("tensortape/") for name in found]
    return {name: found[f"tensortape/{name}"] for name in names if name.rpartition("/")[2] in ("entropy", "sink")}


def expected(family: Family, inputs: Inputs | None = None, chosen: Callable[[int, int], Any] | None = None) -> dict[str, float]:
    """The same of an eager copy: of all queries but the first of each example, or those that are chosen of an example."""
    found = {}
    every = attentions(family.build("eager"), inputs or family.inputs("right"))
    for number, (site, weights) in enumerate(zip(family.sites(), every, strict=True)):
        entropies, masses = [], []
        masks = family.masks(number, "right") if inputs is None else (None, None)
        for example, matrix in enumerate(kept(weights, *masks)):
            first = 0 if family.is_cross(number) else 1
            wide = matrix.astype(np.float64)
            rows = wide[:, first:] if chosen is None else wide[:, chosen(example, wide.shape[1])]
            entropies.append(-(rows * np.log(np.where(rows > 0, rows, 1))).sum(-1).ravel())
            masses.append(rows[..., 0].ravel())
        found[f"{site}/entropy"], found[f"{site}/sink"] = (float(np.concatenate(one).mean()) for one in (entropies, masses))
    return found


@pytest.fixture
def all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "QUERIES", 1000)


@pytest.mark.usefixtures("all_queries")
@pytest.mark.parametrize("family", [pytest.param(family, id=name) for name, family in {**FAMILIES, **WEIGHTS}.items()])
def test_numbers_of_all_queries_are_those_of_an_eager_copy(make: Make, family: Family) -> None:
    """Causal, grouped, windowed, capped, biased, with sinks; across two streams; of weights that no queries and keys explain."""
    assert logged(make, family, "attention") == pytest.approx(expected(family), abs=1e-5)


@pytest.mark.usefixtures("all_queries")
@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"store": "weights"}, ("entropy", "sink")),
        ({"reduce": "entropy"}, ("entropy",)),
        ({"keys": [-1, 0]}, ("sink",)),
        ({"keys": [-1]}, ()),
        ({"reduce": "received"}, ()),
    ],
    ids=str,
)
def test_whatever_is_recorded_of_weights(make: Make, name: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    family = FAMILIES[name]
    pattern = "attention" if "store" in options else "weights"
    found = logged(make, family, Site(pattern, **options))
    wanted = {key: value for key, value in expected(family).items() if key.rpartition("/")[2] in known}
    assert found == pytest.approx(wanted, abs=1e-5)


def test_some_queries(make: Make) -> None:
    """Of those that are recorded: the last of each example, and not its first."""
    found = logged(make, FAMILIES["llama"], Site("weights", queries=[-1, 0]))
    assert found == pytest.approx(expected(FAMILIES["llama"], chosen=lambda example, count: [count - 1][: count - 1]), abs=1e-5)


def test_windows_have_no_first_key(make: Make) -> None:
    found = logged(make, SWIN, "attention")
    assert [name for name in found if name.endswith("/sink") and "layers.0." in name] == []
    entropies = [value for name, value in found.items() if name.endswith("/entropy")]
    assert len(entropies) == len(SWIN.paths)
    assert all(1 < value < np.log(16) for value in entropies), "of the 16 tokens of a window"


def test_a_large_batch_costs_a_few_queries(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    family, shape = FAMILIES["gpt2"], (23, 17)
    inputs = {"input_ids": random_tokens(*shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
    seen: list[int] = []

    def counted(q: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        seen.append(q.shape[1])
        return whole(q, *given, **more)

    whole = summary.weights
    monkeypatch.setattr(summary, "weights", counted)
    examples = np.linspace(0, 22, summary.EXAMPLES).astype(int)
    queries = 1 + np.linspace(0, 15, 8).astype(int)
    wanted = expected(family, inputs, lambda example, count: queries if example in examples else [])
    assert logged(make, family, "attention", inputs) == pytest.approx(wanted, abs=1e-5)
    assert seen == [8] * 8 * len(family.paths)


def test_nothing_is_computed_for_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "summaries", None)
    recorder = make(FAMILIES["gpt2"].build(), "attention", every=1)
    with torch.no_grad(), recorder.batch(ids=list("abcde")):
        recorder.model(**FAMILIES["gpt2"].inputs("right"))
    recorder.step()


def test_examples_of_one_token_have_no_later_query(make: Make) -> None:
    inputs = {"input_ids": random_tokens(5, 1), "attention_mask": torch.ones(5, 1, dtype=torch.long)}
    assert logged(make, FAMILIES["gpt2"], "attention", inputs) == {}
    assert logged(make, FAMILIES["gpt2"], Site("weights", reduce="entropy"), inputs) == {}
