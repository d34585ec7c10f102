"""The figures of a study: a maker yields (name, caption, path -> points), or a sentence that says why there is none.

It takes the results, {metric: what report.analyse found} and {key of a run: its reduced predictions}.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from tl_jax import tasks
from tl_jax.studies.report import analysis, charts, statistics
from tl_jax.studies.report import results as read
from tl_jax.studies.report.results import Cell, Results
from tl_jax.studies.report.tables import Picture
from tl_jax.tasks.intervals import mean_defined

PANELS = 12
Numbers, Outputs = Mapping[str, Any], Mapping[str, read.Outputs]
Figure = tuple[str, str, Callable[[pathlib.Path], charts.Places]]
Made = Iterator[Figure | str]


def draw(results: Results, numbers: Numbers, folder: pathlib.Path) -> tuple[list[Picture], list[str]]:
    """Writes every figure that the results allow as PNG and SVG; returns them, and sentences on those left out."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs, notes = read.read_outputs(results)
    pictures = []
    for made in itertools.chain.from_iterable(maker(results, numbers, outputs) for maker in MAKERS):
        if isinstance(made, str):
            notes.append(made)
            continue
        name, caption, draw_into = made
        draw_into(folder / f"{name}.svg")
        pictures.append(Picture(name, caption, draw_into(folder / f"{name}.png")))
    return pictures, notes


def cells(results: Results, numbers: Numbers, outputs: Outputs) -> Made:
    for metric in results.metrics:
        if any(mean["n"] for mean in numbers[metric]["means"].values()):
            name = "cells" if metric == results.metrics[0] else f"cells-{_file(metric)}"
            yield _cell_dots(results, name, metric, numbers[metric]["differences"])
        else:
            yield f"{metric} per cell: no run has a value of it"


def _cell_dots(results: Results, name: str, metric: str, compared: list[dict] = ()) -> Figure:
    """A factor's levels as colours and settings of the others as rows; without such a factor, a row for each cell.

    In a study of one factor the paired differences from its baseline, `compared`, stand beside the cells.
    """
    factor, units = _colour_factor(results), results.noun()
    series = {level: results.cells_where({factor: level}) for level in results.factors.get(factor, ())}
    series = series or {"": list(results.grid)}
    rows = [results.title(cell, without=[factor]) for cell in next(iter(series.values()))]
    marks = {line: [_cell_mark(results, cell, metric) for cell in column] for line, column in series.items()}
    shown = results.named(metric)
    caption = f"{shown} of each cell: mean and 95 % interval over {units}; small dots are single {units}."
    style = {"order": list(results.factors.get(factor, ())), "legend": factor, "label": f"{shown}, 95 % interval"}
    if len(results.factors) == 1 and any(row["n"] for row in compared):
        found, base = {row["cell"]: _difference_mark(row) for row in compared}, {"mean": None, "text": "the baseline"}
        label = f"difference from {compared[0]['against']}, paired, 95 % interval"
        style["paired"] = [found.get(cell, base) for cell in results.grid], label
        caption += f" Beside them the paired difference from the baseline, filled where p (Holm) < {analysis.ALPHA}."
    return name, caption, partial(charts.dots, rows=rows, series=marks, **style)


def _cell_mark(results: Results, cell: Cell, metric: str) -> dict:
    values, planned = list(results.scores(cell, metric).values()), results.grid.get(cell, {})
    states = dict.fromkeys(run.word for run in planned.values() if run.state != "done")
    few = f"  n = {len(values)}" if len(values) < len(planned) else ""
    text = few if values else ", ".join(states) or "no value"
    return {**results.interval(values, metric), "values": values, "text": text}


def _difference_mark(row: dict) -> dict:
    sure = row["adjusted"] is not None and row["adjusted"] < analysis.ALPHA
    return {**row, "sure": sure, "text": "" if row["n"] else "no pair"}


