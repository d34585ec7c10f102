"""The report of a study, from its files alone, whatever runs are finished: `python -m tl_jax report W`.

The same files give the same bytes; two executions of one study differ in the times of the table of costs and of the CSV
file alone.
"""

import csv
import io
import itertools
import json
import pathlib
import re
from typing import Any

from tl_jax import tasks
from tl_jax.core.files import write_text
from tl_jax.core.messages import shorten
from tl_jax.studies.report import alarm, analysis, figures, selection, tables
from tl_jax.studies.report.results import COSTS, Cell, Results, Unit, last_line, load
from tl_jax.studies.report.tables import Alarm, Block, Picture, Sections, Table, scaled

NONE = "-"
METHODS = {
    "interval": "An interval is Student's t of the mean over {units}, at 95 %, for each mean alone; of a metric with "
    "two ends, such as accuracy, on the scale of logits, so that it stays between them; one end cuts it.",
    "folds": "The folds of a design share training examples: intervals and tests use the corrected resampled variance "
    "(Nadeau and Bengio 2003) with n_test / n_train = {share:.3f}; the analysis of variance and the ranks do not.",
    "paired": "Differences are paired by seed and fold, which see the same data and the same initial head. p is the "
    "two-sided paired t-test, adjusted by Holm over all {count} comparisons of the metric; d_z is the mean difference "
    "over the standard deviation of the differences. Better and worse count pairs.",
    "anova": "Effects are a repeated-measures analysis of variance, each tested against its own interaction with the "
    "seed; p (GG) bears unequal variances (Greenhouse and Geisser 1959).",
    "scope": "Seeds and folds of one data set speak of other seeds and folds, not of other data.",
}  # fmt: skip


def write(workdir: pathlib.Path) -> dict[str, Any]:
    """Writes report.md, .csv, .tex, .html and figures/ into a study's workdir; returns what they say, without times."""
    workdir = pathlib.Path(workdir)
    results = load(workdir)
    numbers = {metric: analyse(results, metric) for metric in results.metrics}
    pictures, notes = figures.draw(results, numbers, workdir / "figures")
    panel, harm = select(results, workdir), harms(results)
    alarms = [line for row in harm for line in alarm.sentences(row["arm"], row["against"], row["sets"])]
    sections, for_latex = make_sections(results, numbers, pictures, notes, panel, alarms)
    title = results.name or "Study"
    images = {picture.name: (workdir / "figures" / f"{picture.name}.png").read_bytes() for picture in pictures}
    texts = {"md": tables.to_markdown(title, sections), "html": tables.to_html(title, sections, images)}
    for suffix, text in (texts | {"tex": tables.to_latex(for_latex), "csv": to_csv(results)}).items():
        readable = text.encode(errors="backslashreplace").decode()  # a class is a folder, whose name need not be UTF-8
        write_text(workdir / f"report.{suffix}", readable)
    if isinstance(panel, dict):
        write_text(workdir / "selection.csv", tables.to_csv(selection.table(panel)))
    metrics = {}
    for metric, found in numbers.items():
        cells = [
            {"levels": dict(zip(results.factors, cell, strict=True)), **found["means"][cell]} for cell in results.grid
        ]
        metrics[metric] = {"cells": cells, **{name: found[name] for name in ("differences", "effects", "ranks")}}
    return {
        "name": results.name,
        "runs": results.count_states(),
        "reading": numbers[results.metrics[0]]["reading"],
        "metrics": metrics,
        "selection": panel,
        "negative_transfer": harm,
        "alarms": alarms,
        "figures": [picture.name for picture in pictures],
    }


def select(results: Results, workdir: pathlib.Path) -> dict[str, Any] | str | None:
    """The selection panel over the candidates of all finished runs, seed by seed; see `selection.over_runs`."""
    units: dict[str, list[tuple[str, pathlib.Path]]] = {}
    for run in results.runs():
        if run.state == "done":
            units.setdefault(_units([run.unit]), []).append((results.title(run.cell), run.folder))
    try:
        return selection.over_runs(units, workdir)
    except ValueError as error:
        return f"There is no panel: {last_line(str(error), workdir)}"


