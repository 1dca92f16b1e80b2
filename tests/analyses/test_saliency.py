"""Scores of tokens against captum on the live model that was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation
from gradient_models import per_example
from tiny_models import batch, batch_with_positions, bert, gpt2, llama, padding_mask

from tensortape.analyses import AnalysisError, TokenScores, gradient_x_input, rows, token_saliency
from tensortape.analyses.token_texts import TokenTexts
from tensortape.instrument import Recorder, Site, record
from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores.errors import GradientError, MissingExampleError, UnknownColumnError

NEAR = 1e-5
IDS = list("abcde")
MASK = padding_mask()
SIZES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l1": lambda gradient: np.abs(gradient).sum(-1),
    "l2": lambda gradient: np.linalg.norm(gradient, axis=-1),
    "max": lambda gradient: np.abs(gradient).max(-1),
}
MODELS: dict[str, tuple[Callable[[], Any], Callable[[str], dict[str, Any]], dict[str, str]]] = {
    "gpt2": (gpt2, batch_with_positions, {"embed": "transformer.wte", "resid_post[1]": "transformer.h.1"}),
    "llama": (llama, batch, {"embed": "embed_tokens", "resid_post[1]": "layers.1", "layers.0.mlp": "layers.0.mlp"}),
    "bert": (bert, batch_with_positions, {"embed": "embeddings.word_embeddings", "resid_post[0]": "encoder.layer.0"}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recorded(to: Path, name: str, sites: list[Any], **declared: Any) -> Run:
    """One batch with a loss of every example."""
    build, inputs, _ = MODELS[name]
    model = build()
    with Recorder(model, sites=sites, to=to, durability="rename") as recorder, recorder.batch(ids=IDS):
        losses = per_example(model(**inputs("right")), MASK)
        if declared:
            with recorder.target("loss", **declared):
                (losses.mean() if declared["reduction"] == "mean" else losses.sum()).backward()
        else:
            losses.sum().backward()
    return open_run(to)


def by_captum(name: str, path: str, *, multiply: bool) -> list[np.ndarray]:
    """[T, d] of each example, real tokens only."""
    build, inputs, _ = MODELS[name]
    model, given = build(), inputs("right")
    ids = given.pop("input_ids")
    layer = LayerGradientXActivation(
        lambda input_ids: per_example(model(input_ids=input_ids, **given), MASK),
        model.get_submodule(path),
        multiply_by_inputs=multiply,
    )
    found = layer.attribute(ids)
    found = found[0] if isinstance(found, tuple) else found
    return [one[mask != 0].detach().numpy() for one, mask in zip(found, MASK, strict=True)]


def apart(found: TokenScores, expected: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest score, over all examples."""
    assert found.lengths.tolist() == [len(one) for one in expected]
    largest = max(np.abs(one).max(initial=0) for one in expected)
    return float(max(np.abs(found[number] - one).max(initial=0) for number, one in enumerate(expected)) / largest)


@pytest.mark.parametrize(("name", "site"), [(name, site) for name, (_, _, sites) in MODELS.items() for site in sites])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_scores_are_captums(name: str, site: str, reduction: str, tmp_path: Path) -> None:
    """Per token, on ragged examples, whether the loop's loss was a sum or a mean over the batch."""
    path = MODELS[name][2][site]
    run = recorded(tmp_path / "r.zarr", name, [site, f"{site}:out.grad"], reduction=reduction)
    gradients, products = (by_captum(name, path, multiply=multiply) for multiply in (False, True))
    for reduce, size in SIZES.items():
        found = token_saliency(run, site, reduce=reduce)  # type: ignore[arg-type]
        assert apart(found, [size(one) for one in gradients]) < NEAR
    found = gradient_x_input(run, site)
    assert apart(found, [one.sum(-1) for one in products]) < NEAR
    assert min(found.values) < 0 < max(found.values)
    assert (found.site, found.target, found.ids) == (f"{path}:out", "loss", tuple(IDS))


