"""Train the demo model of this package: a small causal language model of the Python standard library's sources.

Run as `python examples/train_demo_model.py --out app/model`. It needs no network: the data are the standard library
files of the running interpreter. With the same Python, package versions and number of threads the run repeats.
On a machine that is busy with other work, OMP_WAIT_POLICY=PASSIVE in the environment makes it many times faster.
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
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
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
    parser.add_argument("--steps", type=int, default=1300, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--context", type=int, default=256, help="tokens per window")
    parser.add_argument("--rate", type=float, default=0.02, help="highest learning rate of the layers' matrices")
    parser.add_argument("--other-rate", type=float, default=0.008, help="the same of embedding and norms")
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
    model = new_model(tokenizer)
    train_model(stream, model, options)
    save(model, tokenizer, options.out)
    facts: dict[str, object] = {
        "train_files": len(train_files),
        "train_tokens": len(stream),
        "held_out_files": len(held_out_files),
        "scores": evaluate_saved(options.out, held_out_files, options.context),
        "long_scores": evaluate_saved(options.out, held_out_files, MAX_POSITIONS),
        "minutes": (time.monotonic() - began) / 60,
    }
    write_card(options, facts)
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
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def to_stream(tokenizer: PreTrainedTokenizerBase, files: list[SourceFile]) -> Tensor:
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
        initializer_range=0.06,  # the usual 0.02 suits much wider layers
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_model(stream: Tensor, model: Module, options: argparse.Namespace) -> None:
    """Train the weights of `model` on random windows of `stream` for `options.steps` steps."""
    optimizers = new_optimizers(model, options)
    schedules = [LambdaLR(optimizer, partial(rate_factor, steps=options.steps)) for optimizer in optimizers]
    batches = endless_batches(stream, options)
    began = time.monotonic()
    model.train()
    for step in range(options.steps):
        loss = train_step(model, [*optimizers, *schedules], next(batches))
        if step % 25 == 0 or step == options.steps - 1:
            print(f"step {step} loss {loss:.4f} after {time.monotonic() - began:.0f} s", flush=True)


def new_optimizers(model: Module, options: argparse.Namespace) -> list[Optimizer]:
    """Use Muon for the matrices of the layers, and AdamW for the embedding and the scales of the norms.

    In a run of few minutes Muon reaches a clearly lower loss on these matrices than AdamW.
    """
    matrices = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim > 1]
    others = [weight for name, weight in model.named_parameters() if ".layers." not in name or weight.ndim == 1]
    return [
        Muon(matrices, lr=options.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=options.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_step(model: Module, steppers: Sequence[Optimizer | LambdaLR], windows: Tensor) -> float:
    """Take one step on `windows`, int64 (batch, context + 1); return the mean loss in nats per token."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
    return loss.item()


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
        full = len(order) // options.batch * options.batch
        yield from (windows[part] for part in order[:full].view(-1, options.batch))


# ---- output


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Store float16 weights under a float32 config, so that plain loading gives a float32 model."""
    model.half().save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only, and a package keeps the mode


def evaluate_saved(folder: Path, files: list[SourceFile], context: int) -> Scores:
    """Score the model stored in `folder` on every token of `files`, the first token of a file included."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scored = [score_file(model, to_stream(tokenizer, [file]), context) for file in files]
    loss, right, count = torch.cat(scored).double().sum(0).tolist()
    return Scores(loss / count, right / count, int(count))


@torch.inference_mode()
def score_file(model: Module, tokens: Tensor, context: int) -> Tensor:
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


def score_window(model: Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(input_ids=inputs[None], use_cache=False).logits[0]
    loss = cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    right = (logits.argmax(-1) == targets).sum()
    return torch.stack([loss, right, (targets != IGNORED_TARGET).sum()])


def write_card(options: argparse.Namespace, facts: dict[str, object]) -> None:
    """Write the model card, README.md, with the measured numbers."""
    config = LlamaConfig.from_pretrained(options.out)
    libraries = (torch, transformers, tokenizers)
    card = CARD.format(
        **vars(options),
        **facts,
        config=config,
        parameters=LlamaForCausalLM(config).num_parameters(),
        seen_tokens=options.steps * options.batch * options.context,
        python=platform.python_version(),
        versions=", ".join(f"{library.__name__} {library.__version__}" for library in libraries),
        end_token=END_TOKEN,
        smallest=MIN_FILE_BYTES,
    )
    (options.out / "README.md").write_text(card)
    print(card[card.index("## Quality") :], flush=True)


def check_size(folder: Path) -> None:
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{total} bytes in all", flush=True)
    if total > SIZE_LIMIT:
        raise SystemExit(f"The folder may hold {SIZE_LIMIT} bytes.")


CARD = """\
# Demo model: a small language model of Python source code

A causal language model with {parameters:,} parameters, trained on the sources of the Python standard library. It is
small enough to travel inside a package and to run at once on any CPU, so that there are real activations to record and
analyse without a download. `examples/train_demo_model.py` made it and wrote this card.

## Data

The `.py` files of the standard library of Python {python}: ASCII only and at least {smallest} bytes, without tests,
`site-packages`, `encodings`, `idlelib`, `lib2to3`, `turtledemo`, `ensurepip` and the files that hold build paths.
They are under the Python Software Foundation License, Version 2.

The split is by file, one in twenty held out by a hash of its path. The tokenizer saw the training files only.

| Part | Files | Tokens |
|---|---|---|
| Training | {train_files} | {train_tokens:,} |
| Held out | {held_out_files} | {scores.tokens:,} |

## Model

- Llama architecture with rotary positions and tied embeddings: {config.num_hidden_layers} layers, hidden width
  {config.hidden_size}, feed-forward width {config.intermediate_size}, {config.num_attention_heads} attention heads,
  {config.num_key_value_heads} key-value heads.
- Byte-level BPE tokenizer with {config.vocab_size} entries. The one special token `{end_token}` stood before every
  file in training; the tokenizer does not add it by itself. A token never mixes words, quotes, comment signs and other
  punctuation, and offsets leave out leading spaces.
- Weights are stored in float16; the config says float32, so `from_pretrained` gives a float32 model.

## Training

    python examples/train_demo_model.py --out app/model --seed {seed} --steps {steps} --batch {batch} \\
        --context {context} --rate {rate} --other-rate {other_rate} --threads {threads}

Seed {seed}; {steps} steps of {batch} windows of {context} tokens, {seen_tokens:,} tokens in all. Muon for the matrices
of the layers and AdamW for the rest, linear warm-up and cosine decay. The whole command took {minutes:.1f} minutes of
wall time on {threads} CPU threads. Versions: {versions}.

## Quality

Measured with the stored weights on all tokens of the held-out files, in windows of {context} tokens that overlap by
half:

| Measure | Held out |
|---|---|
| Mean loss (nats per token) | {scores.loss:.4f} |
| Perplexity | {scores.perplexity:.2f} |
| Next-token accuracy | {scores.accuracy:.2%} |

## Limits

- A demo model: it shows real structure of Python code, but is not meant for generation, completion or any other use
  of its output.
- It was trained on windows of {context} tokens. The config allows {config.max_position_embeddings}; with windows of
  that size the held-out loss is {long_scores.loss:.4f} and the accuracy {long_scores.accuracy:.2%}.
- It knows ASCII standard-library style Python and hardly any other text; other characters fall apart into bytes.
- Held-out files share authors, style and sometimes passages with the training files, so the numbers say little about
  other code.
"""


if __name__ == "__main__":
    main()
