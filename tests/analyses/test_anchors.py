"""Anchors from a run: on a circuit whose flows are known, and on GPT-2 against its eager attention and plain loops."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from tiny_models import VOCABULARY, gpt2, llama_lm, random_tokens

from tensortape.analyses import (
    AnchorAUC,
    AnchorDistance,
    AnchorFlow,
    AnchorPositions,
    Result,
    anchor_auc,
    anchor_distances,
    anchor_flow,
    anchor_positions,
)
from tensortape.analyses import anchor_source as source
from tensortape.analyses.errors import AnchorError
from tensortape.instrument import Recorder, record
from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores.errors import AttentionNotRecordedError, GradientError

Array = np.ndarray[Any, Any]
LABELS = {"red": 11, "green": 12, "blue": 13}
PREFIX = [7, 8]
COUNT = 13


# --- positions -----------------------------------------------------------------------------------------------------------------


def token_run(folder: Path, rows: Sequence[Sequence[int]]) -> Run:
    with RunWriter(folder, durability="rename") as writer:
        writer.append(ids=list(range(len(rows))), columns={"token/input_ids": [np.array(row, np.int64) for row in rows]})
    return open_run(folder)


def by_loop(rows: Sequence[Sequence[int]], prefix: Sequence[int], target: str) -> list[tuple[int, list[int], int]]:
    """(example, label positions, target) of every example that has any, by plain Python."""
    found = []
    for number, row in enumerate(rows):
        ends = [place for place in range(len(row)) if list(row[place - len(prefix) + 1 : place + 1]) == list(prefix)]
        goal = len(row) - 1 if target == "last" else max((end for end in ends if end >= len(prefix) - 1), default=-1)
        follows = [place for place in range(len(row)) if not prefix or (place - 1 in ends and place >= len(prefix))]
        labels = [place for place in follows if row[place] in LABELS.values() and place < goal]
        if labels:
            found.append((number, labels, goal))
    return found


@given(
    rows=st.lists(st.lists(st.sampled_from([7, 8, 11, 12, 13, 20]), min_size=1, max_size=17), min_size=1, max_size=7),
    prefix=st.sampled_from([[], [7], [7, 8], [7, 7]]),
    target=st.sampled_from(["last", "prefix"]),
)
def test_positions_are_those_of_a_plain_loop(
    rows: list[list[int]], prefix: list[int], target: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = token_run(tmp_path_factory.mktemp("run") / "run.zarr", rows)
    wanted = by_loop(rows, prefix, target) if prefix or target == "last" else []
    if not wanted:
        with pytest.raises(AnchorError):
            anchor_positions(run, LABELS, prefix=prefix, target=target)
        return
    found = anchor_positions(run, LABELS, prefix=prefix, target=target)
    assert [(example, places.tolist(), goal) for example, places, _, goal in found] == wanted
    words = [tuple(LABELS.values()).index(rows[example][place]) for example, places, _ in wanted for place in places]
    assert found.words.tolist() == found.classes.tolist() == words
    assert found.left_out == len(rows) - len(wanted)


def test_classes_by_appearance(tmp_path: Path) -> None:
    """The class of a label word, and of a prediction, goes by the order in which an example shows its words."""
    rows = [[1, 12, 1, 11, 1, 12, 1], [1, 11, 1, 11, 1], [13, 12, 1], [1, 1]]
    run = token_run(tmp_path / "run.zarr", rows)
    found = anchor_positions(run, LABELS, by="appearance")
    assert found.classes.tolist() == [0, 1, 0, 0, 0, 0, 1]
    assert found.class_names == ("label 1", "label 2")
    assert found.classify(run, [11, 11, 12, 11]).tolist() == [1, 0, 1]
    assert found.classify(run, ["green", "green", "blue", "red"]).tolist() == [0, -1, 0]
    assert found.classify(run, [0, 99, 13, 11]).tolist() == [-1, -1, 0]
    plain = anchor_positions(run, LABELS)
    assert plain.classify(run, ["green", 11, "blue", "red"]).tolist() == [1, 0, 2]
    assert plain.classify(run, [12, 11, 13, 11]).tolist() == [1, 0, 2]
    with pytest.raises(AnchorError, match="for 2 examples, but the run has 4"):
        found.classify(run, [11, 11])


def test_positions_that_make_no_sense(tmp_path: Path) -> None:
    run = token_run(tmp_path / "run.zarr", [[11, 5, 11, 5]])
    for labels in ({}, {"a": 11, "b": 11}):
        with pytest.raises(AnchorError, match="a token each"):
            anchor_positions(run, labels)
    with pytest.raises(AnchorError, match=r"behind the tokens \[9\].*'red' \(11: 2 times\)"):
        anchor_positions(run, LABELS, prefix=[9])
    with pytest.raises(AnchorError, match="needs the prefix"):
        anchor_positions(run, LABELS, target="prefix")
    found = anchor_positions(run, LABELS)
    assert found.to_pandas()["position"].tolist() == [0, 2]
    fields = {"labels": ("a",), "tokens": (1,), "examples": np.array([0]), "targets": np.array([3])}
    for positions, ends in (([3], [1]), ([-1], [1]), ([1, 2], [1]), ([], [0])):
        with pytest.raises(AnchorError):
            AnchorPositions(**fields, positions=np.array(positions, int), ends=np.array(ends), words=np.zeros(len(positions), int))


# --- flow: a circuit by hand ---------------------------------------------------------------------------------------------------


def site(port: str, **more: Any) -> dict[str, Any]:
    about = {
        "path": "attn",
        "port": port,
        "call": 1,
        "aliases": [["", "attention", 0, 1]],
        "layout": "example token ...",
        "reduce": None,
    }
    return {**about, "tap": "", "target": None, **more}


def circuit(folder: Path, attends: Array, gradient: Array, ids: Sequence[int]) -> Run:
    """A run of one layer where head h of query i attends to key `attends[h, i]` alone (to all alike if -1), and
    dL/dA(i, j) is `gradient[h, i, j]`: values are unit vectors, so that dL/dz, whatever it is, is dL/dA itself."""
    heads, width = attends.shape
    unit = np.eye(width, dtype=np.float32)
    q = np.stack([np.where(attends[h][:, None] >= 0, 200 * unit[attends[h]], 0) for h in range(heads)], 1)
    columns = {
        "token/input_ids": [np.array(ids)],
        "token/attn:q": [q.astype(np.float32)],
        "token/attn:k": [np.repeat(unit[:, None], heads, 1)],
        "token/attn:v": [np.repeat(unit[:, None], heads, 1)],
        "token/attn:keys": [np.stack([np.zeros(width, np.int32), np.arange(1, width + 1, dtype=np.int32)], 1)],
        "token/attn:z.grad@loss": [gradient.swapaxes(0, 1).astype(np.float32)],
    }
    facts = {"scale": 1.0, "softcap": None, "cross": False, "window": None, "stored": "qk", "tier": "", "implementation": ""}
    with RunWriter(folder, durability="rename") as writer:
        for name in list(columns)[1:]:
            port = name.partition(":")[2]
            target = {"name": "loss", "reduction": "sum"} if "@" in port else None
            writer.describe(name, site=site(port, attention=facts, target=target))
        writer.append(ids=["one"], columns=columns)
    return open_run(folder)


def test_flows_of_a_circuit(tmp_path: Path) -> None:
    """Two label words at 2 and 4, the target at 6. Head 0 copies the word before into each label word, head 1 the first label word
    into the target; head 2 spreads over all, where a token moves one and takes two back; at (4, 3) two heads cancel each other."""
    attends = np.array([[0, 0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 3, 0, 2], [-1] * 7])
    gradient = np.zeros((3, 7, 7))
    gradient[0, 2, 1], gradient[0, 4, 3] = 3.0, -5.0
    gradient[1, 4, 3], gradient[1, 6, 2] = 5.0, 7.0
    gradient[2, 6, 4], gradient[2, 5, 0], gradient[2, 5, 5] = -7.0, 12.0, 100.0
    run = circuit(tmp_path / "run.zarr", attends, gradient, [1, 1, 11, 1, 12, 1, 1])
    positions = anchor_positions(run, LABELS)
    found = anchor_flow(run, positions)
    # |I(2,1)| = 3, I(4,3) = 5 - 5; I(6,2) = 7, I(6,4) = 7 / 7; I(5,0) = 12 / 6, and I(5,5) is on the diagonal.
    assert found.mean == pytest.approx(np.array([[3 / 6, 8 / 2, 2 / (21 - 6 - 2)]]), rel=1e-6)
    assert found.shares.sum() == pytest.approx(1)
    heads = anchor_flow(run, positions, heads="each").mean[0]
    assert heads == pytest.approx(np.array([[8 / 6, 0, 0], [5 / 6, 7 / 2, 0], [0, 1 / 2, 2 / 13]]), rel=1e-6)
    assert np.isnan(found.error).all()


def test_what_comes_after_the_target_does_not_count(tmp_path: Path) -> None:
    """A prompt recorded with its answer: rows and columns behind q are in no sum and in no denominator."""
    attends = np.full((1, 9), -1)
    gradient = np.ones((1, 9, 9))
    run = circuit(tmp_path / "run.zarr", attends, gradient, [1, 8, 11, 1, 8, 12, 1, 8, 13])
    positions = anchor_positions(run, LABELS, prefix=[8], target="prefix")
    assert (positions.targets.tolist(), positions.positions.tolist()) == ([7], [2, 5])
    rest = sum(i / (i + 1) for i in range(8)) - 2 / 3 - 5 / 6 - 2 / 8
    wanted = [(2 / 3 + 5 / 6) / 7, (2 / 8) / 2, rest / (28 - 7 - 2)]
    assert anchor_flow(run, positions).mean[0] == pytest.approx(wanted, rel=1e-6)


# --- flow, AUC and distances: GPT-2 against its eager self -----------------------------------------------------------------------


def rows_of_tokens() -> list[list[int]]:
    """Prompts of three to seven demonstrations with label words behind a prefix, of many lengths."""
    random = np.random.default_rng(5)
    found = []
    for _ in range(COUNT):
        row: list[int] = []
        for _ in range(random.integers(2, 4)):
            row += [*random.integers(20, VOCABULARY, random.integers(0, 2)).tolist(), *PREFIX, int(random.choice([11, 12, 13]))]
        found.append([*row, *random.integers(20, VOCABULARY, 1).tolist(), *PREFIX])
    return found


def chosen_loss(outputs: Any, batch: Any) -> torch.Tensor:
    """Cross-entropy over the label words alone, of label word n % 3 for example n, at each example's last token."""
    last = batch["attention_mask"].sum(1) - 1
    logits = outputs.logits[torch.arange(len(last)), last][:, [11, 12, 13]]
    return torch.nn.functional.cross_entropy(logits, batch["gold"], reduction="none")


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two batches of GPT-2 with its usual attention function, padded."""
    rows, model = rows_of_tokens(), gpt2()
    loader = [
        {**padded(rows[part]), "id": list(range(COUNT))[part], "gold": torch.arange(COUNT)[part] % 3}
        for part in (slice(0, 7), slice(7, COUNT))
    ]
    folder = tmp_path_factory.mktemp("gpt2") / "run.zarr"
    labels = {"example/gold": "gold"}
    return record(
        model,
        loader,
        to=folder,
        ids="id",
        labels=labels,
        sites=["attention.grad"],
        targets={"loss": chosen_loss},
        durability="rename",
    )


class Eager:
    """Attention, its gradient, logits, queries and keys of every prompt, one at a time, by transformers' eager attention."""

    def __init__(self) -> None:
        model = copy.deepcopy(gpt2())
        model.set_attn_implementation("eager")
        self.rows = rows_of_tokens()
        self.attention, self.saliency, self.logits, self.q, self.k = [], [], [], [], []
        for number, row in enumerate(self.rows):
            shown: list[torch.Tensor] = []
            handles = [
                block.attn.c_attn.register_forward_hook(lambda m, a, out, shown=shown: shown.append(out))
                for block in model.transformer.h
            ]
            outputs = model(input_ids=torch.tensor([row]), output_attentions=True, use_cache=False)
            for handle in handles:
                handle.remove()
            for weights in outputs.attentions:
                weights.retain_grad()
            logits = outputs.logits[0, -1, [11, 12, 13]]
            torch.nn.functional.cross_entropy(logits[None], torch.tensor([number % 3])).backward()
            self.attention.append([weights[0].detach().numpy() for weights in outputs.attentions])
            self.saliency.append([(weights * weights.grad)[0].detach().numpy() for weights in outputs.attentions])
            self.logits.append(logits.detach().numpy())
            self.q.append([out[0, :, :52].detach().numpy() for out in shown])
            self.k.append([out[0, :, 52:104].detach().numpy() for out in shown])

    def labels(self, number: int) -> list[int]:
        return [place for place, token in enumerate(self.rows[number]) if token in (11, 12, 13)]


