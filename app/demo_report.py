"""The demo's report: a table, a picture and a sentence for each analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensortape.analyses import ProbeReport, Result

COLUMNS = {
    "probes": ["labels", "site", "accuracy", "low", "high", "control", "selectivity", "random_init", "type_lookup", "majority"],
    "tcav": ["concept", "site", "n", "sign_count", "p_fdr", "mean", "p_mean_fdr"],
    "heads": ["layer", "head", "normalised_entropy", "distance", "sink", "previous", "itself", "induction"],
}
TITLES = {
    "probes": "What can be read off each layer",
    "tcav": "Does the logit of `self` grow along a concept?",
    "heads": "What each attention head looks at",
}
SAYS = {
    "probes": (
        "Linear probes of exact labels of Python tokens, tested on files that they were not fitted to. A probe that does not beat "
        "the look-up of each token's most frequent label has read the token and not its context; `control` is the same probe on "
        "random labels of token types, `random_init` on a model that was not trained. Failure of a linear probe is not absence of "
        "the information."
    ),
    "tcav": (
        "Concepts are windows with a line that begins with `class`, `import` or `for`. `sign_count` is the share of windows whose "
        "logit of `self` grows along the concept's direction; `p_fdr` holds it against random sets of as many windows, and only "
        "what is below 0.05 says more than chance."
    ),
    "heads": (
        "Means over queries: entropy as a share of the highest possible, distance in tokens, and the attention that goes to the "
        "first token, the one before, the token itself, and the token that followed an earlier occurrence of the same token."
    ),
}


@dataclass(frozen=True)
class Section:
    """A table with its picture."""

    name: str
    title: str
    says: str
    table: str


def sections(results: Mapping[str, Result]) -> list[Section]:
    """One for each result."""
    return [Section(name, TITLES[name], SAYS[name], _table(result, COLUMNS[name])) for name, result in results.items()]


def markdown(found: Sequence[Section]) -> str:
    """The report."""
    parts = [f"## {one.title}\n\n{one.says}\n\n![{one.title}]({one.name}.png)\n\n{one.table}\n" for one in found]
    return "# The embedded model over the standard library\n\n" + "\n".join(parts)


def probe_figures(report: ProbeReport) -> dict[str, Any]:
    """Accuracies by set of labels and site."""
    return {
        one.name: {
            "majority": one.majority,
            "type_lookup": one.type_lookup,
            "accuracy": {score.site: score.accuracy for score in report.scores if score.labels == one.name},
        }
        for one in report.sets
    }


def _table(result: Result, columns: Sequence[str]) -> str:
    """A Markdown table that is also legible as text."""
    frame = result.to_pandas()
    kept = [column for column in columns if column in frame]
    cells = [kept, *([_shown(value) for value in row] for row in frame[kept].itertuples(index=False))]
    widths = [max(len(row[place]) for row in cells) for place in range(len(kept))]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]])


def _shown(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
