"""In-context classification without text: episodes of eight demonstrations and a query, from words of the standard library.

Each demonstration is `name name label newline`, with the same name twice. An episode draws two names and two labels afresh, so a
name's label can only be read from the demonstrations. The query is a name twice; its label comes next.
"""

from __future__ import annotations

import builtins
import keyword
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
FOLDER = Path(__file__).with_name("in_context_learner")
LABELS = ("and", "or", "not", "if", "else", "for", "while", "try", "with", "pass")
NEWLINE = "\n"
DEMONSTRATIONS = 8
PERIOD = 4  # tokens of a demonstration: name name label newline
LABEL = 2  # where its label is
TARGET = DEMONSTRATIONS * PERIOD + 1  # the query's last token, which the label follows


@dataclass(frozen=True)
class Episodes:
    """Some episodes.

    Args:
        ids: whole ones, with the query's label at the end; [n, 35].
        labels: the token ids of the two labels of each; [n, 2].
    """

    ids: Ids
    labels: Ids

    @property
    def prompts(self) -> Ids:
        """Without the query's label; [n, 34]."""
        return self.ids[:, : TARGET + 1]

    @property
    def gold(self) -> Ids:
        """Token ids of the queries' labels; [n]."""
        return self.ids[:, TARGET + 1]


def vocabulary() -> list[str]:
    """Newline, labels and names: builtins, exceptions, special methods and modules of this Python."""
    special = {name for kind in (object, type, int, str, list, dict, set) for name in dir(kind) if name.startswith("__")}
    public = {name for name in (*dir(builtins), *sys.stdlib_module_names) if not name.startswith("_")}
    return [NEWLINE, *LABELS, *sorted((special | public) - set(keyword.kwlist))]


def draw(count: int, words: int, seed: int | Iterable[int]) -> Episodes:
    """Episodes of a vocabulary of so many words; the same for the same seed."""
    random = np.random.default_rng(seed)
    first_name = 1 + len(LABELS)
    names = first_name + _two_of(random, words - first_name, count)
    labels = 1 + _two_of(random, len(LABELS), count)
    balanced = np.tile(np.arange(DEMONSTRATIONS) % 2, (count, 1))
    of_demonstration = np.concatenate([random.permuted(balanced, axis=1), random.integers(0, 2, (count, 1))], axis=1)
    name, label = (np.take_along_axis(pair, of_demonstration, 1) for pair in (names, labels))
    ids = np.stack([name, name, label, np.zeros_like(name)], -1).reshape(count, -1)
    return Episodes(ids[:, : TARGET + 2], labels)


def load_learner() -> tuple[Any, Any]:
    """The trained model, a float32 LlamaForCausalLM in eval mode, and its tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


def _two_of(random: np.random.Generator, choices: int, count: int) -> Ids:
    """Two different numbers below `choices`, [count, 2]."""
    first = random.integers(0, choices, count)
    return np.stack([first, (first + random.integers(1, choices, count)) % choices], 1)