def harms(results: Results) -> list[dict[str, Any]]:
    """Every cell against that of a baseline level, all else equal: {"arm", "against", "sets": `alarm.of_folders`}."""
    rows = []
    for factor, against in results.baseline.items():
        for base, level in itertools.product(results.cells_where({factor: against}), results.factors[factor]):
            arm = results.with_level(base, factor, level)
            units = [(run, results.grid[base].get(unit)) for unit, run in results.grid.get(arm, {}).items()]
            pairs = [(a.folder, b.folder) for a, b in units if b and a.state == b.state == "done"]
            if level != against and pairs:
                names = {"arm": results.title(arm), "against": results.title(base)}
                rows.append({**names, "sets": alarm.of_folders(pairs)})
    return rows


def analyse(results: Results, metric: str) -> dict[str, Any]:
    rows = analysis.differences(results, metric)
    effects, units = analysis.effects(results, metric) if len(results.factors) > 1 else ([], 0)
    return {
        "means": analysis.means(results, metric),
        "differences": rows,
        "reading": analysis.reading(results, metric, rows),
        "effects": effects,
        "effect_units": units,
        "ranks": {factor: analysis.ranks(results, factor, metric) for factor in results.factors},
    }


def make_sections(
    results: Results, numbers: dict, pictures: list[Picture], notes: list[str], panel: Any, alarms: list[str]
) -> tuple[Sections, dict[str, Table]]:
    """The report from top to bottom, and the tables that a paper would show."""

    def pictures_of(*kinds: str) -> list[Picture]:
        return [picture for kind in kinds for picture in pictures if picture.name.partition("-")[0] == kind]

    cells = {metric: _mean_table(results, metric, found["means"]) for metric, found in numbers.items()}
    rows = {metric: found["differences"] for metric, found in numbers.items() if found["differences"]}
    compared = {f"differences in {metric}": _difference_table(results, metric, rows[metric]) for metric in rows}
    cost = _cost_table(results)
    devices = sorted({run.device for run in results.runs() if run.device})
    mixed = "; runs of different devices cannot be compared in time" if len(devices) > 1 else ""
    measured = [f"Measured on {', '.join(devices)}{mixed}."] if devices else []
    chosen = {"selection": selection.table(panel)} if isinstance(panel, dict) else {}
    told = [panel] if isinstance(panel, str) else []
    question = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", results.question) if paragraph.strip()]
    sections = {
        "": question,
        "Answer": _answer(results, numbers),
        "Negative transfer": list(map(Alarm, alarms)),
        "Design": _design(results),
        "Failed and missing runs": _unfinished(results),
        "Results": [*cells.values(), *pictures_of("cells", "budget", "rates")],
        "Differences from the baseline": [*compared.values(), *pictures_of("differences", "classes")],
        "Selection without target labels": [*chosen.values(), *told],
        "Main effects and interactions": [*_effects(results, numbers), *pictures_of("interaction")],
        "Ranks": pictures_of("ranks"),
        "Cost": [*measured, cost, *pictures_of("parameters", "training")],
        "Learning and calibration": pictures_of("learning", "calibration"),
        "Figures left out": [notes] if notes else [],
        "Methods": [_methods(results, numbers)],
    }
    sections = {heading: blocks for heading, blocks in sections.items() if blocks}
    return sections, {**cells, **compared, **chosen, "cost": cost}


def _answer(results: Results, numbers: dict) -> list[Block]:
    counts = results.count_states()
    total = sum(counts.values())
    lines = [f"{total} runs planned: {', '.join(f'{count} {state}' for state, count in counts.items())}."]
    if counts["done"] < total:
        lines.append("Not all runs are finished: everything here is over those that are, n says how many.")
    if max(map(len, results.grid.values()), default=0) == 1:
        lines.append(f"One {results.noun(1)} in each cell: there are no intervals, and nothing can be tested.")
    return [numbers[results.metrics[0]]["reading"], *lines]


