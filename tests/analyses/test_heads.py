"""Statistics of attention heads, rollout and attention maps, against plain loops over what an eager copy of the model says."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_models import INTERFACE, SOFTMAX, Family, attentions, kept
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import BATCH, batch, llama

from tensortape.analyses import AnalysisError, AttentionMap, HeadStats, Rollout, attention_map, attention_tiles, head_stats, rollout
from tensortape.analyses.attention_tiles import Tiles
from tensortape.analyses.head_report import STATISTICS
from tensortape.instrument import Recorder, Site, record
from tensortape.stores import Run, RunWriter, open_run
from tensortape.stores.attention import Attention
from tensortape.stores.errors import AttentionNotRecordedError, MissingExampleError

NEAR = 1e-5
Matrix = np.ndarray


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the definitions, in plain Python --------------------------------------------------------------------------------------------


def of_query(row: Matrix, visible: list[int], query: int, tokens: list[int], *, cross: bool) -> dict[str, float]:
    """What one head's weights [key] of one query contribute to; statistics that it says nothing of are left out."""
    entropy = -sum(row[key] * math.log(row[key]) for key in visible if row[key] > 0)
    found = {"entropy": entropy, "normalised_entropy": entropy / math.log(len(visible))}
    if 0 in visible and (cross or query > 0):
        found["sink"] = row[0]
    if cross:
        return found
    found["distance"] = sum(row[key] * abs(query - key) for key in visible)
    if query - 1 in visible:
        found["previous"] = row[query - 1]
    if query in visible:
        found["itself"] = row[query]
    after = [key for key in visible if 1 <= key < query and tokens[key - 1] == tokens[query]]
    if after:
        found["induction"] = sum(row[key] for key in after)
    return found


def by_hand(matrices: list[Matrix], tokens: list[list[int]], *, cross: bool = False, seen: Any = None) -> tuple[Matrix, Matrix]:
    """Means [head + 1, statistic] and queries [statistic] over all examples; the last head attends uniformly."""
    sums, counts = np.zeros((len(matrices[0]) + 1, len(STATISTICS))), np.zeros(len(STATISTICS), int)
    for number, matrix in enumerate(matrices):
        for query in range(matrix.shape[1]):
            visible = [key for key in range(matrix.shape[2]) if (seen(query, key) if seen else (matrix[:, query, key] > 0).any())]
            if len(visible) < 2:
                continue
            uniform = np.isin(np.arange(matrix.shape[2]), visible) / len(visible)
            rows = [
                of_query(row.astype(float), visible, query, tokens[number], cross=cross) for row in (*matrix[:, query], uniform)
            ]
            for at, name in enumerate(STATISTICS):
                if name in rows[0]:
                    sums[:, at] += [row[name] for row in rows]
                    counts[at] += 1
    with np.errstate(invalid="ignore"):
        return sums / counts, counts


def worst(found: HeadStats, number: int, expected: tuple[Matrix, Matrix]) -> float:
    """The largest difference of a site's statistics, in their own units; what is undefined must be so in both."""
    site, (means, counts) = found.sites[number], expected
    mine = np.concatenate([site.heads, site.uniform[None]])
    assert mine.shape == means.shape
    assert np.array_equal(np.isnan(mine), np.isnan(means))
    assert site.queries.tolist() == counts.tolist()
    return float(np.nanmax(np.abs(mine - means)))


# --- models --------------------------------------------------------------------------------------------------------------------


def with_repeats(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same batch out of four different tokens, so that most of them have occurred before."""
    return {name: 3 + value % 4 if name.endswith("input_ids") else value for name, value in inputs.items()}


def recorded(to: Path, model: Any, inputs: dict[str, Any], sites: Any = "attention") -> Run:
    with torch.no_grad(), Recorder(model, sites=sites, to=to, durability="rename") as recorder:  # noqa: SIM117
        with recorder.batch(ids=list(range(BATCH))):
            model(**inputs)
    return open_run(to)


def tokens_of(inputs: dict[str, Any], family: Family, number: int, side: str) -> list[list[int]]:
    """Real tokens of each example, of the stream that a site's queries are of."""
    ids = inputs["decoder_input_ids" if family.is_of_decoder(number) else "input_ids"]
    return [row[mask != 0].tolist() for row, mask in zip(ids, family.masks(number, side)[0], strict=True)]


FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "bert", "modernbert", "t5", "bart"]


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_those_of_an_eager_copy(name: str, tmp_path: Path) -> None:
    """Causal, windowed, with sinks, grouped heads, both-sided, encoder-decoder."""
    family, side = INTERFACE[name], "right"
    inputs = with_repeats(family.inputs(side))
    found = head_stats(recorded(tmp_path / "r.zarr", family.build(), inputs))
    expected = attentions(family.build("eager"), inputs)
    assert [site.site for site in found.sites] == family.sites()
    for number, weights in enumerate(expected):
        matrices = kept(weights, *family.masks(number, side))
        cross = family.is_cross(number)
        wanted = by_hand(matrices, tokens_of(inputs, family, number, side), cross=cross)
        assert worst(found, number, wanted) < NEAR
        assert (found.sites[number].kind == "cross_attention") == cross
        assert cross or wanted[1][-1] > 3  # some queries have seen their token before


