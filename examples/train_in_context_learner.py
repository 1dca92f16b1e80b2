"""Train a small in-context learner, on which anchor attention can be looked at without a download.

Run as `OMP_NUM_THREADS=1 python examples/train_in_context_learner.py`; it stops once the query's label is right in 998 of 1,000
held-out episodes, which takes about ten minutes on one core, or when its time is up. `examples/episodes.py` says what is learnt.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from episodes import FOLDER, LABEL, LABELS, PERIOD, TARGET, draw, vocabulary
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BATCH = 96
RATE, WARM_UP = 2e-3, 100
CHECK_EVERY, CHECKED, ENOUGH = 100, 1000, 0.998
TESTED = 4000
HELD_OUT = 1_000_000  # seeds from here on are never trained on
BEFORE_LABELS = torch.arange(LABEL - 1, TARGET + 1, PERIOD)  # positions that predict a label


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the episodes")
    parser.add_argument("--minutes", type=float, default=20.0, help="most minutes of training")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    words = vocabulary()
    model = new_model(len(words))
    steps, minutes = train(model, options)
    save(model, words, options.out)
    trained = LlamaForCausalLM.from_pretrained(options.out).eval()
    right = accuracy(trained, TESTED, HELD_OUT + 1)
    write_card(options, trained.num_parameters(), steps, minutes, right)
    print(f"{steps} steps, {minutes:.1f} minutes, accuracy {right:.4f} on {TESTED} new episodes", flush=True)


def new_model(words: int) -> LlamaForCausalLM:
    """A Llama model with random weights, about 0.58 million of them."""
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, options: argparse.Namespace) -> tuple[int, float]:
    """Train until it is good enough or time is up; steps and minutes taken."""
    optimizer = AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, (WARM_UP / (step + 1)) ** 0.5))
    began, step = time.monotonic(), 0
    while time.monotonic() - began < 60 * options.minutes:
        step += 1
        episodes = draw(BATCH, model.config.vocab_size, (options.seed, step))
        loss = cross_entropy(label_scores(model, ids := torch.from_numpy(episodes.ids)).flatten(0, 1), labels_of(ids).flatten())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % CHECK_EVERY == 0:
            right = accuracy(model, CHECKED, HELD_OUT)
            print(f"step {step} loss {loss.item():.4f} accuracy {right:.3f} after {time.monotonic() - began:.0f} s", flush=True)
            if right >= ENOUGH:
                break
    return step, (time.monotonic() - began) / 60


def label_scores(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Scores of the next token where it is a label, [n, 9, vocabulary], of whole episodes [n, 35]."""
    states = model.model(input_ids=ids[:, : TARGET + 1], use_cache=False).last_hidden_state
    scores: Tensor = model.lm_head(states[:, BEFORE_LABELS])
    return scores


def labels_of(ids: Tensor) -> Tensor:
    """The labels of whole episodes, [n, 9]."""
    return ids[:, BEFORE_LABELS + 1]


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, count: int, seed: int) -> float:
    """Share of episodes whose query's label has the highest score of all words."""
    episodes = draw(count, model.config.vocab_size, seed)
    found = label_scores(model, torch.from_numpy(episodes.ids))[:, -1].argmax(-1)
    return float((found == torch.from_numpy(episodes.gold)).float().mean())


def save(model: LlamaForCausalLM, words: list[str], folder: Path) -> None:
    """Store float16 weights under a float32 config, so that plain loading gives a float32 model."""
    model.half().save_pretrained(folder)  # type: ignore[no-untyped-call]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64).save_pretrained(folder)  # type: ignore[no-untyped-call]
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only


def write_card(options: argparse.Namespace, parameters: int, steps: int, minutes: float, right: float) -> None:
    """Write the model card with the measured numbers."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    text = f"""\
# An in-context learner of {parameters:,} parameters

A Llama model of 3 layers, width 128 and 4 heads that reads a name's label from eight demonstrations, `name name label newline`, and
gives it to the query. Names are builtins, exceptions, special methods and modules of Python's standard library, labels are the
keywords {", ".join(LABELS)}; both are drawn afresh for every episode. `examples/train_in_context_learner.py` made it
(seed {options.seed}, {steps} steps of {BATCH} episodes, {minutes:.1f} minutes; {versions}). Weights are stored in float16.

Accuracy on {TESTED:,} episodes it was not trained on, all words allowed: {right:.4f}.
"""
    (options.out / "README.md").write_text(text)


if __name__ == "__main__":
    main()