def differences(results: Results, numbers: Numbers, outputs: Outputs) -> Made:
    metric = results.metrics[0]
    shown = results.named(metric)
    for factor, against in results.baseline.items():
        rows = [row for row in numbers[metric]["differences"] if row["factor"] == factor]
        if not any(row["n"] for row in rows):
            yield f"differences from {factor}={against}: no level has a {results.noun(1)} in common with it"
            continue
        levels = list(dict.fromkeys(row["level"] for row in rows))
        coloured = len(results.factors) > 1 and len(levels) <= charts.LINES
        names = [results.title(row["cell"], without=[factor] if coloured else ()) for row in rows]
        series: dict[str, list[dict]] = {}
        for row in rows:
            series.setdefault(row["level"] if coloured else "", []).append(_difference_mark(row))
        caption = f"Difference in {shown} from {factor}={against}, other factors equal, paired: mean and 95 % interval"
        caption += f" (of each alone); filled where p (Holm) < {analysis.ALPHA}."
        label = f"difference in {shown}, 95 % interval"
        style = {"order": list(results.factors[factor]), "legend": factor, "reference": 0, "label": label}
        name = "differences" if len(results.baseline) == 1 else f"differences-{_file(factor)}"
        yield name, caption, partial(charts.dots, rows=list(dict.fromkeys(names)), series=series, **style)


def budget(results: Results, numbers: Numbers, outputs: Outputs) -> Made:
    """Score against the number of shots, where a factor sets it."""
    words = "the number of training examples per class", "examples per class"
    return _along(results, "budget", "data.shots", *words)


def rates(results: Results, numbers: Numbers, outputs: Outputs) -> Made:
    """Score against the learning rate, where a factor sets it."""
    return _along(results, "rates", "lr", "the learning rate", "learning rate")


def _along(results: Results, name: str, option: str, words: str, x_label: str) -> Made:
    metric = results.metrics[0]
    for factor, levels in results.factors.items():
        set_to = {level: options.get(option) for level, options in levels.items()}
        values = set(set_to.values())
        if len(values) < 2 or None in values or (option == "lr" and min(values) <= 0):
            continue
        place = {level: x or max(set_to.values()) * 3 for level, x in set_to.items()}  # 0 shots: all examples
        ticks = [(place[level], f"{x:g}" if x else "all") for level, x in set_to.items()]
        ticks = charts.rate_ticks(list(place.values())) if option == "lr" else ticks
        panels = _panels(results, factor, partial(_means_along, results, metric, factor, place))
        if isinstance(panels, str) or not panels:
            yield f"{metric} against {factor}: {panels or 'no run has a value'}"
            continue
        shown = results.named(metric)
        caption = f"{shown} against {words}; bands are 95 % intervals."
        style = {"x_label": x_label, "log": True, "ticks": ticks}
        yield _line_figure(name, caption, results, panels, _line_factor(results, factor), shown, **style)
        return  # a second factor that sets it would overrule the first


def _line_figure(name: str, caption: str, results: Results, panels: dict, factor: str, label: str, **style) -> Figure:
    order = list(results.factors.get(factor, [""]))
    return name, caption, partial(charts.lines, panels=panels, y_label=label, order=order, legend=factor, **style)


def _line_factor(results: Results, along: str) -> str:
    """The factor that lines stand for: one that can have colours, if any is left."""
    others = [factor for factor in [*results.baseline, *results.factors] if factor != along]
    return next(iter([*_with_colours(results, others), *others]), "")


def _colour_factor(results: Results) -> str:
    """The factor whose levels have colours: one with a baseline before the others; "" in a study of one factor."""
    fit = _with_colours(results, [*results.baseline, *results.factors])
    return fit[0] if fit and len(results.factors) > 1 else ""


def _with_colours(results: Results, factors: list[str]) -> list[str]:
    return [factor for factor in factors if 2 <= len(results.factors[factor]) <= charts.LINES]


def _panels(results: Results, along: str, make_line: Callable[[list[Cell]], dict | None]) -> dict | str:
    """{title: {name: line}}, lines over the levels of `along` ("": a line per cell), or why there is none."""
    of_lines = _line_factor(results, along)
    of_panels = [factor for factor in results.factors if factor not in (along, of_lines)]
    lines = list(results.factors.get(of_lines, [""]))
    panels = list(itertools.product(*map(results.factors.get, of_panels)))
    if len(lines) > charts.LINES or len(panels) > PANELS:
        return f"{len(lines)} lines in {len(panels)} panels would be too many to read"
    made: dict[str, dict] = {}
    for panel, name in itertools.product(panels, lines):
        fixed = dict(zip(of_panels, panel, strict=True))
        if line := make_line(results.cells_where(fixed | ({of_lines: name} if of_lines else {}))):
            made.setdefault(", ".join(map("=".join, fixed.items())), {})[name] = line
    return made