def _design(results: Results) -> list[Block]:
    rows = []
    for factor, levels in results.factors.items():
        for level, options in levels.items():
            changes = ", ".join(f"{option} = {json.dumps(value)}" for option, value in options.items())
            mark = " (baseline)" if results.baseline.get(factor) == level else ""
            rows.append((factor, f"{level}{mark}", changes or "as in the base config"))
    first, *others = map(results.named, results.metrics)
    lines = [
        f"metrics: {first} decides" + (f"; also {', '.join(others)}" if others else ""),
        f"seeds: {', '.join(map(str, results.seeds))}",
        f"design: {results.design}",
        f"baseline: {', '.join(map('='.join, results.baseline.items())) or 'none'}",
    ]
    sets: dict[str, set] = {}
    for name, text in (pair for run in results.runs() for pair in run.sets.items()):
        sets.setdefault(name, set()).add(text)
    lines += [f"{name} is {' or '.join(shorten(sorted(texts), 5))}" for name, texts in sets.items()]
    partial = {(run.weights[0], ", ".join(shorten(run.missing, 5))) for run in results.runs() if run.missing}
    lines += [f"partial weights: {file} lacks {parts}, which began at random" for file, parts in sorted(partial)]
    caption = f"The grid: {len(results.grid)} cells, every combination of these levels."
    return [Table(caption, ("factor", "level", "options"), rows, 3), lines]


def _unfinished(results: Results) -> list[Block]:
    gathered: dict[tuple, list] = {}
    for run in results.runs():
        if run.state != "done":
            gathered.setdefault((run.cell, run.word, run.error), []).append(run.unit)
    rows = [(results.title(cell), word, _units(units), error or NONE)
            for (cell, word, error), units in gathered.items()]  # fmt: skip
    caption = "Runs without a result, with the last line of their error."
    return [Table(caption, ("cell", "state", "runs", "error"), rows, 4)] if rows else []


def _units(units: list[Unit]) -> str:
    folds: dict[int, list[str]] = {}
    for seed, fold in units:
        folds.setdefault(seed, []).extend([fold] if fold else [])
    if not any(folds.values()):
        return f"{'seed' if len(units) == 1 else 'seeds'} {', '.join(map(str, folds))}"
    return "; ".join(f"seed {seed}: {', '.join(names)}" for seed, names in folds.items())


def _mean_table(results: Results, metric: str, means: dict) -> Table:
    units, factors = results.noun(), list(results.factors)
    caption = f"{results.named(metric)}: mean over {units} [95 % interval]"
    if any(mean["n"] < mean["planned"] for mean in means.values()):
        caption += f"; n where fewer than the planned {units} have a value"
    shown = {cell: _mean_cell(results, cell, mean) for cell, mean in means.items()}
    if len(factors) != 2:
        return Table(f"{caption}.", (*factors, metric), [(*cell, text) for cell, text in shown.items()], len(factors))
    levels = [list(results.factors[factor]) for factor in factors]
    across = 1 if len(levels[1]) <= max(5, len(levels[0])) else 0
    rows = [(down, *(shown.get((down, level) if across else (level, down), NONE) for level in levels[across]))
            for down in levels[1 - across]]  # fmt: skip
    return Table(f"{caption}.", (f"{factors[1 - across]} \\ {factors[across]}", *levels[across]), rows)


def _mean_cell(results: Results, cell: Cell, mean: dict) -> str:
    if mean["n"] == 0:
        states = dict.fromkeys(run.word for run in results.grid[cell].values())
        return ", ".join("no value" if state == "done" else state for state in states)
    form = ".4f" if abs(mean["mean"]) < 1e4 else ".4g"
    text = format(mean["mean"], form)
    text += "" if mean["low"] is None else f" [{mean['low']:{form}}, {mean['high']:{form}}]"
    return text if mean["n"] == mean["planned"] else f"{text} (n = {mean['n']} of {mean['planned']})"


