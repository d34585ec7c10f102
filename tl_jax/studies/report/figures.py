"""The figures of a study: what its results allow is drawn, and what a reader would miss is named.

A maker takes the results, the numbers of the report and the reduced predictions, and yields figures, or a sentence that
says why there is none.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tl_jax.studies.report import analysis, charts, statistics
from tl_jax.studies.report import results as read
from tl_jax.studies.report.results import Cell, Results
from tl_jax.studies.report.tables import Picture

PANELS = 12


class Figure(NamedTuple):
    name: str
    caption: str
    draw: Callable[[pathlib.Path], None]


class Material(NamedTuple):
    """numbers: {metric: what report.analyse found}. outputs: {key of a run: its reduced predictions}."""

    results: Results
    numbers: Mapping[str, Any]
    outputs: Mapping[str, read.Outputs]


def draw(results: Results, numbers: Mapping[str, Any], folder: pathlib.Path) -> tuple[list[Picture], list[str]]:
    """Writes every figure that the results allow as PNG and SVG; returns them, and sentences on those left out."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs, notes = read.read_outputs(results)
    pictures = []
    for maker in MAKERS:
        for made in maker(Material(results, numbers, outputs)):
            if isinstance(made, str):
                notes.append(made)
                continue
            for suffix in (".png", ".svg"):
                made.draw(folder / f"{made.name}{suffix}")
            pictures.append(Picture(made.name, made.caption))
    return pictures, notes


Made = Iterator[Figure | str]


def cells(material: Material) -> Made:
    """Each metric per cell, with its interval and its single values."""
    results = material.results
    for metric in results.metrics:
        if any(mean["n"] for mean in material.numbers[metric]["means"].values()):
            name = "cells" if metric == results.metrics[0] else f"cells-{_file(metric)}"
            yield _cell_dots(results, name, metric)
        else:
            yield f"{metric} per cell: no run has a value of it"


def _cell_dots(results: Results, name: str, metric: str) -> Figure:
    rows, series, colours = _rows_and_series(results)
    order = list(results.factors.get(colours, ()))
    marks = {line: [_mark(results, cell, metric) for cell in column] for line, column in series.items()}
    units = read.unit_noun(results)
    caption = f"{metric} of each cell: mean and 95 % interval over {units}; small dots are single {units}."
    label = f"{metric}, 95 % interval"
    return Figure(name, caption, lambda path: charts.dots(path, rows, marks, label, order=order, legend=colours))


def _rows_and_series(results: Results) -> tuple[list[str], dict[str, list[Cell]], str]:
    """A factor's levels as colours and settings of the others as rows; without such a factor, a row for each cell."""
    factor = _colour_factor(results)
    if factor is None:
        return [read.name_of(results, cell) for cell in results.grid], {"": list(results.grid)}, ""
    columns = {level: read.cells_where(results, {factor: level}) for level in results.factors[factor]}
    first = next(iter(columns.values()))
    return [read.name_of(results, cell, without=[factor]) for cell in first], columns, factor


def _mark(results: Results, cell: Cell, metric: str) -> dict:
    values = list(read.scores_of(results, cell, metric).values())
    planned = results.grid.get(cell, {})
    states = dict.fromkeys(read.word_of(run) for run in planned.values() if run.state != "done")
    few = f"  n = {len(values)}" if len(values) < len(planned) else ""
    text = few if values else ", ".join(states) or "no value"
    return {**read.interval(results, values), "values": values, "text": text}


def differences(material: Material) -> Made:
    """Paired differences from the baseline, a figure for each factor that has one."""
    results, metric = material.results, material.results.metrics[0]
    found = material.numbers[metric]["differences"]
    for factor, against in results.baseline.items():
        rows = [row for row in found if row["factor"] == factor]
        if not any(row["n"] for row in rows):
            yield f"differences from {factor}={against}: no level has a {read.unit_noun(results, 1)} in common with it"
            continue
        name = "differences" if len(results.baseline) == 1 else f"differences-{_file(factor)}"
        caption = (
            f"Difference in {metric} from {factor}={against}, other factors equal, paired: mean and 95 % interval (of "
            f"each alone); filled where p (Holm) < {analysis.ALPHA}."
        )
        yield Figure(name, caption, _draw_differences(results, metric, factor, rows))