def _means_along(results: Results, metric: str, along: str, place: Mapping, cells: list[Cell]) -> dict | None:
    points = []
    for cell in sorted(cells, key=lambda cell: place[results.level(cell, along)]):
        mean = results.interval(results.scores(cell, metric).values(), metric)
        if mean["n"]:
            points.append({**mean, "x": place[results.level(cell, along)]})
    return {name: [point[name] for point in points] for name in ("x", "mean", "low", "high")} if points else None


def costs(results: Results, numbers: Numbers, outputs: Outputs) -> Made:
    """The score against what its training costs, a figure for each cost that is the same on every machine."""
    metric, factor, rows = results.metrics[0], _colour_factor(results), analysis.costs(results)
    others = [other for other in results.factors if other != factor]
    for name, column, x_label in (("parameters", "trainable_parameters", "trainable parameters"),
                                  ("training", "flops", "FLOPs of the training")):  # fmt: skip
        points = []
        for row in rows:
            mean, x = numbers[metric]["means"][row["cell"]], row[column]
            if mean["n"] and x is not None:
                cell, group = row["cell"], results.level(row["cell"], factor) if factor else ""
                title = results.title(cell, [factor]) if len(others) > 1 else results.level(cell, others[0])
                points.append({**mean, "x": x, "name": title, "group": group})
        if len({point["x"] for point in points}) < 2:
            continue
        scores = [tasks.direction(metric) * point["mean"] for point in points]
        best = statistics.pareto([point["x"] for point in points], scores)
        shown = results.named(metric)
        caption = f"{shown} against {x_label}; no other cell has both fewer and a better mean than the front's."
        style = {"labels": (x_label, shown), "order": list(results.factors.get(factor, [""])), "legend": factor}
        yield name, caption, partial(charts.pareto, points=points, best=best, **style)


def interaction(results: Results, numbers: Numbers, outputs: Outputs) -> Made:
    """The means of two factors as lines: parallel where the factors do not interact."""
    metric = results.metrics[0]
    if len(results.factors) != 2:
        return
    shots = {name for name, levels in results.factors.items() if any("data.shots" in o for o in levels.values())}
    order = sorted(results.factors, key=lambda name: name not in shots)  # shots have their own axis in `budget`
    if not (fit := [name for name in order if len(results.factors[name]) <= charts.LINES]):
        yield f"interaction of {order[1]} and {order[0]}: too many levels to read"
        return
    lines, (along,) = fit[0], {*order} - {fit[0]}
    place = {level: i for i, level in enumerate(results.factors[along])}
    panel = {}
    for level in results.factors[lines]:
        if line := _means_along(results, metric, along, place, results.cells_where({lines: level})):
            panel[level] = line
    if panel:
        shown = results.named(metric)
        caption = f"Interaction of {along} and {lines} in {shown}: mean and 95 % interval; parallel lines mean none."
        style = {"x_label": along, "ticks": [(x, level) for level, x in place.items()], "bars": True}
        yield _line_figure("interaction", caption, results, {"": panel}, lines, shown, **style)


def ranks(results: Results, numbers: Numbers, outputs: Outputs) -> Made:
    metric = results.metrics[0]
    for factor, found in numbers[metric]["ranks"].items():
        if isinstance(found, str):
            if len(results.factors[factor]) > 2:
                yield f"mean ranks of {found}"
            continue
        mean_ranks, distance = found["ranks"], found["critical_difference"]
        caption = (
            f"Mean ranks of {factor} in {results.named(metric)} over {found['n']} blocks (a setting of the other "
            f"factors and a {results.noun(1)}; 1 is best): bars join levels that Nemenyi's test does not tell apart. "
            f"Friedman's {analysis.p_equals(found['p'])}. Blocks of one data set are not independent: read it as a "
            "description."
        )
        names = found["levels"] if len(results.factors) == 1 else [f"{factor}={level}" for level in found["levels"]]
        style = {"distance": distance, "groups": statistics.groups_not_different(mean_ranks, distance)}
        yield f"ranks-{_file(factor)}", caption, partial(charts.ranks, names=names, mean_ranks=mean_ranks, **style)


