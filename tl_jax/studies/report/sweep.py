"""A sweep of replicas: their table, best first, and the figure of the score against the rate."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tl_jax import tasks
from tl_jax.core.console import Table
from tl_jax.studies.report.statistics import mean_interval

PANELS = 12
BASE = "base"  # what a replica does not set

Rows = Sequence[Mapping[str, Any]]


def ordered(task: str, rows: Rows) -> list[Mapping[str, Any]]:
    """Rows of replicas.json, the one that val prefers first, those without val or that diverged last."""
    scored = [row for row in rows if row["val"]]
    scored.sort(key=lambda row: tasks.preference(tasks.METRICS[task].monitor, row["val"]), reverse=True)
    return [*scored, *(row for row in rows if not row["val"])]


def table(task: str, rows: Rows) -> Table:
    first, *others = (name for name, _ in tasks.METRICS[task].monitor)
    options, lines = _options(rows), []
    for row in ordered(task, rows):
        val = row["val"] or {}
        interval = f"{val['low']:.4f} .. {val['high']:.4f}" if "low" in val else "-"
        value, *more = (f"{val[name]:.4f}" if val.get(name) is not None else "-" for name in (first, *others))
        own = (_text(row["options"].get(name, BASE)) for name in options)
        number = row["name"].partition("-")[0]
        lines.append((number, *own, "diverged" if row["error"] else value, interval, *more, str(row["step"] or "-")))
    short = [name.rpartition(".")[2] for name in options]
    headers = ("replica", *short, f"val {first}", "95 % interval", *(f"val {name}" for name in others), "step")
    order = "the best by val first" if any(row["val"] for row in rows) else "none is best, as there is no val"
    return Table(f"{len(rows)} replicas, {order}", headers, lines, 1 + len(options))


def draw(task: str, rows: Rows, folder: pathlib.Path) -> None:
    """replicas.png and .svg: the monitored metric on val against the learning rate, where replicas differ in it.

    Without rates against another number that they differ in. A line for each value of a further option, a panel for
    each of the others; over seeds the mean and its interval. The best is circled.
    """
    from tl_jax.studies.report import charts  # here, as matplotlib takes its time

    metric, scored = tasks.METRICS[task].monitor[0][0], [row for row in rows if row["val"]]
    along = next((name for name in _options(scored) if _is_number(scored, name)), "")
    others = [name for name in _options(scored) if name not in (along, "seed")]
    few = [name for name in others if len(_levels(scored, name)) <= charts.LINES]
    lines, panels = few[0] if few else "", [name for name in others if name not in few[:1]]
    every = list(itertools.product(*(_levels(scored, name) for name in panels)))
    if not along or len(every) > PANELS:
        return
    order, made = _levels(scored, lines) if lines else [""], {}
    for panel, level in itertools.product(every, order):
        fixed = dict(zip(panels, panel, strict=True)) | ({lines: level} if lines else {})
        own = [row for row in scored if all(_text(row["options"].get(name, BASE)) == x for name, x in fixed.items())]
        if own:
            title = ", ".join(f"{name}={x}" for name, x in zip(panels, panel, strict=True))
            made.setdefault(title, {})[level] = _line(own, along, metric, ordered(task, rows)[0])
    values = [row["options"][along] for row in scored]
    ticks = charts.rate_ticks(values) if min(values) > 0 else None
    for suffix in ("png", "svg"):
        charts.lines(
            folder / f"replicas.{suffix}", made, {"lr": "learning rate"}.get(along, along), f"val {metric}",
            order=order, legend=lines, log=bool(ticks), ticks=ticks,
        )  # fmt: skip


def _line(rows: Rows, along: str, metric: str, best: Mapping[str, Any]) -> dict[str, Any]:
    points: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["options"][along]):
        points.setdefault(row["options"][along], []).append(row["val"][metric])
    found = [mean_interval(values, bounds=tasks.bounds(metric)) for values in points.values()]
    line = {"x": list(points), **{name: [each[name] for each in found] for name in ("mean", "low", "high")}}
    if best in rows:
        place = list(points).index(best["options"][along])
        line["circle"] = (line["x"][place], line["mean"][place])
    return line


def _options(rows: Rows) -> list[str]:
    """The options in which replicas differ, learning rates first."""
    names = dict.fromkeys(name for row in rows for name in row["options"])
    return sorted((name for name in names if len(_levels(rows, name)) > 1), key=lambda name: name != "lr")


def _levels(rows: Rows, name: str) -> list[str]:
    return list(dict.fromkeys(_text(row["options"].get(name, BASE)) for row in rows))


def _is_number(rows: Rows, name: str) -> bool:
    return name != "seed" and all(isinstance(row["options"].get(name), int | float) for row in rows)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