def _difference_table(results: Results, metric: str, rows: list[dict]) -> Table:
    effect, counts = ("p", "p (Holm)", "d_z"), ("better", "worse", "equal", "n")
    headers, lines = ("cell", "against", "difference", "95 % interval", *effect, *counts), []
    for row in rows:
        span = NONE if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        lines.append((
            results.title(row["cell"]), row["against"], text_of(row["mean"], "+.4f"), span, p_value(row["p"]),
            p_value(row["adjusted"]), text_of(row["effect"], "+.2f"),
            *(str(row[name]) for name in ("better", "worse", "ties", "n")),
        ))  # fmt: skip
    side = "" if tasks.direction(metric) > 0 else ", less is better"
    caption = f"{results.named(metric)}{side}: cell minus the baseline level, other factors equal."
    return Table(caption, headers, lines, 2)


def _effects(results: Results, numbers: dict) -> list[Block]:
    if len(results.factors) == 1:
        return []
    blocks: list[Block] = []
    headers = ("effect", "sum of squares", "df", "F", "p", "p (GG)", "eta squared")
    planned = max(map(len, results.grid.values()), default=0)
    for metric, found in numbers.items():
        if isinstance(found["effects"], str):
            blocks.append(f"{metric}: not computed, because {found['effects']}.")
            continue
        rows = []
        for row in found["effects"]:
            numbers_of = (*(text_of(row[name]) for name in ("ss", "df", "F")), p_value(row["p"]), p_value(row["p_gg"]))
            rows.append((" x ".join(row["effect"]), *numbers_of, text_of(row["eta2"])))
        used = found["effect_units"]
        over = f"over {used} {results.noun(used)}"
        over += f" of {planned}: those that every cell has" if used < planned else ""
        blocks.append(Table(f"{metric}: main effects and interactions of two factors, {over}.", headers, rows))
    return blocks


def _cost_table(results: Results) -> Table:
    headers = ["cell", "trainable parameters", "FLOPs a step", "FLOPs", "peak memory", "training time", "wall time"]
    caption, rows = "Means over the finished runs", []
    if results.baseline:
        headers += [
            "parameters ratio",
            "ratio a step",
            "FLOPs ratio",
            "memory ratio",
            "training time ratio",
            "wall time ratio",
        ]
        caption += "; ratios to the cell of the baseline levels"
    for row in analysis.costs(results):
        cells = [text_of(row["trainable_parameters"], ",.0f"), scaled(row["flops_per_step"], 1000)]
        cells += [scaled(row["flops"], 1000)]
        cells += [scaled(row["memory_bytes"], 1024, "B")]
        cells += [text_of(row[name], ".4g", " s") for name in ("seconds", "wall_seconds")]
        ratios = [text_of(row[f"{name}_ratio"], ".3g") for name in COSTS] if results.baseline else []
        rows.append((results.title(row["cell"]), *cells, *ratios))
    return Table(f"{caption}.", headers, rows)


def _methods(results: Results, numbers: dict) -> list[str]:
    share, count = results.test_share, len(numbers[results.metrics[0]]["differences"])
    told = {"interval": True, "folds": share, "paired": count, "anova": len(results.factors) > 1, "scope": True}
    facts = {"units": results.noun(), "share": share, "count": count}
    return [METHODS[name].format_map(facts) for name, applies in told.items() if applies]


def text_of(value: float | None, form: str = ".4g", unit: str = "") -> str:
    return NONE if value is None else format(value, form) + unit


def p_value(p: float | None) -> str:
    return NONE if p is None else analysis.p_equals(p).removeprefix("p ").removeprefix("= ")


def to_csv(results: Results) -> str:
    """One row per planned run, with unrounded numbers; an empty field is a number that does not exist."""
    others = sorted({name for run in results.runs() for name in run.scores})
    metrics = list(dict.fromkeys([*results.metrics, *others]))
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["key", *results.factors, "seed", "fold", "state", "error", *metrics, *COSTS])
    for run in results.runs():
        values = [*map(run.scores.get, metrics), *map(run.cost.get, COSTS)]
        rows.writerow([run.key, *run.cell, *run.unit, run.state, run.error, *values])
    return file.getvalue()
