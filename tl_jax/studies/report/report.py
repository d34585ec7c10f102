"""The report of a study, from its files alone: `python -m tl_jax report W`.

It can be written at any time, before, during and after the runs; the same files give the same bytes. Only the columns
"wall time" (report.md, .html, .tex) and "seconds" (report.csv) differ between two executions of one study.
"""

import csv
import io
import json
import pathlib
from typing import Any

from tl_jax import tasks
from tl_jax.core.files import write_text
from tl_jax.studies.report import analysis, figures, tables
from tl_jax.studies.report import results as read
from tl_jax.studies.report.results import Results
from tl_jax.studies.report.tables import Block, Heading, Items, Picture, Table, Text

NONE = "-"
METHODS = {
    "interval": "An interval is Student's t of the mean over {units}, at 95 %, for each mean alone; it may pass the "
    "ends of a scale.",
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
    results = read.load(workdir)
    numbers = {metric: analyse(results, metric) for metric in results.metrics}
    pictures, notes = figures.draw(results, numbers, workdir / "figures")
    blocks, for_latex = make_blocks(results, numbers, pictures, notes)
    title = results.name or "Study"
    images = {picture.name: (workdir / "figures" / f"{picture.name}.png").read_bytes() for picture in pictures}
    write_text(workdir / "report.md", tables.to_markdown(title, blocks))
    write_text(workdir / "report.html", tables.to_html(title, blocks, images))
    write_text(workdir / "report.tex", tables.to_latex(for_latex))
    write_text(workdir / "report.csv", to_csv(results))
    return {
        "name": results.name,
        "runs": read.count_states(results),
        "reading": numbers[results.metrics[0]]["reading"],
        "metrics": {
            metric: {
                "cells": [{**_levels(results, cell), **mean} for cell, mean in found["means"].items()],
                "differences": found["differences"],
                "effects": found["effects"],
                "ranks": found["ranks"],
            }
            for metric, found in numbers.items()
        },
        "figures": [picture.name for picture in pictures],
    }


def analyse(results: Results, metric: str) -> dict[str, Any]:
    """All statistics of one metric."""
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


def make_blocks(
    results: Results, numbers: dict, pictures: list[Picture], notes: list[str]
) -> tuple[list[Block], dict[str, Table]]:
    """The report from top to bottom, and those of its tables that a paper would show."""
    shown = {picture.name: picture for picture in pictures}
    cells = {f"{metric}": _mean_table(results, metric, found["means"]) for metric, found in numbers.items()}
    compared = {
        f"differences in {metric}": _difference_table(results, metric, found["differences"])
        for metric, found in numbers.items()
        if found["differences"]
    }
    cost = _cost_table(results)
    blocks: list[Block] = [Text(results.question)] if results.question.strip() else []
    blocks += [Heading("Answer"), *_answer(results, numbers)]
    blocks += [Heading("Design"), *_design(results)]
    if unfinished := _unfinished_table(results):
        blocks += [Heading("Failed and missing runs"), unfinished]
    blocks += [Heading("Results"), *cells.values(), *_pick(shown, "cells", "budget")]
    if results.baseline:
        blocks += [
            Heading("Differences from the baseline"),
            *compared.values(),
            *_pick(shown, "differences", "classes"),
        ]
    if len(results.factors) > 1:
        blocks += [Heading("Main effects and interactions"), *_effects(results, numbers), *_pick(shown, "interaction")]
    if ranked := _pick(shown, "ranks"):
        blocks += [Heading("Ranks"), *ranked]
    blocks += [Heading("Cost"), *_devices(results), cost, *_pick(shown, "parameters")]
    if curves := _pick(shown, "learning", "calibration"):
        blocks += [Heading("Learning and calibration"), *curves]
    if notes:
        blocks += [Heading("Figures left out"), Items(notes)]
    blocks += [Heading("Methods"), Items(_methods(results, numbers))]
    return blocks, {**cells, **compared, "cost": cost}


def _pick(shown: dict[str, Picture], *kinds: str) -> list[Picture]:
    return [picture for kind in kinds for name, picture in shown.items() if name.partition("-")[0] == kind]


def _answer(results: Results, numbers: dict) -> list[Block]:
    counts = read.count_states(results)
    total = sum(counts.values())
    runs = ", ".join(f"{count} {state}" for state, count in counts.items())
    blocks: list[Block] = [Items(numbers[results.metrics[0]]["reading"]), Text(f"{total} runs planned: {runs}.")]
    if counts["done"] < total:
        blocks.append(Text("Not all runs are finished: everything here is over those that are, n says how many."))
    planned = max((len(units) for units in results.grid.values()), default=0)
    if planned == 1:
        blocks.append(
            Text(f"One {read.unit_noun(results, 1)} in each cell: there are no intervals, and nothing can be tested.")
        )
    return blocks


def _design(results: Results) -> list[Block]:
    rows = []
    for factor, levels in results.factors.items():
        for level, options in levels.items():
            changes = ", ".join(f"{option} = {json.dumps(value)}" for option, value in options.items())
            mark = " (baseline)" if results.baseline.get(factor) == level else ""
            rows.append((factor, f"{level}{mark}", changes or "as in the base config"))
    first, *others = results.metrics
    lines = [
        f"metrics: {first} decides" + (f"; also {', '.join(others)}" if others else ""),
        f"seeds: {', '.join(map(str, results.seeds))}",
        f"design: {results.design}",
        "baseline: " + (", ".join(f"{f}={level}" for f, level in results.baseline.items()) or "none"),
    ]
    caption = f"The grid: {len(results.grid)} cells, every combination of these levels."
    return [Table(caption, ("factor", "level", "options"), rows, 3), Items(lines)]


def _unfinished_table(results: Results) -> Table | None:
    """Every run without a result, gathered by what became of it."""
    gathered: dict[tuple, list] = {}
    for run in read.runs(results):
        if run.state != "done":
            gathered.setdefault((run.cell, read.word_of(run), run.error), []).append(run.unit)
    rows = [
        (read.name_of(results, cell), state, _units(results, units), error or NONE)
        for (cell, state, error), units in gathered.items()
    ]
    if not rows:
        return None
    return Table(
        "Runs without a result, with the last line of their error.", ("cell", "state", "runs", "error"), rows, 4
    )


def _units(results: Results, units: list[read.Unit]) -> str:
    if not any(fold for _, fold in units):
        return ("seed " if len(units) == 1 else "seeds ") + ", ".join(str(seed) for seed, _ in units)
    folds: dict[int, list[str]] = {}
    for seed, fold in units:
        folds.setdefault(seed, []).append(fold)
    return "; ".join(f"seed {seed}: {', '.join(names)}" for seed, names in folds.items())


def _mean_table(results: Results, metric: str, means: dict) -> Table:
    """Two factors as a matrix, otherwise a list."""
    caption = f"{metric}: mean over {read.unit_noun(results)} [95 % interval]"
    if any(mean["n"] < mean["planned"] for mean in means.values()):
        caption += f"; n where fewer than the planned {read.unit_noun(results)} have a value"
    factors = list(results.factors)
    if len(factors) != 2:
        rows = [(*cell, _mean_cell(results, cell, mean)) for cell, mean in means.items()]
        return Table(f"{caption}.", (*factors, metric), rows, len(factors))
    levels = [list(results.factors[factor]) for factor in factors]
    across = 1 if len(levels[1]) <= max(5, len(levels[0])) else 0
    rows = []
    for down in levels[1 - across]:
        cells = [(down, level) if across else (level, down) for level in levels[across]]
        rows.append((down, *(_mean_cell(results, cell, means[cell]) if cell in means else NONE for cell in cells)))
    corner = f"{factors[1 - across]} \\ {factors[across]}"
    return Table(f"{caption}.", (corner, *levels[across]), rows)


def _mean_cell(results: Results, cell: read.Cell, mean: dict) -> str:
    if mean["n"] == 0:
        states = dict.fromkeys(read.word_of(run) for run in results.grid[cell].values())
        return ", ".join("no value" if state == "done" else state for state in states)
    text = number(mean["mean"])
    if mean["low"] is not None:
        text += f" [{number(mean['low'])}, {number(mean['high'])}]"
    return text if mean["n"] == mean["planned"] else f"{text} (n = {mean['n']} of {mean['planned']})"


def _difference_table(results: Results, metric: str, rows: list[dict]) -> Table:
    headers = (
        "cell",
        "against",
        "difference",
        "95 % interval",
        "p",
        "p (Holm)",
        "d_z",
        "better",
        "worse",
        "equal",
        "n",
    )
    lines = []
    for row in rows:
        span = NONE if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        lines.append((
            read.name_of(results, row["cell"]), row["against"], signed(row["mean"]), span, p_value(row["p"]),
            p_value(row["adjusted"]), NONE if row["effect"] is None else f"{row['effect']:+.2f}",
            *(str(row[name]) for name in ("better", "worse", "ties", "n")),
        ))  # fmt: skip
    side = "" if tasks.direction(metric) > 0 else ", less is better"
    return Table(f"{metric}{side}: cell minus the baseline level, other factors equal.", headers, lines, 2)


def _effects(results: Results, numbers: dict) -> list[Block]:
    blocks: list[Block] = []
    for metric, found in numbers.items():
        if isinstance(found["effects"], str):
            blocks.append(Text(f"{metric}: not computed, because {found['effects']}."))
            continue
        rows = [
            (" x ".join(row["effect"]), *(_plain(row[name]) for name in ("ss", "df", "F")), p_value(row["p"]),
             p_value(row["p_gg"]), _plain(row["eta2"]))
            for row in found["effects"]
        ]  # fmt: skip
        planned = max(len(units) for units in results.grid.values())
        used = found["effect_units"]
        over = f"over {used} {read.unit_noun(results, used)}" + (
            f" of {planned}: those that every cell has" if used < planned else ""
        )
        headers = ("effect", "sum of squares", "df", "F", "p", "p (GG)", "eta squared")
        blocks.append(Table(f"{metric}: main effects and interactions of two factors, {over}.", headers, rows))
    return blocks


def _devices(results: Results) -> list[Block]:
    devices = sorted({run.device for run in read.runs(results) if run.device})
    if not devices:
        return []
    mixed = "; runs of different devices cannot be compared in time" if len(devices) > 1 else ""
    return [Text(f"Measured on {', '.join(devices)}{mixed}.")]


def _cost_table(results: Results) -> Table:
    headers = ("cell", "trainable parameters", "FLOPs a step", "peak memory", "wall time")
    ratio = ("parameters ratio", "FLOPs ratio", "memory ratio", "wall time ratio") if results.baseline else ()
    rows = []
    for row in analysis.costs(results):
        parameters = row["trainable_parameters"]
        cells = [NONE if parameters is None else f"{parameters:,.0f}", scaled(row["flops_per_step"], 1000)]
        cells += [_suffixed(scaled(row["memory_bytes"], 1024), "B"), _suffixed(_plain(row["seconds"]), " s")]
        ratios = [_plain(row[f"{name}_ratio"], 3) for name in read.COSTS] if results.baseline else []
        rows.append((read.name_of(results, row["cell"]), *cells, *ratios))
    return Table("Means over the finished runs; ratios to the cell of the baseline levels." if ratio else
                 "Means over the finished runs.", (*headers, *ratio), rows)  # fmt: skip


def _methods(results: Results, numbers: dict) -> list[str]:
    share, count = read.test_share(results), len(numbers[results.metrics[0]]["differences"])
    lines = [METHODS["interval"].format(units=read.unit_noun(results))]
    lines += [METHODS["folds"].format(share=share)] if share else []
    lines += [METHODS["paired"].format(count=count)] if count else []
    lines += [METHODS["anova"]] if len(results.factors) > 1 else []
    return [*lines, METHODS["scope"]]


def number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.4f}"