def learning(results: Results, numbers: Numbers, outputs: Outputs) -> Made:
    """The metric that selects against the step, mean over units on the steps that all of a cell's runs have reached."""
    column = read.curve_column(results)
    panels = _panels(results, "", lambda cells: analysis.mean_curve(results, cells[0], column) if cells else None)
    if isinstance(panels, str):
        yield f"learning curves: {panels}"
    elif panels:
        caption = f"{column} while training: mean over {results.noun()}, bands are 95 % intervals."
        yield _line_figure("learning", caption, results, panels, _line_factor(results, ""), column, x_label="step")
    elif results.count_states()["done"]:
        yield f"learning curves: no finished run has {column} in its metrics.jsonl"


def calibration(results: Results, numbers: Numbers, outputs: Outputs) -> Made:
    """Reliability lines of a factor's levels, pooled over all else, and the calibration error of each cell."""
    error = "/".join(filter(None, [results.decides, tasks.CALIBRATION]))
    if not outputs:
        if results.count_states()["done"]:
            file = read.predictions_file(results)
            yield f"reliability and changes per class: no finished run has a {file} of classes"
        return
    factor = _colour_factor(results) or next(iter(results.factors))
    levels = list(results.factors[factor])
    if len(levels) > charts.LINES:
        yield f"reliability: {factor} has {len(levels)} levels, too many lines to read"
    else:
        found = {level: analysis.pooled(results, outputs, factor, level) for level in levels}
        lines, (observed, expected) = {x: bins for x, bins in found.items() if bins}, next(iter(outputs.values())).axes
        axes = f"{observed} on {results.where}", expected
        also = " and all other factors" if len(results.factors) > 1 else ""
        caption = f"Reliability of each {factor}: {' by '.join(axes)}, pooled over {results.noun()}{also}."
        yield "calibration", caption, partial(charts.reliability, series=lines, axes=axes, order=levels, legend=factor)
    if error not in results.metrics and any(results.scores(cell, error) for cell in results.grid):
        yield _cell_dots(results, f"calibration-{_file(error)}", error)


def classes(results: Results, numbers: Numbers, outputs: Outputs) -> Made:
    """How the recall of each class changes against the baseline, averaged over the settings of the other factors."""
    if not results.baseline or not outputs:
        return
    factor, against = next(iter(results.baseline.items()))
    levels = [level for level in results.factors[factor] if level != against][: charts.LINES]
    names, *others = {out.class_names for out in outputs.values()}
    if others:
        yield "changes per class: the runs have different classes"
        return
    changes = {level: analysis.class_changes(results, outputs, factor, level, against) for level in levels}
    changes = {level: change for level, change in changes.items() if len(change)}
    if not changes:
        yield f"changes per class: no run has its counterpart of {factor}={against}"
        return
    mean = np.nan_to_num(np.mean([mean_defined(change, axis=0) for change in changes.values()], axis=0))
    order = np.argsort(mean, kind="stable")
    order, cut = (order, "") if len(order) <= 24 else (np.r_[order[:12], order[-12:]], "; the 12 at either end")

    def mark(values):
        values = values[~np.isnan(values)].tolist()
        told = {"values": values, "text": "" if values else "no example"}
        return {**statistics.within(results.interval(values), -1, 1), **told}

    marks = {level: [mark(change[:, k]) for k in order] for level, change in changes.items()}
    change = f"recall on {results.where} from {factor}={against}"
    caption, label = f"Change of each class's {change}, paired, 95 % interval of each alone", f"difference in {change}"
    style = {"order": list(results.factors[factor]), "legend": factor, "reference": 0, "label": label}
    yield "classes", f"{caption}{cut}.", partial(charts.dots, rows=[names[k] for k in order], series=marks, **style)


def _file(name: str) -> str:
    return "".join(character if character.isalnum() or character in "._" else "-" for character in name)


MAKERS = (cells, budget, rates, differences, classes, interaction, ranks, costs, learning, calibration)