@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_stored_weights_give_the_same(name: str, tmp_path: Path) -> None:
    family = INTERFACE[name]
    inputs = with_repeats(family.inputs("right"))
    rebuilt = head_stats(recorded(tmp_path / "qk.zarr", family.build(), inputs))
    stored = head_stats(recorded(tmp_path / "weights.zarr", family.build(), inputs, Site("attention", store="weights")))
    for one, other in zip(rebuilt.sites, stored.sites, strict=True):
        assert one.queries.tolist() == other.queries.tolist()
        np.testing.assert_allclose(one.heads, other.heads, atol=1e-6)


def test_a_softmax_of_the_models_own(tmp_path: Path) -> None:
    """Bloom's weights are seen and stored."""
    name = next(iter(SOFTMAX))
    family, inputs = SOFTMAX[name], with_repeats(SOFTMAX[name].inputs("right"))
    found = head_stats(recorded(tmp_path / "r.zarr", family.build(), inputs))
    for number, weights in enumerate(attentions(family.build("eager"), inputs)):
        wanted = by_hand(kept(weights, *family.masks(number, "right")), tokens_of(inputs, family, number, "right"))
        assert worst(found, number, wanted) < NEAR


# --- runs made by hand -----------------------------------------------------------------------------------------------------------

FACTS = {"tier": "interface", "implementation": "sdpa", "scale": 1.0, "softcap": None, "cross": False, "window": None}
ABOUT = {
    "path": "layers.0.attn",
    "call": 1,
    "aliases": [["", "attention", 0, 1]],
    "layout": "example token ...",
    "attention": {**FACTS, "stored": "qk"},
}


def causal(tokens: int) -> Matrix:
    """Each query sees the keys up to its own."""
    return np.stack([np.zeros(tokens, np.int32), np.arange(1, tokens + 1, dtype=np.int32)], 1)


def made(to: Path, q: list[Matrix], k: list[Matrix], keys: list[Matrix], ids: list[Any] | None = None) -> Run:
    """A run of one attention site: q and k [T, head, feature], keys [T, 2], ids [T]."""
    given = {"q": q, "k": k, "keys": keys}
    with RunWriter(to, durability="rename") as writer:
        for port in given:
            writer.describe(f"token/layers.0.attn:{port}", site={**ABOUT, "port": port})
        columns = {f"token/layers.0.attn:{port}": values for port, values in given.items()}
        writer.append(ids=list(range(len(q))), columns=columns | ({} if ids is None else {"token/input_ids": ids}))
    return open_run(to)


def random_run(to: Path, lengths: list[int], heads: int = 3, seed: int = 0, shift: tuple[float, float] = (0, 0)) -> Run:
    """Causal attention of random queries and keys, whose first two features may be shifted."""
    random = np.random.default_rng(seed)
    q, k = ([random.normal(size=(length, heads, 5)).astype(np.float32) for length in lengths] for _ in range(2))
    for one, other in zip(q, k, strict=True):
        one[..., :2] *= 0.01 if any(shift) else 1
        other[..., :2] += shift
    return made(to, q, k, [causal(length) for length in lengths], [random.integers(0, 4, length) for length in lengths])


