"""Train the demo model of this package: a small causal language model of the Python standard library's sources.

Run as `python examples/train_demo_model.py --out app/model`. It needs no network: the data are the standard library
files of the running interpreter. With the same Python, package versions and number of threads the run repeats.
"""

import argparse
import hashlib
import json
import math
import platform
import re
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

END_TOKEN = "<|end|>"
VOCABULARY_SIZE = 2048
MAX_POSITIONS = 512
SIZE_LIMIT = 4_000_000
IGNORED_TARGET = -100
MIN_FILE_BYTES = 2000
SKIPPED_FOLDERS = {
    *("test", "tests", "site-packages", "encodings", "idlelib", "lib2to3", "__pycache__", "turtledemo", "ensurepip"),
}
# Files written when an interpreter is built: they hold paths of the machine it was built on.
MACHINE_FILE = re.compile(r"(^|/)(_sysconfigdata|config-)")
# Words, quotes, comment signs and other punctuation never share a token, so that a token has one lexical kind.
WORD_PATTERN = r""" ?\w+| ?["']+| ?#+| ?[^\s\w"'#]+|\s+(?!\S)|\s+"""


@dataclass(frozen=True)
class SourceFile:
    """One source file: its path below the standard library folder, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Scores:
    """Quality on a set of files: mean loss in nats per token, share of right next tokens, number of scored tokens."""

    loss: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer and its card")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the windows")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--context", type=int, default=256, help="tokens per window")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    began = time.monotonic()
    train_files, held_out_files = split_files(read_sources(Path(sysconfig.get_path("stdlib"))))
    tokenizer = train_tokenizer(train_files)
    stream = to_stream(tokenizer, train_files)
    print(f"{len(train_files)} + {len(held_out_files)} files, {len(stream)} training tokens", flush=True)
    model = train_model(stream, new_model(tokenizer), options)
    save(model, tokenizer, options.out)
    seconds = time.monotonic() - began
    scores = evaluate_saved(options.out, held_out_files, options.context)
    counts = {"train_files": len(train_files), "train_tokens": len(stream), "held_out_files": len(held_out_files)}
    write_card(options, counts, scores, seconds)
    check_size(options.out)


# ---- data


def read_sources(root: Path) -> list[SourceFile]:
    """Read the usable Python files below `root`, sorted by their relative path."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    contents = ((name, (root / name).read_bytes()) for name in names if is_wanted(name))
    return [
        SourceFile(name, content.decode().replace("\r\n", "\n"))
        for name, content in contents
        if content.isascii() and len(content) >= MIN_FILE_BYTES
    ]


def is_wanted(name: str) -> bool:
    return SKIPPED_FOLDERS.isdisjoint(name.split("/")) and not MACHINE_FILE.search(name)


def split_files(files: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """Split whole files into training and held-out ones; one in twenty is held out, by a hash of its path."""
    return [file for file in files if not is_held_out(file)], [file for file in files if is_held_out(file)]


def is_held_out(file: SourceFile) -> bool:
    return hashlib.sha256(file.name.encode()).digest()[0] % 20 == 0


def train_tokenizer(files: list[SourceFile]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose offsets leave out a token's leading space."""
    core = Tokenizer(models.BPE())
    splitter = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([splitter, bytes_only])
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator((file.text for file in files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def to_stream(tokenizer: PreTrainedTokenizerFast, files: list[SourceFile]) -> Tensor:
    """Tokenize `files` into one row of int64 token ids; each file begins with the end token."""
    rows = tokenizer([file.text for file in files], verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (tokenizer.bos_token_id, *row)])


# ---- model and training


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a Llama model with random weights, about 1.4 million of them."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_model(stream: Tensor, model: LlamaForCausalLM, options: argparse.Namespace) -> LlamaForCausalLM:
    """Train `model` on random windows of `stream` for `options.steps` steps."""
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=options.rate, betas=(0.9, 0.98), fused=True)
    batches = endless_batches(stream, options)
    began = time.monotonic()
    model.train()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate_factor(step, options.steps)
        loss = train_step(model, optimizer, next(batches))
        if step % 25 == 0 or step == options.steps - 1:
            print(f"step {step} loss {loss:.4f} after {time.monotonic() - began:.0f} s", flush=True)
    return model.eval()


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, windows: Tensor) -> float:
    """Take one step on `windows`, int64 (batch, context + 1); return the mean loss in nats per token."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def parameter_groups(model: LlamaForCausalLM) -> list[dict[str, object]]:
    """Decay the matrices, but not the scales of the norms."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    scales = [weight for weight in model.parameters() if weight.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]


def rate_factor(step: int, steps: int, warm_up: int = 50, lowest: float = 0.02) -> float:
    """Scale the learning rate: a linear rise over `warm_up` steps, then a cosine down to `lowest`."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def endless_batches(stream: Tensor, options: argparse.Namespace) -> Iterator[Tensor]:
    """Yield int64 batches (batch, context + 1); every pass cuts the stream at other places and shuffles the windows."""
    generator = np.random.default_rng(options.seed)
    while True:
        shift = int(generator.integers(options.context))
        windows = stream[shift:].unfold(0, options.context + 1, options.context)
        order = torch.from_numpy(generator.permutation(len(windows)))
        yield from (windows[part] for part in order.split(options.batch) if len(part) == options.batch)


# ---- output


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Store float16 weights under a float32 config, so that plain loading gives a float32 model."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def evaluate_saved(folder: Path, files: list[SourceFile], context: int) -> Scores:
    """Score the model stored in `folder` on every token of `files`, the first token of a file included."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scored = [score_file(model, to_stream(tokenizer, [file]), context) for file in files]
    loss, right, count = torch.cat(scored).double().sum(0).tolist()
    return Scores(loss / count, right / count, int(count))


@torch.inference_mode()
def score_file(model: LlamaForCausalLM, tokens: Tensor, context: int) -> Tensor:
    """Return float32 rows (summed loss, right tokens, scored tokens), one per window of `context` tokens.

    A window begins half a context behind its predecessor and is scored only on the tokens that are new in it.
    """
    return torch.stack([score_window(model, *part) for part in evaluation_windows(tokens, context)])


def evaluation_windows(tokens: Tensor, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each window's inputs (n,) and targets (n,), those scored before replaced by IGNORED_TARGET."""
    half = context // 2
    for start in range(0, max(1, len(tokens) - 1 - half), half):
        part = tokens[start : start + context + 1]
        targets = part[1:].clone()
        if start:
            targets[:half] = IGNORED_TARGET
        yield part[:-1], targets


def score_window(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(input_ids=inputs[None], use_cache=False).logits[0]
    loss = cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    right = (logits.argmax(-1) == targets).sum()
    return torch.stack([loss, right, (targets != IGNORED_TARGET).sum()])
