"""The code in README and docs runs, from top to bottom of each page, in an empty folder."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from types import ModuleType

import pytest

from tensortape.app import demo_runs, models
from tensortape.instrument import pca, probe_set, record, recorder, schedule
from tensortape.instrument.loops import columns
from tensortape.stores import patterns, reader, writer

ROOT = Path(__file__).parents[1]
MODULES_WITH_EXAMPLES = [writer, reader, patterns, recorder, pca, probe_set, schedule, columns]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def code_of(page: Path) -> str:
    """All Python blocks of a page, with the model that the package carries in place of the user's own."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    return "\n".join(blocks).replace("path/or/name", str(models.demo_folder()))


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "analyses.md":
        demo_runs.record_sources(tmp_path / "run.zarr", demo_runs.source_files(4, seed=0))
    if page.name == "anchors.md":
        monkeypatch.syspath_prepend(ROOT / "examples")
    if page.name == "object_storage.md":
        request.getfixturevalue("s3_environment")
    exec(compile(code_of(page), str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("module", MODULES_WITH_EXAMPLES, ids=lambda module: module.__name__)
def test_the_examples_of_docstrings_run(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(module)
    assert (found.failed, found.attempted > 0) == (0, True)


def test_record_returns_an_open_run(tmp_path: Path) -> None:
    """The README's first claim, apart from its page: one call from texts to a run that reads back."""
    model, tokenizer = models.load(models.DEMO)
    run = record(model, ["import os\n", "x = 1\n"], tokenizer=tokenizer, to=tmp_path / "run.zarr", sites="resid_post")
    assert run["token/input_ids"][0].tolist() == tokenizer("import os\n")["input_ids"]