def test_the_input_of_a_module(tmp_path: Path) -> None:
    """resid_pre is a block's input; the gradient there is found by the same name."""
    run = recorded(
        tmp_path / "r.zarr", "llama", ["resid_pre[1]", "resid_pre[1]:in.grad", "resid_post[0]:out.grad"], reduction="sum"
    )
    found, same = token_saliency(run, "resid_pre[1]"), token_saliency(run, "resid_post[0]")
    assert (found.site, same.site) == ("layers.1:in", "layers.0:out")
    assert np.array_equal(found.values, same.values)
    assert token_saliency(run, "layers.1:in") == found


def test_right_before_a_norm_products_are_nothing(tmp_path: Path) -> None:
    """RMSNorm hides the size of the last residual stream from the target, whose gradient is therefore orthogonal to it."""
    run = recorded(tmp_path / "r.zarr", "llama", ["resid_post", "resid_post:out.grad"], reduction="sum")
    last, before = (np.abs(gradient_x_input(run, f"resid_post[{layer}]").values).max() for layer in (2, 1))
    assert last < 1e-3 * before


def test_several_targets(tmp_path: Path) -> None:
    """Each has scores of its own; the one that there is not is named."""
    model, given = llama(), batch("right")
    with Recorder(model, sites=["embed", "embed:out.grad"], to=tmp_path / "r.zarr", durability="rename") as recorder:  # noqa: SIM117
        with recorder.batch(ids=IDS):
            output = model(**given)
            for number, target in enumerate(("left", "right")):
                with recorder.target(target, reduction="sum"):
                    per_example(output, MASK, seed=number).sum().backward(retain_graph=True)
    run = open_run(tmp_path / "r.zarr")
    left, right = (token_saliency(run, target=target) for target in ("left", "right"))
    assert not np.allclose(left.values, right.values)
    with pytest.raises(UnknownColumnError, match=r"'loss'.*embed_tokens:out\.grad@left"):
        token_saliency(run)


# --- what is refused -------------------------------------------------------------------------------------------------------------


def test_an_undeclared_reduction_is_refused_unless_assumed(tmp_path: Path) -> None:
    sites = ["embed", "embed:out.grad"]
    plain = recorded(tmp_path / "a.zarr", "llama", sites)
    declared = recorded(tmp_path / "b.zarr", "llama", sites, reduction="sum")
    for score in (token_saliency, gradient_x_input):
        with pytest.raises(GradientError, match=r"recorder\.target"):
            score(plain)
        assert np.array_equal(score(plain, assume="sum").values, score(declared).values)
        with pytest.raises(ValueError, match="'mean'"):
            score(plain, assume="mean")  # type: ignore[arg-type]


def test_what_was_not_recorded_is_named(tmp_path: Path) -> None:
    run = recorded(tmp_path / "r.zarr", "llama", ["embed:out.grad", "resid_post[1]", "resid_post[0:2]:out.grad"], reduction="sum")
    with pytest.raises(UnknownColumnError, match="embed_tokens:out"):
        gradient_x_input(run)
    with pytest.raises(UnknownColumnError, match="2 gradients"):
        token_saliency(run, "resid_post")
    with pytest.raises(UnknownColumnError, match=r"0 gradients .*embed_tokens:out\.grad@loss"):
        token_saliency(run, "resid_post[2]")
    with pytest.raises(ValueError, match="l1, l2, max"):
        token_saliency(run, reduce="mean")  # type: ignore[arg-type]


def test_a_gradient_per_example_has_no_scores_of_tokens(tmp_path: Path) -> None:
    run = recorded(tmp_path / "r.zarr", "llama", [Site("embed:out.grad", reduce="mean")], reduction="sum")
    with pytest.raises(AnalysisError, match="one gradient per example"):
        token_saliency(run)


# --- how it is stored, who computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_sixteen_bits(dtype: str, tolerance: float, tmp_path: Path) -> None:
    sites = [Site("embed", dtype=dtype), Site("embed:out.grad", dtype=dtype)]
    run = recorded(tmp_path / "r.zarr", "llama", sites, reduction="sum")
    products = by_captum("llama", "embed_tokens", multiply=True)
    assert apart(gradient_x_input(run), [one.sum(-1) for one in products]) < tolerance