@pytest.fixture(scope="module")
def eager() -> Eager:
    return Eager()


@pytest.fixture(scope="module")
def positions(recorded: Run) -> AnchorPositions:
    return anchor_positions(recorded, LABELS, prefix=PREFIX)


def proportions(matrix: Array, labels: list[int]) -> list[float]:
    """S_wp, S_pq and S_ww of a matrix of magnitudes, pair by pair."""
    last = len(matrix) - 1
    sums = {"wp": 0.0, "pq": 0.0, "ww": 0.0}
    for i in range(last + 1):
        for j in range(i):
            kind = "wp" if i in labels else "pq" if i == last and j in labels else "ww"
            sums[kind] += float(matrix[i, j])
    into, out_of = sum(labels), len(labels)
    return [sums["wp"] / into, sums["pq"] / out_of, sums["ww"] / (last * (last + 1) / 2 - into - out_of)]


@pytest.mark.parametrize("heads", ["sum_abs", "each"])
def test_flow_is_that_of_eager_attention(recorded: Run, positions: AnchorPositions, eager: Eager, heads: Any) -> None:
    """At most 1e-5 of the largest apart, prompt by prompt, layer by layer (and head by head)."""
    found = anchor_flow(recorded, positions, heads=heads)
    assert found.layers == (0, 1, 2)
    for number, layers in enumerate(eager.saliency):
        for layer, saliency in enumerate(layers):
            if heads == "sum_abs":
                wanted = proportions(np.abs(saliency.astype(np.float64).sum(0)), eager.labels(number))
            else:
                wanted = [proportions(np.abs(head), eager.labels(number)) for head in saliency]
            assert np.abs(found.values[number, layer] - np.array(wanted)).max() <= 1e-5 * np.max(wanted)


