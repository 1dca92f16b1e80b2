"""Label words as anchors in the small in-context learner: isolation, attention and prediction, compression.

Run as `python examples/anchors_report.py --out anchors`; writes tables (CSV) and a picture (PNG) into the folder. The methods are
those of Wang et al., "Label Words are Anchors" (EMNLP 2023); the model is a toy, and the numbers are no replication of theirs.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from episodes import DEMONSTRATIONS, LABEL, LABELS, PERIOD, TARGET, Episodes, draw, load_learner
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from tensortape.analyses import AnchorAUC, AnchorFlow, anchor_auc, anchor_flow, anchor_positions
from tensortape.analyses.figures.anchors import auc_panel, flow_panel
from tensortape.analyses.figures.canvas import BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure
from tensortape.instrument import record
from tensortape.instrument.anchors import AnchorWeights, Answers, Prompt, answers, compress, isolated, label_loyalty, word_loyalty

SEED = 2_000_000  # episodes that neither training nor its checks have seen
BATCH = 64
LABEL_TOKENS = range(1, 1 + len(LABELS))
LOYALTY = "label loyalty (share of prompts)"
POSITIONS = tuple(range(LABEL, TARGET, PERIOD))


@dataclass(frozen=True)
class Report:
    """The tables."""

    isolation: pd.DataFrame
    flow: AnchorFlow
    auc: AnchorAUC
    newlines: AnchorAUC
    compression: pd.DataFrame
    reweighting: pd.DataFrame


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("anchors"), help="folder for tables and picture")
    parser.add_argument("--episodes", type=int, default=512, help="prompts")
    parser.add_argument("--seed", type=int, default=SEED, help="of the prompts and of what is drawn at random")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    model, tokenizer = load_learner()
    episodes = draw(options.episodes, len(tokenizer), options.seed)
    report = measure(model, episodes, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {
        "isolation": report.isolation,
        "layers": layers_of(report),
        "compression": report.compression,
        "reweighting": report.reweighting,
    }
    for name, table in tables.items():
        table.to_csv(options.out / f"{name}.csv", index=False)
        print(f"\n{name}\n{table.to_string(index=False, float_format=lambda value: f'{value:.3g}')}")
    draw_figure(report, options.out / "anchors.png")


def measure(model: LlamaForCausalLM, episodes: Episodes, seed: int) -> Report:
    """All tables for some episodes."""
    whole = answered(model, episodes)
    return Report(
        isolation(model, episodes, whole, seed),
        *recorded(model, episodes, whole),
        compression(model, episodes, seed),
        reweighting(model, episodes, seed),
    )


# ---- isolation


def isolation(model: LlamaForCausalLM, episodes: Episodes, whole: Answers, seed: int) -> pd.DataFrame:
    """Loyalty and accuracy where each demonstration's label word, its newline, or one of its names, drawn at random, sees nothing
    before it, in the first or last layers."""
    starts = PERIOD * np.arange(DEMONSTRATIONS)
    names = np.random.default_rng(seed).integers(0, LABEL, (len(episodes.ids), DEMONSTRATIONS)) + starts
    labels = np.broadcast_to(starts + LABEL, names.shape)
    cuts = {"label words": labels, "newlines": labels + 1, "names": names}
    rows = [{"layers": "none", "isolated": "", **scores(whole, whole, episodes)}]
    for span, layers in spans(model.config.num_hidden_layers).items():
        for name, cut in cuts.items():
            found = answered(model, episodes, cut.tolist(), layers)
            rows.append({"layers": span, "isolated": name, **scores(found, whole, episodes)})
    return pd.DataFrame(rows)


def spans(layers: int) -> dict[str, list[int]]:
    """The first and last layers, one, two and so on, and all of them."""
    every = list(range(layers))
    first = {f"first {count}": every[:count] for count in range(1, layers)}
    return {**first, **{f"last {count}": every[-count:] for count in range(1, layers)}, "all": every}


@torch.inference_mode()
def answered(
    model: LlamaForCausalLM, episodes: Episodes, cut: list[list[int]] | None = None, layers: Sequence[int] = ()
) -> Answers:
    """Answers to all prompts, with some positions isolated in some layers."""
    found = []
    for part in parts(len(episodes.ids)):
        prompts = torch.from_numpy(episodes.prompts[part])
        with isolated(model, cut[part], layers) if cut is not None else nullcontext():
            found.append(model(prompts, use_cache=False).logits[:, -1])
    return answers(torch.cat(found), LABEL_TOKENS)


def scores(found: Answers, whole: Answers, episodes: Episodes) -> dict[str, Any]:
    right = found.labels == torch.from_numpy(episodes.gold - LABEL_TOKENS[0])
    accuracy = float(right.double().mean())
    return {"label_loyalty": label_loyalty(found, whole), "word_loyalty": word_loyalty(found, whole), "accuracy": accuracy}


# ---- what is recorded


def recorded(model: LlamaForCausalLM, episodes: Episodes, whole: Answers) -> tuple[AnchorFlow, AnchorAUC, AnchorAUC]:
    """Flow, AUC of label words and AUC of the newlines behind them, of a run of all prompts.

    Each episode has labels of its own, so classes go by their order in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = record(
            model,
            batches(episodes),
            to=Path(folder) / "run.zarr",
            ids="id",
            sites=["attention.grad"],
            targets={"loss": label_loss},
            durability="rename",
        )
        positions = anchor_positions(run, {word: token for word, token in zip(LABELS, LABEL_TOKENS, strict=True)}, by="appearance")
        predicted = np.array(LABEL_TOKENS)[whole.labels.numpy()]
        behind = replace(positions, positions=positions.positions + 1)
        return anchor_flow(run, positions), anchor_auc(run, positions, predicted), anchor_auc(run, behind, predicted)