def test_a_sample_of_tokens(tmp_path: Path) -> None:
    """Scores are of the drawn tokens, with their texts and values."""
    sites = [Site(one, sample_tokens=0.5) for one in ("embed", "embed:out.grad")]
    run = recorded(tmp_path / "r.zarr", "llama", sites, reduction="sum")
    found = gradient_x_input(run)
    whole = recorded(tmp_path / "w.zarr", "llama", ["embed", "embed:out.grad"], reduction="sum")
    every = gradient_x_input(whole)
    assert 0 < len(found.values) < len(every.values)
    for number in range(len(found)):
        place = run["token.sample0.5.seed0/position"][found.examples[number]]
        np.testing.assert_allclose(found[number], every[int(found.examples[number])][place], rtol=1e-6)


SITE = {"path": "layers.0", "port": "out", "call": 1, "aliases": [["", "resid_post", 0, 1]], "layout": "example token ..."}


def shifted(to: Path, lengths: list[int]) -> tuple[Run, list[np.ndarray], list[np.ndarray]]:
    """A run of 7 features, two of which have means of +3000 and -800; also its activations and gradients in float64."""
    random = np.random.default_rng(0)
    activations, gradients = ([random.normal(size=(length, 7)).astype(np.float32) for length in lengths] for _ in range(2))
    for one in activations:
        one[:, 2] += 3000
        one[:, 5] -= 800
    name = "token/layers.0:out"
    with RunWriter(to, durability="rename") as writer:
        writer.describe(name, site=SITE)
        target = {"target": {"name": "loss", "reduction": "sum"}}
        writer.describe(f"{name}.grad@loss", site={**SITE, **target, "port": "out.grad@loss"})
        writer.append(ids=list(range(len(lengths))), columns={name: activations, f"{name}.grad@loss": gradients})
    return open_run(to), [one.astype(float) for one in activations], [one.astype(float) for one in gradients]


def test_dimensions_with_large_means(tmp_path: Path) -> None:
    run, activations, gradients = shifted(tmp_path / "r.zarr", [13, 0, 29, 1])
    products = [(a * g).sum(-1) for a, g in zip(activations, gradients, strict=True)]
    assert apart(gradient_x_input(run, "resid_post"), products) < 1e-12
    assert apart(token_saliency(run, "resid_post"), [SIZES["l2"](one) for one in gradients]) < 1e-12


def test_the_same_bits_whoever_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE_BYTES", 8192)
    run, *_ = shifted(tmp_path / "r.zarr", [997, 13, 2503, 0, 3001] * 7)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(3) as three, ProcessPoolExecutor(1, get_context("spawn")) as processes:
        alone, *others = (gradient_x_input(run, "resid_post", executor=pool) for pool in (one, three, processes, None))
    assert all(other.values.tobytes() == alone.values.tobytes() for other in others)


def test_some_examples(tmp_path: Path) -> None:
    """Their scores are those they have among all."""
    run, *_ = shifted(tmp_path / "r.zarr", [13, 5, 29, 1, 7])
    every, some = token_saliency(run, "resid_post"), token_saliency(run, "resid_post", examples=[3, 0, 2])
    assert some.examples.tolist() == [0, 2, 3]
    for number, example in enumerate(some.examples.tolist()):
        assert np.array_equal(some[number], every[example])
    assert len(token_saliency(run, "resid_post", examples=2, seed=1)) == 2
    with pytest.raises(MissingExampleError, match="no example"):
        token_saliency(run, "resid_post", examples=[])


# --- texts, tables and pictures --------------------------------------------------------------------------------------------------

TEXTS = ["import os\n\ndef path(name):\n\treturn os.path.join('$a$', \"é\", name)\n", "x = 1\n"]


def next_token_loss(outputs: Any, given: Any) -> torch.Tensor:
    scores = outputs.logits[:, :-1].log_softmax(-1).gather(-1, given["input_ids"][:, 1:, None])[..., 0]
    return -(scores * given["attention_mask"][:, 1:]).sum(1)