def test_auc_is_that_of_eager_attention(recorded: Run, positions: AnchorPositions, eager: Eager) -> None:
    """By scikit-learn, with all three classes and with the two that are left where one is never predicted."""
    scores = np.stack(eager.logits) - np.mean(eager.logits, 0)  # the model itself always says red
    predictions = [(11, 12, 13)[int(row.argmax())] for row in scores]
    for chosen in (predictions, [11 if token == 13 else token for token in predictions], [12, *[11, 13, 13] * 4]):
        found = anchor_auc(recorded, positions, chosen)
        classes = sorted(set(chosen))
        for layer in range(3):
            rows = np.zeros((COUNT, len(classes)))
            for number, attention in enumerate(eager.attention):
                for place in eager.labels(number):
                    if eager.rows[number][place] in classes:
                        rows[number, classes.index(eager.rows[number][place])] += attention[layer][:, -1, place].sum(dtype=float)
            empty = rows.sum(1) == 0
            rows[empty] = 1
            rows /= rows.sum(1, keepdims=True)
            gold = [classes.index(token) for token in chosen]
            wanted = roc_auc_score(gold, rows[:, 1] if len(classes) == 2 else rows, multi_class="ovo")
            assert found.auc[layer] == pytest.approx(wanted, abs=1e-9)
        above = found.auc - 0.5
        assert found.share == pytest.approx([above[: layer + 1].sum() / above.sum() for layer in range(3)])
        assert found.counts.sum() == COUNT
        assert (found.left_out, len(found.classes)) == (0, len(classes))