def exact(run: Run) -> tuple[Matrix, Matrix]:
    """The same by plain loops over float64 softmax."""
    matrices, tokens = [], []
    for number in np.flatnonzero(run["token/layers.0.attn:q"].present).tolist():
        q, k = (run[f"token/layers.0.attn:{port}"][number].astype(float) for port in "qk")
        scores = np.einsum("qhd,khd->hqk", q, k)
        scores[:, ~np.tri(len(q), dtype=bool)] = -np.inf
        grown = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
        matrices.append(grown / grown.sum(-1, keepdims=True))
        tokens.append(run["token/input_ids"][number].tolist())
    return by_hand(matrices, tokens, seen=lambda query, key: key <= query)


def test_dimensions_with_large_means(tmp_path: Path) -> None:
    """Two features of the keys are shifted by +3000 and -800, as in most language models."""
    run = random_run(tmp_path / "r.zarr", [13, 29, 7], shift=(3000, -800))
    assert worst(head_stats(run), 0, exact(run)) < 1e-4  # scores near 30 have 2e-6 of float32's rounding


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 17), min_size=1, max_size=5).filter(any), tile=st.integers(1, 2000), seed=st.integers(0, 99))
def test_whatever_the_lengths_and_tiles(
    lengths: list[int], tile: int, seed: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples without tokens, with one, with many; tiles of one query or of all."""
    monkeypatch.setattr(attention_tiles, "TILE_BYTES", tile)
    monkeypatch.setattr(attention_tiles, "PIECE_BYTES", 3 * tile)
    run = random_run(tmp_path_factory.mktemp("run") / "r.zarr", lengths, seed=seed)
    found, expected = head_stats(run), exact(run)
    if expected[1].any():
        assert worst(found, 0, expected) < NEAR
    else:
        assert np.isnan(found.sites[0].heads).all()


def test_an_induction_head(tmp_path: Path) -> None:
    """On a random sequence that is repeated, a head whose keys are the tokens before scores 1, a uniform one 1 / visible keys."""
    count, size = 31, 20.0
    once = np.random.default_rng(0).permutation(97)[:count]
    tokens = np.concatenate([once, once])
    before = np.append(-1, tokens[:-1])
    place = np.arange(len(tokens))
    queries = [tokens, place, np.zeros(len(tokens), int)]  # by token; by place; nothing in particular
    keys = [before, place + 1, np.ones(len(tokens), int)]
    q, k = (np.stack([np.eye(131)[one + 1] for one in some], 1).astype(np.float32) for some in (queries, keys))
    stats = head_stats(made(tmp_path / "r.zarr", [size * q], [k], [causal(len(tokens))], [tokens]))
    assert stats["induction"][0, 0] > 1 - 1e-5
    assert stats["previous"][0, 1] > 1 - 1e-5
    assert stats["induction"][0, 1] < 1e-5
    uniform = np.mean([1 / (count + place + 1) for place in range(count)])
    assert stats["induction"][0, 2] == pytest.approx(uniform, rel=1e-5)
    assert stats.sites[0].uniform[-1] == pytest.approx(uniform, rel=1e-12)
    assert stats.sites[0].queries[-1] == count
    assert "induction 1.000" in repr(stats)
    assert "at 0 head 0" in repr(stats).partition("induction")[2]


def test_a_token_that_repeats_at_once(tmp_path: Path) -> None:
    """The key after an occurrence right before the query is the query itself, which is no look back."""
    tokens = np.array([5, 5, 5])
    q = np.ones((3, 1, 2), np.float32)
    stats = head_stats(made(tmp_path / "r.zarr", [q], [q], [causal(3)], [tokens]))
    assert stats.sites[0].queries[-1] == 1
    assert stats["induction"][0, 0] == pytest.approx(1 / 3)


def test_queries_that_see_nothing(tmp_path: Path) -> None:
    """Their rows are NaN and count nowhere."""
    q = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)
    keys = causal(7)
    keys[3] = 2
    run = made(tmp_path / "r.zarr", [q], [q], [keys], [np.zeros(7, int)])
    assert np.isnan(run.attention(0)[0][:, 3]).all()
    stats = head_stats(run)
    assert stats.sites[0].queries[0] == 5
    assert np.isfinite(stats.sites[0].heads).all()
    assert np.isfinite(rollout(run, 0).mass).all()
    assert rollout(run, 0).mass[0, 3].tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_a_nan_that_the_model_computed_is_not_hidden(tmp_path: Path) -> None:
    q = np.ones((5, 2, 3), np.float32)
    q[4, 1] = np.nan
    stats = head_stats(made(tmp_path / "r.zarr", [q], [q], [causal(5)]))
    assert np.isfinite(stats["entropy"][0, 0])
    assert np.isnan(stats["entropy"][0, 1])


def test_without_token_ids_there_is_no_induction_score(tmp_path: Path) -> None:
    q = np.ones((5, 2, 3), np.float32)
    stats = head_stats(made(tmp_path / "r.zarr", [q], [q], [causal(5)]))
    assert np.isnan(stats["induction"]).all()
    assert np.isfinite(stats["previous"]).all()


# --- who computes, and how much at a time ----------------------------------------------------------------------------------------


class Serial(Executor):
    """Everything at once, in the thread that asks."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def test_the_same_bits_whoever_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "PIECE_BYTES", 60_000)
    run = random_run(tmp_path / "r.zarr", [53, 7, 101, 1, 67, 89, 0, 31], heads=3)
    assert len(Tiles(run.attention(0), np.ones(8, bool)).pieces()) > 3
    alone = head_stats(run, executor=Serial())
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2, get_context("spawn")) as processes:
        for executor in (None, threads, processes):
            found = head_stats(run, executor=executor)
            assert found == alone
            assert found.sites[0].heads.tobytes() == alone.sites[0].heads.tobytes()


