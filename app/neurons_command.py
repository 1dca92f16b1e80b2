"""Neurons of a site on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tensortape.analyses import NeuronTable, neuron_table
from tensortape.analyses.neuron_table import By
from tensortape.analyses.passages import Decode, Passage
from tensortape.stores import Run

from . import models

Json = dict[str, Any]
_CONTEXT = 16  # characters of the text before and after a token


def found(
    run: Run,
    site: str,
    *,
    labels: str | None,
    target: str | None,
    assume_sum: bool,
    level: str,
    top: int,
    by: By | None,
    first: int,
    csv: Path | None,
    plot: Path | None,
) -> Json:
    """The first neurons, with what is known of each; all of them in the table and the picture that are also written."""
    table = neuron_table(
        run,
        site,
        labels,
        top=top,
        target=target,
        assume="sum" if assume_sum else None,
        level=level,
        context=_CONTEXT,
        decode=_decode(run),
    )
    order, frame = table.ranked(by)[:first], table.to_pandas()
    if csv is not None:
        frame.to_csv(csv, index=False)
    if plot is not None:
        table.plot().savefig(plot, dpi=150)
    rows = json.loads(frame.iloc[order].to_json(orient="records", double_precision=15))  # NaN as null
    neurons = [_neuron(table, number, row) for row, number in zip(rows, order.tolist(), strict=True)]
    return {"site": table.site, "summary": repr(table)[1:-1], "neurons": neurons}


def lines(said: Json) -> Iterable[str]:
    """The same for people: a line per neuron, its highest tokens within their text."""
    yield said["summary"]
    yield f"{'neuron':>7}{'mean':>11}{'deviation':>11}{'positive':>10}{'importance':>12}{'AUC':>7}  class"
    for one in said["neurons"]:
        importance, auc = _number(one.get("importance"), "12.4g"), _number(one.get("best.auc"), "7.3f")
        numbers = f"{_number(one['mean'], '11.4g')}{_number(one['deviation'], '11.4g')}{one['positive']:>10.1%}"
        yield f"{one['neuron']:>7}{numbers}{importance}{auc}  {one.get('best.class', '')}"
        yield from (f"{'':>9}{_number(row['value'], '.4g'):>9}  {row['shown']}" for row in one["top"])


def _decode(run: Run) -> Decode | None:
    """Text of token ids, where the run keeps none of its own."""
    tokenizer = None if "text" in run.tables["example"] else models.recorded_tokenizer(run)
    return None if tokenizer is None else tokenizer.decode


def _neuron(table: NeuronTable, number: int, row: Json) -> Json:
    return {**row, **_told_best(table, number), "top": _top(table, number)}


def _told_best(table: NeuronTable, neuron: int) -> Json:
    """The class that a neuron tells best, and how well."""
    if table.selectivity is None or np.isnan(table.selectivity.auc[0, neuron]):
        return {}
    areas = table.selectivity.auc[:, neuron]
    best = int(np.abs(areas - 0.5).argmax())
    return {"best.class": table.selectivity.classes[best], "best.auc": float(areas[best])}


def _top(table: NeuronTable, neuron: int) -> list[Json]:
    if table.top is None:
        return []
    values = table.top.values[neuron].astype(float).tolist()
    return [{"value": value, "shown": _shown(one), **vars(one)} for value, one in zip(values, table.top.of(neuron), strict=True)]


def _shown(one: Passage) -> str:
    """A token between brackets in its text, in one line; where it is if there is no text."""
    place = f"{one.id}, token {one.token}" if one.token >= 0 else str(one.id)
    text = place if one.text is None else f"{one.before}[{one.text}]{one.after}   ({place})"
    return text.replace("\r", "").replace("\n", "\\n").replace("\t", "\\t")


def _number(value: float | None, form: str) -> str:
    """A number, or blanks in its place."""
    width = int(form.partition(".")[0] or 0)
    return " " * width if value is None else format(value, form)