def test_a_prediction_that_is_no_label_word_is_left_out(recorded: Run, positions: AnchorPositions) -> None:
    predictions = [96, *[11, 12, 13] * 4]
    found = anchor_auc(recorded, positions, predictions, sites=[2])
    assert (found.left_out, found.counts.tolist(), found.sites) == (1, [4, 4, 4], ("transformer.h.2.attn",))
    recorded.add_column("example/prediction", [{11: "red", 12: "green", 13: "blue", 96: "none"}[token] for token in predictions])
    assert anchor_auc(recorded, positions, "example/prediction", sites=["attention[2]"]) == found
    with pytest.raises(AnchorError, match="all of \\['red'\\]"):
        anchor_auc(recorded, positions, [11] * COUNT)


def test_distances_are_those_of_scikit_learns_pca(recorded: Run, positions: AnchorPositions, eager: Eager) -> None:
    """1e-5; the notebook's formula, with keys averaged over the label words of a class; and confusion by plain AUC."""
    gold, scores = np.arange(COUNT) % 3, np.stack(eager.logits)
    for layer in range(3):
        found = anchor_distances(recorded, positions, layer, components=5, gold=[(11, 12, 13)[n] for n in gold], scores=scores)
        pca = PCA(5, svd_solver="full").fit(np.stack([q[layer][-1] for q in eager.q]).astype(float))
        keys = [
            np.mean(
                [k[layer][p] for n, k in enumerate(eager.k) for p in eager.labels(n) if eager.rows[n][p] == token], 0, dtype=float
            )
            for token in (11, 12, 13)
        ]
        projected = np.stack(keys) @ pca.components_.T * pca.singular_values_
        apart = np.array([[np.linalg.norm(a - b) for b in projected] for a in projected])
        assert found.singular_values == pytest.approx(pca.singular_values_, rel=1e-5)
        assert found.distance == pytest.approx(apart / apart.max() + np.eye(3), rel=1e-5)
        upper = np.triu_indices(3, 1)
        for a, b in zip(*upper, strict=True):
            here = (gold == a) | (gold == b)
            wanted = roc_auc_score(gold[here] == a, scores[here, a] - scores[here, b])
            assert found.auc is not None
            assert found.auc[a, b] == found.auc[b, a] == pytest.approx(wanted)
        assert found.spearman == pytest.approx(spearmanr(found.distance[upper], found.auc[upper]).statistic)
        assert found.prompts == COUNT


