"""What the numbers of a study say: means, paired differences, effects, ranks and costs, as plain data and sentences."""

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from tl_jax import tasks
from tl_jax.core import messages
from tl_jax.studies.report import statistics
from tl_jax.studies.report.results import COSTS, Cell, Outputs, Results, Unit, read_curve
from tl_jax.tasks.intervals import mean_defined

ALPHA = 0.05
LISTED = 8  # settings in one sentence
FEW = 5  # with fewer pairs a t-test sees large differences only


def means(results: Results, metric: str) -> dict[Cell, dict]:
    """{"mean", "low", "high", "n", "planned"} of every cell."""
    return {
        cell: results.interval(results.scores(cell, metric).values(), metric) | {"planned": len(units)}
        for cell, units in results.grid.items()
    }


def differences(results: Results, metric: str) -> list[dict[str, Any]]:
    """Every level of a factor with a baseline against that baseline, all other factors equal, paired by seed and fold.

    Rows: factor, level, against, cell, those of `statistics.paired`, the differences as values, better and worse
    (pairs), and `adjusted`, Holm's p-value over all rows of the metric.
    """
    rows = []
    for factor, against in results.baseline.items():
        for level, base in itertools.product(results.factors[factor], results.cells_where({factor: against})):
            cell = results.with_level(base, factor, level)
            if level == against or cell not in results.grid:
                continue
            row = {"factor": factor, "level": level, "against": against, "cell": cell}
            a, b = results.scores(cell, metric), results.scores(base, metric)
            pairs = np.reshape([(a[unit], b[unit]) for unit in a if unit in b], (-1, 2)).T
            row |= statistics.paired(*pairs, test_share=results.test_share)
            row |= statistics.within(row, *tasks.span(metric))
            row["values"] = np.subtract(*pairs).tolist()
            row["better"], row["worse"] = (row["wins"], row["losses"])[:: tasks.direction(metric)]
            rows.append(row)
    for row, adjusted in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        row["adjusted"] = adjusted
    return rows


def reading(results: Results, metric: str, rows: list[dict[str, Any]]) -> list[str]:
    """The comparisons of one metric in words, a sentence for each level."""
    if not any(results.scores(cell, metric) for cell in results.grid):
        known = sorted({name for run in results.runs() for name in run.scores})
        has = f" (the finished ones have {', '.join(known)})" if known else ""
        return [f"No run has a value of {metric}{has}, so nothing can be said."]
    if not results.baseline:
        return ["The study names no baseline level, so its cells are shown side by side and not compared."]
    if len(results.factors) > 1:
        groups = itertools.groupby(rows, operator.itemgetter("factor", "level"))
        return [_read_several(results, metric, list(group)) for _, group in groups]
    return [_read_one(results, metric, row) for row in rows]


def _read_one(results: Results, metric: str, row: dict[str, Any]) -> str:
    a, b, n = row["level"], row["against"], row["n"]
    units = results.noun(n)
    if n == 0:
        return f"{a} cannot be compared with {b}: there is no {results.noun(1)} that both have finished."
    told = f"{a} minus {b} is {row['mean']:+.4f} in {metric}"
    if n == 1:
        return f"{told} with the only {units} that both have: no test from one."
    if row["adjusted"] is None:
        return f"{told}; no test: {row['why']}."
    span = f"{row['mean']:+.4f} on average, 95 % interval {row['low']:+.4f} to {row['high']:+.4f}"
    span += f", adjusted {p_equals(row['adjusted'])}"
    if row["adjusted"] >= ALPHA:
        return f"No difference in {metric} can be seen between {a} and {b} ({span}){_few(results, [n])}."
    side, share = _direction(metric, row["mean"]), max(row["wins"], row["losses"])
    few = f"; this rests on {n} {units} alone" if n < FEW else ""
    return f"{a} has a {side} {metric} than {b} ({span}; {side} with {share} of {n} {units}){few}."


def _read_several(results: Results, metric: str, rows: list[dict[str, Any]]) -> str:
    factor, level, against = (rows[0][name] for name in ("factor", "level", "against"))
    kinds: dict[str, list[str]] = {}
    for row in rows:
        setting = results.title(row["cell"], without=[factor])
        if row["adjusted"] is None:
            kind = "no test is possible"
        elif row["adjusted"] >= ALPHA:
            kind = "no difference can be seen"
        else:
            kind = f"{metric} is {_direction(metric, row['mean'])}"
        kinds.setdefault(kind, []).append(setting if row["mean"] is None else f"{setting}: {row['mean']:+.4f}")
    told = "; ".join(
        f"{kind} in {len(names)} ({'; '.join(messages.shorten(names, LISTED))})" for kind, names in kinds.items()
    )
    few = _few(results, [row["n"] for row in rows if row["adjusted"] is not None])
    settings = "setting" if len(rows) == 1 else "settings"
    return f"{factor}={level} against {factor}={against}, in {len(rows)} {settings}: {told}{few}."