def test_no_full_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is a tile, and nobody asks for more."""
    monkeypatch.setattr(attention_tiles, "TILE_BYTES", 1 << 14)
    monkeypatch.setattr(Attention, "__getitem__", lambda self, example: pytest.fail("the whole matrix was asked for"))
    run = random_run(tmp_path / "r.zarr", [211, 5])
    blocks = [block for piece in Tiles(run.attention(0), np.ones(2, bool)).pieces() for block in piece.blocks()]
    assert max(block.values[0].nbytes for block in blocks) <= 1 << 14 < 3 * 211 * 211 * 4
    assert sum(len(block.rows) for block in blocks) == 216
    assert worst(head_stats(run), 0, exact(run)) < NEAR


def test_pieces_may_be_pickled(tmp_path: Path) -> None:
    (piece,) = Tiles(random_run(tmp_path / "r.zarr", [11]).attention(0), np.ones(1, bool)).pieces()
    (block,), (again,) = list(piece.blocks()), list(pickle.loads(pickle.dumps(piece)).blocks())
    assert np.array_equal(block.values[0], again.values[0])


# --- what is asked for -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bart_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    family = INTERFACE["bart"]
    return recorded(tmp_path_factory.mktemp("bart") / "r.zarr", family.build(), with_repeats(family.inputs("right")))


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ("encoder.attention", ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "encoder.layers.2.self_attn"]),
        ("encoder.attention[-1]", ["encoder.layers.2.self_attn"]),
        ("decoder.cross_attention", ["decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn"]),
        (["decoder.layers.1.self_attn", "encoder.attention[0:2:2]"], ["encoder.layers.0.self_attn", "decoder.layers.1.self_attn"]),
        ("**.encoder_attn", ["decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn"]),
    ],
)
def test_some_sites(bart_run: Run, sites: Any, expected: list[str]) -> None:
    found, every = head_stats(bart_run, sites=sites), head_stats(bart_run)
    assert [site.site for site in found.sites] == expected
    whole = {site.site: site for site in every.sites}
    assert all(np.array_equal(site.heads, whole[site.site].heads, equal_nan=True) for site in found.sites)


def test_layers_by_number(tmp_path: Path) -> None:
    run = recorded(tmp_path / "r.zarr", llama(), batch("right"))
    assert [site.layer for site in head_stats(run, sites=[2, 0]).sites] == [0, 2]


@pytest.mark.parametrize("sites", ["encoder.attention[9]", "nothing", 17])
def test_no_such_site(bart_run: Run, sites: Any) -> None:
    with pytest.raises(AttentionNotRecordedError, match="fits no attention site"):
        head_stats(bart_run, sites=sites)


def test_a_run_without_attention(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "r.zarr", durability="rename") as writer:
        writer.append(ids=[1], columns={"example/x": [1.0]})
    with pytest.raises(AttentionNotRecordedError, match="attention"):
        head_stats(open_run(tmp_path / "r.zarr"))


def test_some_examples(tmp_path: Path) -> None:
    """By number, by mask, or so many drawn by a seed."""
    lengths = [11, 23, 5, 17, 13, 7]
    run = random_run(tmp_path / "r.zarr", lengths)
    by_number = head_stats(run, examples=[4, 1])
    assert by_number == head_stats(run, examples=np.isin(np.arange(6), [1, 4]))
    assert by_number.sites[0].examples == 2
    assert by_number.sites[0].queries[0] == 22 + 12
    drawn = [head_stats(run, examples=3, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({one.sites[0].queries[0] for one in drawn}) > 1
    assert all(one.sites[0].examples == 3 for one in drawn)
    assert head_stats(run, examples=99) == head_stats(run)
    with pytest.raises(IndexError):
        head_stats(run, examples=[6])
    with pytest.raises(MissingExampleError, match="no example"):
        head_stats(run, examples=[])


def test_examples_without_tokens_alone(tmp_path: Path) -> None:
    stats = head_stats(random_run(tmp_path / "r.zarr", [0, 3]), examples=[0])
    assert np.isnan(stats.sites[0].heads).all()
    assert stats.sites[0].queries.tolist() == [0] * len(STATISTICS)
    assert stats.plot().axes


# --- results ---------------------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_head(bart_run: Run) -> None:
    stats = head_stats(bart_run)
    frame = stats.to_pandas()
    assert len(frame) == 3 * 4 + 4 * 2
    row = frame[(frame["site"] == "decoder.layers.1.self_attn") & (frame["head"] == 1)].iloc[0]
    assert (row["stack"], row["kind"], row["layer"], row["examples"]) == ("decoder", "attention", 1, BATCH)
    number = [site.site for site in stats.sites].index("decoder.layers.1.self_attn")
    assert row["sink"] == stats["sink"][number, 1]
    assert row["uniform_sink"] == stats.sites[number].uniform[3]
    assert np.isnan(stats["sink"][number, 2])  # it has two heads


def test_results_come_back_from_their_files(bart_run: Run, tmp_path: Path) -> None:
    results = [
        head_stats(bart_run),
        rollout(bart_run, 0, sites="encoder.attention"),
        attention_map(bart_run, "encoder.attention[1]", 2),
    ]
    for number, (kind, found) in enumerate(zip((HeadStats, Rollout, AttentionMap), results, strict=True)):
        assert kind.load(found.save(tmp_path / str(number))) == found


def test_pictures_of_heads(bart_run: Run, tmp_path: Path) -> None:
    """A panel per statistic, with every site as a row."""
    figure = head_stats(bart_run).plot()
    titled = [axes for axes in figure.axes if axes.get_title()]
    assert len(titled) == len(STATISTICS)
    assert [label.get_text() for label in titled[0].get_yticklabels()][:4] == ["encoder 0", "encoder 1", "encoder 2", "decoder 0"]
    figure.savefig(tmp_path / "heads.png")
    crossing = head_stats(bart_run, sites="decoder.cross_attention").plot()
    assert len([axes for axes in crossing.axes if axes.get_title()]) == 3  # entropies and the sink


# --- rollout ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "bert", "albert"])
def test_rollout_is_the_plain_product(name: str, tmp_path: Path) -> None:
    """Of (mean over heads + I) / 2 over eager attention, in float64; of rows with sinks, normalised."""
    family = INTERFACE[name]
    inputs = family.inputs("right")
    run = recorded(tmp_path / "r.zarr", family.build(), inputs)
    expected = [kept(weights, *family.masks(0, "right")) for weights in attentions(family.build("eager"), inputs)]
    for example in range(BATCH):
        found, product = rollout(run, example, every=True), np.eye(expected[0][example].shape[1])
        for layer, weights in enumerate(expected):
            mixed = (weights[example].mean(0) + np.eye(len(product))) / 2
            product = mixed / mixed.sum(1, keepdims=True) @ product
            assert np.abs(found.mass[layer] - product).max() < NEAR
            assert family.sinks or np.abs(mixed.sum(1) - 1).max() < 1e-6  # normalising does nothing
        last = rollout(run, example)
        assert np.array_equal(last.mass[0], found.mass[-1])
        assert (last.layers, last.sites) == (len(expected), found.sites[-1:])


def test_rollout_of_one_stack(bart_run: Run) -> None:
    assert rollout(bart_run, 0, sites="encoder.attention").layers == 3
    ids = bart_run["token.decoder/input_ids"][0].tolist()
    assert rollout(bart_run, 0, sites="decoder.attention").tokens == tuple(map(str, ids))
    for sites in (None, "decoder.cross_attention"):
        with pytest.raises(AnalysisError, match=r"encoder\.attention"):
            rollout(bart_run, 0, sites=sites)
    with pytest.raises(IndexError):
        rollout(bart_run, BATCH, sites="encoder.attention")


def test_rollout_goes_by_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One query at a time gives the same."""
    run = random_run(tmp_path / "r.zarr", [23])
    whole, tiles = rollout(run, 0), Attention.tiles
    monkeypatch.setattr(Attention, "tiles", lambda self, example: tiles(self, example, 1))
    np.testing.assert_allclose(rollout(run, 0).mass, whole.mass, atol=1e-6)