def test_distances_with_shared_key_heads_and_shifted_dimensions(tmp_path: Path) -> None:
    """Llama's key heads serve several query heads; two dimensions of queries and keys stand at +3000 and -800."""
    rows, model = rows_of_tokens(), llama_lm()
    original = record(
        model,
        [{**padded(rows), "id": list(range(COUNT))}],
        to=tmp_path / "llama.zarr",
        ids="id",
        sites=["attention"],
        durability="rename",
    )
    shift = np.zeros(26, np.float32)
    shift[[3, 19]] = 3000, -800
    columns = {
        name: [original[name][number] for number in range(COUNT)]
        for name in ("token/input_ids", *(column.name for column in original.sites))
    }
    chosen = {name: values for name, values in columns.items() if "layers.1" in name or "input_ids" in name}
    for name in chosen:
        if name.endswith((":q", ":k")):
            chosen[name] = [values + shift for values in chosen[name]]
    with RunWriter(tmp_path / "shifted.zarr", durability="rename") as writer:
        for name in chosen:
            if "layers" in name:
                writer.describe(name, site=original[name].site)
        writer.append(ids=list(range(COUNT)), columns=chosen)
    run = open_run(tmp_path / "shifted.zarr")
    found = anchor_distances(run, anchor_positions(run, LABELS, prefix=PREFIX), 1, components=7)
    q, k = (chosen[f"token/model.layers.1.self_attn:{port}"] for port in "qk")
    pca = PCA(7, svd_solver="full").fit(np.stack([values[-1].reshape(-1) for values in q]).astype(float))
    keys = [
        np.mean(
            [
                values[p].repeat(2, 0).reshape(-1)
                for row, values in zip(rows, k, strict=True)
                for p in range(len(row))
                if row[p] == token
            ],
            0,
            float,
        )
        for token in (11, 12, 13)
    ]
    projected = np.stack(keys) @ pca.components_.T * pca.singular_values_
    apart = np.array([[np.linalg.norm(a - b) for b in projected] for a in projected])
    assert found.distance == pytest.approx(apart / apart.max() + np.eye(3), rel=1e-4)


def test_a_class_without_label_words_has_no_distance(tmp_path: Path) -> None:
    attends = np.full((1, 7), -1)
    run = circuit(tmp_path / "run.zarr", attends, np.ones((1, 7, 7)), [1, 1, 11, 1, 12, 1, 1])
    with pytest.raises(AnchorError, match="two prompts; got 3 classes and 1"):
        anchor_distances(run, anchor_positions(run, LABELS), 0)


def test_distances_refuse_scores_that_do_not_fit(recorded: Run, positions: AnchorPositions) -> None:
    with pytest.raises(AnchorError, match=r"\(13, 3\)"):
        anchor_distances(recorded, positions, 0, gold=[11] * COUNT, scores=np.zeros((COUNT, 2)))
    found = anchor_distances(recorded, positions, 0, gold=[11] * COUNT, scores=np.zeros((COUNT, 3)))
    assert found.auc is not None
    assert np.isnan(found.auc[np.triu_indices(3, 1)]).all()
    assert found.spearman is not None
    assert np.isnan(found.spearman)


# --- engines, errors, results -----------------------------------------------------------------------------------------------------


def everything(run: Run, positions: AnchorPositions, executor: Executor | None) -> tuple[Result, ...]:
    options: Any = {"executor": executor}
    return (
        anchor_flow(run, positions, **options),
        anchor_auc(run, positions, [11, *[11, 12, 13] * 4], **options),
        anchor_distances(run, positions, 1, **options),
    )


