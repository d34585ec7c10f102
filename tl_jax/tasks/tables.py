"""Summaries as tables for the console."""

import itertools
from collections.abc import Mapping

import rich.box
import rich.markup
import rich.table

ORDER = {"class": "f1", "label": "f1", "target": "r2"}  # the metric with its interval, and that finds the worst
HEADERS = {"f1": "F1", "roc_auc": "AUC", "average_precision": "AP", "rmse": "RMSE", "mae": "MAE", "r2": "R2",
           "spearman": "Spearman"}  # fmt: skip
PLURAL = {"class": "classes", "label": "labels", "target": "targets"}


def format_table(summary: dict, of: str = "") -> rich.table.Table:
    """The scalar metrics with their intervals, for a rich console; `of` names the run and the data in the title."""
    title = f"{of}{': ' if of else ''}{summary['count']:,} examples, {summary['resamples']:,} resamples"
    table = _table("metric", "value", f"{100 * summary['level']:g} % interval", title=title)
    for name, entry in summary.items():
        if isinstance(entry, dict):
            table.add_row(name, *_cells(entry))
    return table


def format_sets(summaries: Mapping[str, dict], metric: str) -> rich.table.Table:
    """One metric of several sets, a row each: {name of the set: its summary}."""
    table = _table("extra_eval", "examples", metric, "interval")
    for name, summary in summaries.items():
        table.add_row(rich.markup.escape(name), f"{summary['count']:,}", *_cells(summary[metric]))
    return table


def format_classes(summary: dict, limit: int = 20) -> rich.table.Table | None:
    """The metrics per class, label or target; of more than `limit` those that are worst. None where there are none."""
    noun = next((noun for noun in ORDER if f"per_{noun}" in summary), None)
    if noun is None:
        return None
    rows, order, title = summary[f"per_{noun}"], ORDER[noun], f"per {noun}"
    if len(rows) > limit:
        title = f"the {limit} of {len(rows)} {PLURAL[noun]} with the lowest {HEADERS[order]}"
        rows = sorted(rows, key=lambda row: 2 if row[order]["value"] is None else row[order]["value"])[:limit]
    headers = [[HEADERS.get(name, name), "interval"][: 1 + (name == order)] for name in rows[0] if name != noun]
    table = _table(noun, *itertools.chain(*headers), title=title)
    for row in rows:
        cells = [rich.markup.escape(row[noun])]
        for name, entry in row.items():
            if name != noun:
                cells += _cells(entry)[: 1 + (name == order)] if isinstance(entry, dict) else [str(entry)]
        table.add_row(*cells)
    return table


def _table(first, *headers, title=None):
    columns = [rich.table.Column(header, justify="right") for header in headers]
    return rich.table.Table(first, *columns, box=rich.box.SIMPLE_HEAD, title=title, title_justify="left")


def _cells(entry):
    numbers = [entry[name] for name in ("value", "low", "high")]
    value, low, high = ("-" if x is None else f"{x:.4f}" if abs(x) < 1e4 else f"{x:.4g}" for x in numbers)
    return value, f"{low} .. {high}"