def _few(results: Results, counts: list[int]) -> str:
    if min(counts, default=FEW) >= FEW:
        return ""
    span = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return f"; with {span} {results.noun(max(counts))} only large differences can be seen"


def _direction(metric: str, mean: float) -> str:
    side, more = "higher" if mean > 0 else "lower", tasks.direction(metric)
    return side if more > 0 else f"{side} ({'better' if mean * more > 0 else 'worse'})"


def p_equals(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"


def effects(results: Results, metric: str) -> tuple[list[dict[str, Any]] | str, int]:
    """Main effects and interactions (or why there are none), over the units that every cell has; and how many."""
    cells = list(itertools.product(*results.factors.values()))
    scores = [results.scores(cell, metric) for cell in cells]
    units = [unit for unit in next(iter(results.grid.values()), {}) if all(unit in column for column in scores)]
    if not units:
        lacking = [results.title(cell) for cell, column in zip(cells, scores, strict=True) if not column]
        named = f"; without any value: {'; '.join(messages.shorten(lacking, LISTED))}" if lacking else ""
        return f"no {results.noun(1)} is complete in all {len(cells)} cells{named}", 0
    table = np.array([[column[unit] for unit in units] for column in scores])
    table = table.reshape(*map(len, results.factors.values()), len(units))
    return statistics.anova(table, list(results.factors), test_share=results.test_share), len(units)


def ranks(results: Results, factor: str, metric: str) -> dict[str, Any] | str:
    """Mean ranks of a factor's levels over blocks (a setting of the others, and a unit), or why there are none."""
    levels = list(results.factors[factor])
    if len(levels) < 3:
        return f"{factor} has {len(levels)} levels; ranks are compared from 3 on"
    blocks = []
    for first in results.cells_where({factor: levels[0]}):
        row = [results.scores(results.with_level(first, factor, level), metric) for level in levels]
        blocks += [[column[unit] for column in row] for unit in results.grid[first] if all(unit in c for c in row)]
    if len(blocks) < 5:
        return f"{factor}: {len(blocks)} complete blocks; ranks are compared from 5 on"
    return {"levels": levels, **statistics.friedman(tasks.direction(metric) * np.array(blocks))}


def costs(results: Results) -> list[dict[str, Any]]:
    """The mean cost of each cell over its finished runs, and its ratio to the cell of the baseline levels."""
    rows, means = [], {}
    for cell, units in results.grid.items():
        columns = {name: [run.cost.get(name) for run in units.values()] for name in COSTS}
        means[cell] = {name: statistics.mean_interval(column)["mean"] for name, column in columns.items()}
    for cell, own in means.items():
        base = tuple(results.baseline.get(factor, level) for factor, level in zip(results.factors, cell, strict=True))
        of_base = means.get(base, {}) if results.baseline else {}
        ratios = {f"{name}_ratio": own[name] / of_base[name] if of_base.get(name) and own[name] is not None else None
                  for name in COSTS}  # fmt: skip
        rows.append({"cell": cell, **own, **ratios})
    return rows


def mean_curve(results: Results, cell: Cell, column: str) -> dict | None:
    """A column of metrics.jsonl of a cell: mean and interval over the steps that all its runs have reached, or None."""
    curves = [read_curve(run, column) for run in results.grid.get(cell, {}).values()]
    if not (curves := [curve for curve in curves if len(curve)]):
        return None
    steps = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    steps = steps[(steps >= max(curve[0, 0] for curve in curves)) & (steps <= min(curve[-1, 0] for curve in curves))]
    points = zip(*(np.interp(steps, *curve.T) for curve in curves), strict=True)
    rows = [results.interval(values, column) for values in points]
    return {"x": steps, **{name: [row[name] for row in rows] for name in ("mean", "low", "high")}} if rows else None


def pooled(results: Results, outputs: Mapping[str, Outputs], factor: str, level: str) -> dict | None:
    keys = [run.key for cell in results.cells_where({factor: level}) for run in results.grid[cell].values()]
    found = [outputs[key] for key in keys if key in outputs]
    if not found:
        return None
    count, observed, expected = (sum(output[i] for output in found) for i in range(3))
    total = np.where(count, count, 1)
    return {"count": count, "observed": observed / total, "expected": expected / total}


def class_changes(
    results: Results, outputs: Mapping[str, Outputs], factor: str, level: str, against: str
) -> np.ndarray:
    """Recall of a level minus that of the baseline [units, classes], averaged over the settings that a unit has."""
    found: dict[Unit, list[np.ndarray]] = {}
    for base in results.cells_where({factor: against}):
        other = results.grid.get(results.with_level(base, factor, level), {})
        for unit, run in results.grid[base].items():
            if unit in other and run.key in outputs and other[unit].key in outputs:
                found.setdefault(unit, []).append(outputs[other[unit].key].recall - outputs[run.key].recall)
    return np.array([mean_defined(np.array(changes), axis=0) for changes in found.values()])