@pytest.mark.slow
def test_every_engine_gives_the_same_bits(recorded: Run, positions: AnchorPositions, monkeypatch: pytest.MonkeyPatch) -> None:
    """This thread, threads and processes, in pieces of a few examples."""
    monkeypatch.setattr(source, "_PAIRS", 600)
    assert len(source.Prompts(recorded.attention(0), positions, len).pieces()) > 3  # type: ignore[arg-type]
    wanted = everything(recorded, positions, None)
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(1, get_context("spawn")) as processes:
        assert everything(recorded, positions, threads) == wanted
        assert everything(recorded, positions, processes) == wanted
    monkeypatch.setattr(source, "_PAIRS", 1 << 30)
    assert everything(recorded, positions, None) == wanted


@pytest.mark.slow
def test_dask_gives_the_same_bits(recorded: Run, positions: AnchorPositions, monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = pytest.importorskip("dask.distributed", exc_type=ImportError).Client
    monkeypatch.setattr(source, "_PAIRS", 600)
    with client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        assert everything(recorded, positions, cluster.get_executor()) == everything(recorded, positions, None)


def test_what_was_not_recorded_or_declared(recorded: Run, positions: AnchorPositions, tmp_path: Path) -> None:
    """No gradient, another target, an undeclared reduction, another table: each says what to do."""
    with pytest.raises(AttentionNotRecordedError, match=r"z.grad@other was not recorded"):
        anchor_flow(recorded, positions, target="other")
    with pytest.raises(ValueError, match="sum_abs"):
        anchor_flow(recorded, positions, heads="mean")  # type: ignore[arg-type]
    model, tokens = gpt2(), random_tokens(2, 7)
    tokens[:, 2] = 11
    with (
        Recorder(model, sites=["attention.grad"], to=tmp_path / "run.zarr", durability="rename") as recorder,
        recorder.batch(ids=[0, 1]),
    ):
        model(input_ids=tokens).logits.sum().backward()
    run = open_run(tmp_path / "run.zarr")
    found = anchor_positions(run, LABELS)
    with pytest.raises(GradientError, match="assume='sum'"):
        anchor_flow(run, found)
    assert anchor_flow(run, found, assume="sum").values.shape == (2, 3, 3)
    elsewhere = AnchorPositions(**{**vars_of(found), "table": "token.decoder"})
    with pytest.raises(AnchorError, match=r"count rows of 'token\.decoder'"):
        anchor_flow(run, elsewhere, assume="sum")
    with pytest.raises(AnchorError, match="no prompts"):
        anchor_flow(run, found.part(0, 0), assume="sum")


def vars_of(positions: AnchorPositions) -> dict[str, Any]:
    return {name: getattr(positions, name) for name in positions.__dataclass_fields__}


def test_results_are_kept_and_shown(recorded: Run, positions: AnchorPositions, tmp_path: Path) -> None:
    """Saved and loaded again, as tables and as pictures with labelled axes."""
    flow = anchor_flow(recorded, positions)
    heads = anchor_flow(recorded, positions, heads="each")
    auc = anchor_auc(recorded, positions, [11, *[11, 12, 13] * 4])
    distance = anchor_distances(
        recorded, positions, 2, gold=[11, *[11, 12, 13] * 4], scores=np.arange(3.0 * COUNT).reshape(COUNT, 3) % 7
    )
    kinds = {AnchorFlow: flow, AnchorAUC: auc, AnchorDistance: distance, AnchorPositions: positions}
    for kind, result in kinds.items():
        assert kind.load(result.save(tmp_path / kind.__name__)) == result
        assert repr(result).startswith(f"<{kind.__name__}")
        for axes in result.plot().axes[:1]:
            assert axes.get_title() or axes.get_xlabel()
    assert flow.to_pandas()["layer"].tolist() == [0, 1, 2]
    assert flow.to_pandas()["S_wp"].to_numpy() == pytest.approx(flow.values[:, :, 0].mean(0))
    assert heads.to_pandas()[["layer", "head"]].to_numpy().tolist() == [[a, b] for a in range(3) for b in range(2)]
    assert heads.plot().axes[0].get_ylabel() == "share of the three flows"
    assert auc.to_pandas()["AUCROC_l"].tolist() == auc.auc.tolist()
    assert distance.to_pandas()["first"].tolist() == ["red", "red", "green"]
