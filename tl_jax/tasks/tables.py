"""Summaries as tables for the console."""

import itertools
from collections.abc import Mapping

from tl_jax.core.console import Table

ORDER = {"class": "f1", "label": "f1", "target": "r2"}  # the metric with its interval, and that finds the worst
HEADERS = {"f1": "F1", "roc_auc": "AUC", "average_precision": "AP", "rmse": "RMSE", "mae": "MAE", "r2": "R2",
           "spearman": "Spearman"}  # fmt: skip
PLURAL = {"class": "classes", "label": "labels", "target": "targets"}


def format_table(summary: dict, of: str = "") -> Table:
    """The scalar metrics with their intervals; `of` names the run and the data in the caption."""
    title = f"{of}{': ' if of else ''}{summary['count']:,} examples, {summary['resamples']:,} resamples"
    rows = [(name, *_cells(entry)) for name, entry in summary.items() if isinstance(entry, dict)]
    return Table(title, ("metric", "value", f"{100 * summary['level']:g} % interval"), rows)


def format_sets(summaries: Mapping[str, dict], metric: str) -> Table:
    """One metric of several sets, a row each: {name of the set: its summary}."""
    rows = [(name, f"{each['count']:,}", *_cells(each[metric])) for name, each in summaries.items()]
    return Table("", ("extra_eval", "examples", metric, "interval"), rows)


def format_classes(summary: dict, limit: int = 20) -> Table | None:
    """The metrics per class, label or target; of more than `limit` those that are worst. None where there are none."""
    noun = next((noun for noun in ORDER if f"per_{noun}" in summary), None)
    if noun is None:
        return None
    rows, order, title = summary[f"per_{noun}"], ORDER[noun], f"per {noun}"
    if len(rows) > limit:
        title = f"the {limit} of {len(rows)} {PLURAL[noun]} with the lowest {HEADERS[order]}"
        rows = sorted(rows, key=lambda row: 2 if row[order]["value"] is None else row[order]["value"])[:limit]
    headers = [[HEADERS.get(name, name), "interval"][: 1 + (name == order)] for name in rows[0] if name != noun]
    shown = []
    for row in rows:
        cells = [row[noun]]
        for name, entry in row.items():
            if name != noun:
                cells += _cells(entry)[: 1 + (name == order)] if isinstance(entry, dict) else [str(entry)]
        shown.append(cells)
    return Table(title, (noun, *itertools.chain(*headers)), shown)


def _cells(entry):
    numbers = [entry[name] for name in ("value", "low", "high")]
    value, low, high = ("-" if x is None else f"{x:.4f}" if abs(x) < 1e4 else f"{x:.4g}" for x in numbers)
    return value, f"{low} .. {high}"