def _draw_differences(results: Results, metric: str, factor: str, rows: list[dict]) -> Callable:
    levels = list(dict.fromkeys(row["level"] for row in rows))
    label = f"difference in {metric}, 95 % interval"

    def mark(row):
        a, b = (read.scores_of(results, row[name], metric) for name in ("cell", "base"))
        values = [a[unit] - b[unit] for unit in a if unit in b]
        sure = row["adjusted"] is not None and row["adjusted"] < analysis.ALPHA
        return {**row, "values": values, "sure": sure, "text": "" if values else "no pair"}

    if len(results.factors) == 1 or len(levels) > charts.LINES:
        names = [read.name_of(results, row["cell"]) for row in rows]
        series, legend = {"": [mark(row) for row in rows]}, ""
    else:
        settings = list(dict.fromkeys(read.name_of(results, row["cell"], without=[factor]) for row in rows))
        names, legend = settings, factor
        series = {level: [mark(row) for row in rows if row["level"] == level] for level in levels}
    order = list(results.factors[factor])
    return lambda path: charts.dots(path, names, series, label, order=order, legend=legend, reference=0)


def budget(material: Material) -> Made:
    """Score against the number of shots, where a factor sets it."""
    results, metric = material.results, material.results.metrics[0]
    for factor, levels in results.factors.items():
        shots = {level: options.get("data.shots") for level, options in levels.items()}
        if len(shots) < 2 or None in shots.values() or max(shots.values()) == 0:
            continue
        positive = sorted(count for count in set(shots.values()) if count)
        place = {level: count or positive[-1] * 3 for level, count in shots.items()}  # 0 shots are all the examples
        ticks = [(place[level], str(count or "all")) for level, count in shots.items()]
        panels = _panels(results, factor, lambda cells, place=place, factor=factor: _means_along(
            results, metric, cells, [place[read.level_of(results, cell, factor)] for cell in cells]
        ))  # fmt: skip
        if isinstance(panels, str) or not any(panels.values()):
            yield f"{metric} against {factor}: {panels if isinstance(panels, str) else 'no run has a value'}"
            continue
        caption = f"{metric} against the number of training examples per class; bands are 95 % intervals."
        lines = _line_factor(results, factor)
        style = {"along": "examples per class", "log": True, "ticks": ticks}
        yield Figure("budget", caption, _draw_lines(results, panels, lines, metric, **style))
        return  # a second factor of shots would overrule the first


def _draw_lines(results: Results, panels: dict, lines: str | None, label: str, *, along: str, log: bool = False,
                ticks: list | None = None, bars: bool = False) -> Callable:  # fmt: skip
    order = list(results.factors[lines]) if lines else [""]
    style = {"legend": lines or "", "log": log, "ticks": ticks, "bars": bars}
    return lambda path: charts.lines(path, panels, along, label, order=order, **style)


def _line_factor(results: Results, along: str) -> str | None:
    """The factor that lines stand for where the x axis is `along`: one that can have colours, if any is left."""
    others = [factor for factor in [*results.baseline, *results.factors] if factor != along]
    fit = [factor for factor in others if 2 <= len(results.factors[factor]) <= charts.LINES]
    return next(iter(fit or others), None)


def _panels(results: Results, along: str, make_line: Callable[[list[Cell]], dict | None]) -> dict | str:
    """{title: {name: line}}: a line runs over the levels of `along` ("" for a line per cell), or why there is none."""
    of_lines = _line_factor(results, along)
    of_panels = [factor for factor in results.factors if factor not in (along, of_lines)]
    lines, panels = list(results.factors.get(of_lines, [""])), read.combinations(results, of_panels)
    if len(lines) > charts.LINES or len(panels) > PANELS:
        return f"{len(lines)} lines in {len(panels)} panels would be too many to read"
    made: dict[str, dict] = {}
    for panel in panels:
        title = ", ".join(f"{factor}={level}" for factor, level in zip(of_panels, panel, strict=True))
        made[title] = {}
        for line in lines:
            fixed = dict(zip(of_panels, panel, strict=True)) | ({of_lines: line} if of_lines else {})
            if drawn := make_line(read.cells_where(results, fixed)):
                made[title][line] = drawn
    return {title: panel for title, panel in made.items() if panel}