@pytest.fixture(scope="module")
def text_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The embedded model over two texts, once with the texts kept and once with token ids and tokenizer alone."""
    from tensortape.app import models

    model, tokenizer = models.load(models.DEMO)
    folder = tmp_path_factory.mktemp("texts")
    options: Any = {"tokenizer": tokenizer, "sites": ["embed", "embed:out.grad"], "targets": {"loss": next_token_loss}}
    return [
        record(model, TEXTS, to=folder / f"{keep}.zarr", keep_text=keep, durability="rename", **options) for keep in (True, False)
    ]


def test_tokens_joined_are_the_text(text_runs: list[Run]) -> None:
    """From character spans; a tokenizer alone gives the same but for what it cannot know."""
    kept, decoded = (token_saliency(run) for run in text_runs)
    for number, text in enumerate(TEXTS):
        assert "".join(kept.text(number)).replace("\ufffd", "") == text
        assert [one.strip() for one in decoded.text(number) if one.isascii()] == [
            one.strip() for one, other in zip(kept.text(number), decoded.text(number), strict=True) if other.isascii()
        ]
    assert np.array_equal(kept.values, decoded.values)


def test_special_tokens_have_the_tokenizers_names(tmp_path: Path) -> None:
    from tiny_models import minilm

    model, tokenizer = minilm()
    run = record(model, ["Hello  world"], tokenizer=tokenizer, to=tmp_path / "r.zarr", sites="resid_post[0]", durability="rename")
    assert TokenTexts(run)[0] == ["[CLS]", "Hello", "  world", "[SEP]"]


def test_ids_without_a_tokenizer_are_numbers(tmp_path: Path) -> None:
    run = recorded(tmp_path / "r.zarr", "llama", ["embed:out.grad"], reduction="sum")
    assert TokenTexts(run)[2] == [str(token) for token in run["token/input_ids"][2].tolist()]
    without, *_ = shifted(tmp_path / "s.zarr", [3])
    assert TokenTexts(without)[0] == []
    assert token_saliency(without, "resid_post").tokens == ()


def test_the_table_has_a_row_per_token(text_runs: list[Run]) -> None:
    found = gradient_x_input(text_runs[0])
    frame = found.to_pandas()
    assert frame["example"].tolist() == np.repeat([0, 1], found.lengths).tolist()
    assert frame["place"].tolist() == [*range(found.lengths[0]), *range(found.lengths[1])]
    assert frame["score"].tolist() == found.values.tolist()
    assert "".join(frame[frame["example"] == 0]["token"]).replace("\ufffd", "") == TEXTS[0]
    assert "token" not in recorded_without_tokens(found).to_pandas()


def recorded_without_tokens(found: TokenScores) -> TokenScores:
    from dataclasses import replace

    return replace(found, tokens=())


def test_scores_come_back_from_their_files(text_runs: list[Run], tmp_path: Path) -> None:
    found = gradient_x_input(text_runs[0])
    assert TokenScores.load(found.save(tmp_path / "scores")) == found
    assert (
        repr(found)
        == f"<TokenScores gradient x input (sum) of loss at model.embed_tokens:out: {len(found.values)} tokens of 2 examples>"
    )


def test_pictures_of_scores(text_runs: list[Run], tmp_path: Path) -> None:
    """Every token is written on ground of its own, a line of text per line, without formulas; bars without tokens."""
    for found in (token_saliency(text_runs[0]), gradient_x_input(text_runs[0])):
        figure = found.plot(0)
        written = [text.get_text() for text in figure.axes[0].texts]
        assert "".join(written).replace("\ufffd", "") == TEXTS[0].replace("\n", "↵").replace("\t", "→")
        assert len(figure.axes[0].patches) == len(written)
        assert len({round(text.get_position()[1], 2) for text in figure.axes[0].texts}) == 4
        figure.savefig(tmp_path / "text.png")
    bars = recorded_without_tokens(found).plot(1)
    assert len(bars.axes[0].patches) == found.lengths[1]
    with pytest.raises(IndexError):
        found.plot(2)