def p_value(p: float | None) -> str:
    return NONE if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _plain(value: float | None, digits: int = 4) -> str:
    return NONE if value is None else f"{value:.{digits}g}"


def scaled(value: float | None, base: int) -> str:
    """Three digits and a prefix, k M G T for powers of 1000 and Ki Mi Gi Ti for powers of 1024."""
    if value is None:
        return NONE
    prefixes = ("", "k", "M", "G", "T", "P") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi")
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    digits = f"{value:.0f}" if power == 0 or value >= 100 else f"{value:.1f}"
    return f"{digits} {prefixes[power]}".strip()


def _suffixed(text: str, unit: str) -> str:
    if text == NONE:
        return text
    return f"{text}{unit}" if text[-1].isalpha() or unit.startswith(" ") else f"{text} {unit}"


def to_csv(results: Results) -> str:
    """One row per planned run, with unrounded numbers; an empty field is a number that does not exist."""
    further = dict.fromkeys(name for run in read.runs(results) for name in run.scores)
    metrics = list(dict.fromkeys([*results.metrics, *sorted(further)]))
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["key", *results.factors, "seed", "fold", "state", "error", *metrics, *read.COSTS])
    for run in read.runs(results):
        values = [*(run.scores.get(name) for name in metrics), *(run.cost.get(name) for name in read.COSTS)]
        rows.writerow([run.key, *run.cell, *run.unit, run.state, run.error, *values])
    return file.getvalue()


def _levels(results: Results, cell: read.Cell) -> dict[str, Any]:
    return {"levels": dict(zip(results.factors, cell, strict=True))}