def _means_along(results: Results, metric: str, cells: list[Cell], places: list[float]) -> dict | None:
    """The means of cells as a line, from left to right; None where no cell has a value."""
    points = []
    for x, cell in sorted(zip(places, cells, strict=True), key=lambda pair: pair[0]):
        mean = read.interval(results, read.scores_of(results, cell, metric).values())
        if mean["n"]:
            points.append((x, *(mean[name] for name in ("mean", "low", "high"))))
    return dict(zip(("x", "mean", "low", "high"), zip(*points, strict=True), strict=True)) if points else None


def parameters(material: Material) -> Made:
    """Score against trainable parameters, where these vary."""
    results, metric = material.results, material.results.metrics[0]
    groups = _colour_factor(results)
    points = []
    for row in analysis.costs(results):
        mean = material.numbers[metric]["means"][row["cell"]]
        if mean["n"] and row["trainable_parameters"] is not None:
            group = read.level_of(results, row["cell"], groups) if groups else ""
            name = read.name_of(results, row["cell"], without=[groups])
            points.append({**mean, "x": row["trainable_parameters"], "name": name, "group": group})
    if len({point["x"] for point in points}) < 2:
        return
    scores = [read.sign_of(metric) * point["mean"] for point in points]
    on_front = statistics.pareto([point["x"] for point in points], scores)
    caption = f"{metric} against trainable parameters; no other cell has both fewer and a better mean than the front's."
    order = list(results.factors[groups]) if groups else [""]
    yield Figure("parameters", caption, lambda path: charts.front(path, points, on_front, metric, order=order,
                                                                  legend=groups or ""))  # fmt: skip


def _colour_factor(results: Results) -> str | None:
    """The factor whose levels have colours: one with a baseline before the others; None in a study of one factor."""
    fit = [name for name in [*results.baseline, *results.factors] if 2 <= len(results.factors[name]) <= charts.LINES]
    return fit[0] if fit and len(results.factors) > 1 else None


def interaction(material: Material) -> Made:
    """The means of two factors as lines: parallel where the factors do not interact."""
    results, metric = material.results, material.results.metrics[0]
    if len(results.factors) != 2:
        return
    shots = {name for name, levels in results.factors.items() if any("data.shots" in o for o in levels.values())}
    lines, along = sorted(results.factors, key=lambda name: name not in shots)  # shots have their own axis in `budget`
    if len(results.factors[lines]) > charts.LINES:
        lines, along = along, lines
    levels = list(results.factors[along])
    if len(results.factors[lines]) > charts.LINES:
        yield f"interaction of {lines} and {along}: too many levels to read"
        return
    panel = {}
    for level in results.factors[lines]:
        cells = read.cells_where(results, {lines: level})
        places = [levels.index(read.level_of(results, cell, along)) for cell in cells]
        if line := _means_along(results, metric, cells, places):
            panel[level] = line
    if panel:
        caption = f"Interaction of {along} and {lines} in {metric}: mean and 95 % interval; parallel lines mean none."
        ticks = list(enumerate(levels))
        drawing = _draw_lines(results, {"": panel}, lines, metric, along=along, ticks=ticks, bars=True)
        yield Figure("interaction", caption, drawing)


def ranks(material: Material) -> Made:
    """A critical-difference diagram for each factor of three levels or more."""
    results, metric = material.results, material.results.metrics[0]
    for factor, found in material.numbers[metric]["ranks"].items():
        if isinstance(found, str):
            if len(results.factors[factor]) > 2:
                yield f"mean ranks of {found}"
            continue
        distance = found["critical_difference"]
        groups = statistics.groups_not_different(found["ranks"], distance)
        caption = (
            f"Mean ranks of {factor} in {metric} over {found['n']} blocks (a setting of the other factors and a "
            f"{read.unit_noun(results, 1)}; 1 is best): bars join levels that Nemenyi's test does not tell apart. "
            f"Friedman's {analysis.p_equals(found['p'])}. Blocks of one data set are not independent: read it as a "
            "description."
        )
        names = found["levels"] if len(results.factors) == 1 else [f"{factor}={level}" for level in found["levels"]]
        yield Figure(f"ranks-{_file(factor)}", caption, partial(
            charts.ranks, names=names, mean_ranks=found["ranks"], distance=distance, groups=groups
        ))  # fmt: skip