def layers_of(report: Report) -> pd.DataFrame:
    """One row per layer."""
    columns = ["layer", "S_wp_share", "S_pq_share", "S_ww_share"]
    return report.flow.to_pandas()[columns].assign(AUCROC=report.auc.auc, R=report.auc.share, AUCROC_newlines=report.newlines.auc)


def batches(episodes: Episodes) -> Iterator[dict[str, Any]]:
    for part in parts(len(episodes.ids)):
        ids = torch.from_numpy(episodes.prompts[part])
        yield {
            "id": list(range(part.start, part.start + len(ids))),
            "input_ids": ids,
            "gold": torch.from_numpy(episodes.gold[part]),
        }


def label_loss(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the right label over the label words alone, [n]."""
    return cross_entropy(outputs.logits[:, -1, list(LABEL_TOKENS)], batch["gold"] - LABEL_TOKENS[0], reduction="none")


# ---- compression and re-weighting


def compression(model: LlamaForCausalLM, episodes: Episodes, seed: int) -> pd.DataFrame:
    """Loyalty, accuracy and speed from anchors alone: label words with the newlines behind them, and label words only."""
    gold = (episodes.gold - LABEL_TOKENS[0]).tolist()
    tables = []
    for name, newlines in (("label words and newlines", True), ("label words", False)):
        rows = compress(model, prompts_of(episodes, newlines=newlines), LABEL_TOKENS, gold=gold, seed=seed, batch_size=BATCH)
        tables.append(pd.DataFrame(list(map(asdict, rows))).assign(anchors=name))
    every = pd.concat(tables)
    table = every.groupby(["anchors", "method"], sort=False).agg(
        draws=("draw", "size"),
        label_loyalty=("label_loyalty", "mean"),
        lowest=("label_loyalty", "min"),
        highest=("label_loyalty", "max"),
        word_loyalty=("word_loyalty", "mean"),
        accuracy=("accuracy", "mean"),
        kept=("kept", "mean"),
        speed_up=("speed_up", "mean"),
    )
    return table.reset_index()


def reweighting(model: LlamaForCausalLM, episodes: Episodes, seed: int) -> pd.DataFrame:
    """Loss and accuracy before and after beta is learnt on 16 other prompts."""
    learnt = draw(16, model.config.vocab_size, seed + 1)
    weights = AnchorWeights.of(model, DEMONSTRATIONS)
    rows = [{"beta": "0", **weighed(model, episodes, weights)}]
    weights.fit(model, prompts_of(learnt, newlines=True), (learnt.gold - LABEL_TOKENS[0]).tolist(), LABEL_TOKENS, seed=seed)
    return pd.DataFrame([*rows, {"beta": "learnt", **weighed(model, episodes, weights)}])


@torch.no_grad()
def weighed(model: LlamaForCausalLM, episodes: Episodes, weights: AnchorWeights) -> dict[str, float]:
    """Loss in nats and accuracy over label words."""
    losses, right = [], []
    for part in parts(len(episodes.ids)):
        prompts, gold = torch.from_numpy(episodes.prompts[part]), torch.from_numpy(episodes.gold[part] - LABEL_TOKENS[0])
        with weights.applied(model, [POSITIONS] * len(prompts), [TARGET] * len(prompts)):
            logits = model(prompts, use_cache=False).logits[:, -1, list(LABEL_TOKENS)]
        losses.append(cross_entropy(logits, gold, reduction="none"))
        right.append(logits.argmax(-1) == gold)
    return {"loss": float(torch.cat(losses).mean()), "accuracy": float(torch.cat(right).double().mean())}


def prompts_of(episodes: Episodes, *, newlines: bool) -> list[Prompt]:
    spans = tuple((start, start + PERIOD) for start in range(0, DEMONSTRATIONS * PERIOD, PERIOD))
    form = tuple(stop - 1 for _, stop in spans) if newlines else ()
    return [Prompt(tuple(row), spans, POSITIONS, form) for row in episodes.prompts.tolist()]


def parts(count: int) -> list[slice]:
    return [slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]


# ---- picture


def draw_figure(report: Report, path: Path) -> None:
    figure = new_figure(11, 7.6)
    (cut, kept), (flow, auc) = figure.subplots(2, 2)
    isolation_panel(cut, report.isolation)
    compression_panel(kept, report.compression)
    flow_panel(flow, report.flow)
    auc_panel(auc, report.auc)
    auc.plot(report.newlines.auc, "^-", color=GREEN, label="AUCROC$_l$ of attention to newlines")
    auc.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def isolation_panel(axes: Axes, table: pd.DataFrame) -> None:
    named = list(dict.fromkeys(table["layers"][1:]))
    for number, (name, colour) in enumerate({"label words": BLUE, "newlines": GREEN, "names": ORANGE}.items()):
        here = table[table["isolated"] == name].set_index("layers")["label_loyalty"]
        axes.bar(np.arange(len(named)) + 0.27 * (number - 1), here[named], 0.25, color=colour, label=name)
    axes.set_xticks(range(len(named)), named)
    axes.set(title="Tokens that see nothing before them", xlabel="in these layers", ylabel=LOYALTY, ylim=(0, 1.45))
    _close(axes, "isolated")


def compression_panel(axes: Axes, table: pd.DataFrame) -> None:
    methods = {"hidden_anchor": "Hidden$_{anchor}$", "text_anchor": "Text$_{anchor}$", "hidden_random": "Hidden$_{random}$"}
    for number, (name, here) in enumerate(table.groupby("anchors", sort=False)):
        rows = here.set_index("method").loc[list(methods)]
        error = np.stack([rows["label_loyalty"] - rows["lowest"], rows["highest"] - rows["label_loyalty"]])
        error[:, rows["draws"] == 1] = np.nan  # nothing was drawn
        at = np.arange(len(methods)) + 0.4 * number - 0.2
        axes.bar(at, rows["label_loyalty"], 0.38, yerr=error, capsize=3, color=(BLUE, PURPLE)[number], label=name)
    axes.set_xticks(range(len(methods)), list(methods.values()))
    axes.set(title="Demonstrations compressed", ylabel=LOYALTY, ylim=(0, 1.45))
    _close(axes, "anchors")


def _close(axes: Axes, title: str) -> None:
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.axhline(0.5, color=GREY, linestyle=":", label="chance of two labels")
    axes.legend(title=title, loc="upper center", fontsize="small", title_fontsize="small", ncols=2)


if __name__ == "__main__":
    main()
