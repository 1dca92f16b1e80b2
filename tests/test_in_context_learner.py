"""The learner in `examples/`: it loads from a clone, its episodes are what they are said to be, and it has learnt them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_episodes(examples: Any) -> None:
    """Each name has one label throughout its episode, four demonstrations have each, and the same seed draws the same."""
    episodes = examples("episodes")
    drawn = episodes.draw(53, 97, seed=3)
    grid = np.concatenate([drawn.ids, np.zeros((53, 1), int)], 1).reshape(53, 9, 4)
    assert (grid[:, :, 0] == grid[:, :, 1]).all()
    assert (grid[:, :, 3] == 0).all()
    for rows, labels, gold in zip(grid, drawn.labels, drawn.gold, strict=True):
        pairs = {(int(name), int(label)) for name, _, label, _ in rows}
        assert len(pairs) == len({name for name, _ in pairs}) == 2
        assert {label for _, label in pairs} == set(labels.tolist()) <= set(range(1, 11))
        assert {name for name, _ in pairs} <= set(range(11, 97))
        assert [(rows[:8, 2] == label).sum() for label in labels] == [4, 4]
        assert rows[8, 2] == gold
    assert np.array_equal(episodes.draw(53, 97, seed=3).ids, drawn.ids)
    assert not np.array_equal(episodes.draw(53, 97, seed=4).ids, drawn.ids)


def test_the_learner_has_learnt(examples: Any) -> None:
    """It says the right label of hundreds of episodes it was not trained on, out of all words; the folder is small."""
    episodes = examples("episodes")
    model, tokenizer = episodes.load_learner()
    assert tokenizer.encode("len len if \n") == [tokenizer.convert_tokens_to_ids(word) for word in ("len", "len", "if", "\n")]
    drawn = episodes.draw(500, len(tokenizer), seed=3_000_000)
    with torch.inference_mode():
        found = model(torch.from_numpy(drawn.prompts)).logits[:, -1].argmax(-1).numpy()
    assert (found == drawn.gold).mean() > 0.98
    assert sum(path.stat().st_size for path in episodes.FOLDER.iterdir()) < 3_000_000


@pytest.mark.slow
def test_the_report_runs(examples: Any, tmp_path: Path) -> None:
    """On few episodes; the uncut and the whole prompts agree with themselves, and the pictures are there."""
    pytest.importorskip("matplotlib")
    report = examples("anchors_report")
    model, tokenizer = examples("episodes").load_learner()
    found = report.measure(model, report.draw(48, len(tokenizer), 1), seed=1)
    assert found.isolation["label_loyalty"][0] == 1
    assert set(found.compression["method"]) == {"full", "hidden_anchor", "text_anchor", "hidden_random"}
    assert len(report.layers_of(found)) == 3
    report.draw_figure(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