def learning(material: Material) -> Made:
    """Validation accuracy against the step, mean over units on the steps that all of a cell's runs have reached."""
    results = material.results
    panels = _panels(results, "", lambda cells: analysis.mean_curve(results, cells[0]) if cells else None)
    if isinstance(panels, str):
        yield f"learning curves: {panels}"
    elif not panels:
        if any(run.state == "done" for run in read.runs(results)):
            yield "learning curves: no finished run has val/accuracy in its metrics.jsonl"
    else:
        caption = f"val/accuracy while training: mean over {read.unit_noun(results)}, bands are 95 % intervals."
        lines = _line_factor(results, "")
        yield Figure("learning", caption, _draw_lines(results, panels, lines, "val/accuracy", along="step"))


def calibration(material: Material) -> Made:
    """Reliability lines of a factor's levels, pooled over all else, and the ECE of each cell."""
    results = material.results
    if not material.outputs:
        if any(run.state == "done" for run in read.runs(results)):
            yield "reliability and changes per class: no finished run has a predictions.npz"
        return
    factor = _colour_factor(results) or next(iter(results.factors))
    if len(results.factors[factor]) > charts.LINES:
        yield f"reliability: {factor} has {len(results.factors[factor])} levels, too many lines to read"
    else:
        lines = {level: analysis.pooled(results, material.outputs, factor, level) for level in results.factors[factor]}
        lines = {level: bins for level, bins in lines.items() if bins}
        also = " and all other factors" if len(results.factors) > 1 else ""
        caption = f"Reliability of each {factor}: accuracy by confidence, pooled over {read.unit_noun(results)}{also}."
        yield Figure(
            "calibration",
            caption,
            partial(charts.reliability, series=lines, order=list(results.factors[factor]), legend=factor),
        )
    if "ece" not in results.metrics and any(read.scores_of(results, cell, "ece") for cell in results.grid):
        yield _cell_dots(results, "calibration-ece", "ece")


def classes(material: Material) -> Made:
    """How the recall of each class changes against the baseline, averaged over the settings of the other factors."""
    results = material.results
    if not results.baseline or not material.outputs:
        return
    factor, against = next(iter(results.baseline.items()))
    levels = [level for level in results.factors[factor] if level != against][: charts.LINES]
    if len({out.class_names for out in material.outputs.values()}) > 1:
        yield "changes per class: the runs have different classes"
        return
    changes = {level: analysis.class_changes(results, material.outputs, factor, level, against) for level in levels}
    changes = {level: change for level, change in changes.items() if len(change)}
    if not changes:
        yield f"changes per class: no run has its counterpart of {factor}={against}"
        return
    names = next(iter(material.outputs.values())).class_names
    mean = np.nan_to_num(np.mean([analysis.column_means(change) for change in changes.values()], axis=0))
    order = np.argsort(mean, kind="stable")
    order, cut = (order, "") if len(order) <= 24 else (np.r_[order[:12], order[-12:]], "; the 12 at either end")
    marks = {level: [_class_mark(results, change[:, k]) for k in order] for level, change in changes.items()}
    caption = (
        f"Change of each class's recall against {factor}={against}, paired, with 95 % intervals of each alone{cut}."
    )
    label, rows = f"difference in recall from {factor}={against}", [names[k] for k in order]
    style = {"order": list(results.factors[factor]), "legend": factor, "reference": 0}
    yield Figure("classes", caption, lambda path: charts.dots(path, rows, marks, label, **style))


def _class_mark(results: Results, values: np.ndarray) -> dict:
    values = values[~np.isnan(values)].tolist()
    return {**read.interval(results, values), "values": values, "text": "" if values else "no example"}


def _file(name: str) -> str:
    return "".join(character if character.isalnum() or character in "._" else "-" for character in name)


MAKERS = (cells, budget, differences, classes, interaction, ranks, parameters, learning, calibration)