# --- maps ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from tensortape.app import models

    model, tokenizer = models.load(models.DEMO)
    texts = ["import os\n\ndef path(name):\n    return os.path.join('$a$', name)\n", "x = 1\n"]
    to = tmp_path_factory.mktemp("demo") / "r.zarr"
    return record(model, texts, tokenizer=tokenizer, to=to, sites="attention", durability="rename")


def test_a_map_has_the_texts_of_its_tokens(demo_run: Run) -> None:
    found = attention_map(demo_run, 2, 0)
    assert "".join(found.key_tokens) == str(demo_run["example/text"][0])
    assert found.query_tokens == found.key_tokens
    assert np.array_equal(found.weights, demo_run.attention(2)[0])
    frame = found.to_pandas()
    assert len(frame) == found.weights.size
    row = frame.iloc[-1]
    assert (row["head"], row["query_token"], row["weight"]) == (found.heads[-1], found.query_tokens[-1], found.weights[-1, -1, -1])


def test_a_part_of_a_map(demo_run: Run) -> None:
    whole, found = attention_map(demo_run, 2, 0), attention_map(demo_run, 2, 0, heads=1, queries=slice(-3, None), keys=[4, 0])
    size = whole.weights.shape[1]
    assert (found.heads.tolist(), found.queries.tolist(), found.keys.tolist()) == ([1], [size - 3, size - 2, size - 1], [4, 0])
    assert np.array_equal(found.weights, whole.weights[1:2, -3:][:, :, [4, 0]])
    assert found.key_tokens == (whole.key_tokens[4], whole.key_tokens[0])
    assert found.to_pandas()["query"].tolist() == [one for one in found.queries.tolist() for _ in range(2)]


def test_a_map_of_cross_attention_has_tokens_of_both_sides(bart_run: Run) -> None:
    found = attention_map(bart_run, "decoder.layers.1.encoder_attn", 2)
    assert found.weights.shape[1:] == (len(found.query_tokens), len(found.key_tokens))
    assert found.query_tokens == tuple(map(str, bart_run["token.decoder/input_ids"][2].tolist()))
    assert found.key_tokens == tuple(map(str, bart_run["token/input_ids"][2].tolist()))


def test_an_example_without_attention(tmp_path: Path) -> None:
    """It counts nowhere, and is refused by name where it is asked for."""
    random_run(tmp_path / "r.zarr", [11, 7])
    with RunWriter(tmp_path / "r.zarr", mode="resume", durability="rename") as writer:
        writer.append(ids=[77], columns={"token/input_ids": [[1, 2, 3]]})
    run = open_run(tmp_path / "r.zarr")
    assert head_stats(run).sites[0].examples == 2
    assert worst(head_stats(run), 0, exact(run)) < NEAR
    for asked in (attention_map, rollout):
        with pytest.raises(MissingExampleError, match="77"):
            asked(run, example=2, **({"site": 0} if asked is attention_map else {}))


def test_pictures_of_maps(demo_run: Run, bart_run: Run, tmp_path: Path) -> None:
    """Tokens stand along the axes, also such as are no valid formulas."""
    figure = attention_map(demo_run, 2, 0, heads=[0, 3]).plot()
    panels = [axes for axes in figure.axes if axes.get_title().startswith("head")]
    assert [axes.get_title() for axes in panels] == ["head 0", "head 3"]
    assert any("$" in label.get_text() for label in panels[0].get_xticklabels())
    figure.savefig(tmp_path / "map.png")
    figure = rollout(bart_run, 1, sites="encoder.attention", every=True).plot()
    assert len([axes for axes in figure.axes if "self_attn" in axes.get_title()]) == 3
    figure.savefig(tmp_path / "rollout.png")
