"""Figures of a run and of a comparison; the suffix of the path picks .png or .svg."""

from collections.abc import Mapping

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax import tasks
from tl_jax.core.plotting import BLUE, GREY, VERMILION, figure_at, short
from tl_jax.tasks import figures


def draw_run(rows: list[dict], predictions: tasks.Predictions, folder) -> None:
    """All figures of one run, as PNG files in its folder; rows as in metrics.jsonl."""
    if rows:  # a probe without gradient takes no steps
        metrics = tasks.METRICS[predictions.spec.name]
        monitored = metrics.monitor[0][0]
        learning_curves(rows, folder / "learning_curves.png", {"loss": metrics.loss_label, monitored: monitored})
    figures.draw(predictions, folder)


def learning_curves(rows: list[dict], path, names: Mapping[str, str]) -> None:
    """The columns train/NAME and val/NAME of metrics.jsonl against the step; names: {NAME: label of its axis}.

    Any key may be missing in a row. The best value on val is marked.
    """
    with figure_at(path, (3.6 * len(names), 2.9), columns=len(names)) as (_, axes):
        for axis, (name, label) in zip(axes, names.items(), strict=True):
            best = np.argmax if tasks.direction(name) > 0 else np.argmin
            for split, colour in (("train", BLUE), ("val", VERMILION)):
                column = f"{split}/{name}"
                points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
                if points:
                    _curve(axis, split, colour, np.array(points, float), best)
            axis.set(xlabel="step", ylabel=label)
            axis.grid(True)
            if axis.lines:
                axis.legend(loc="best")


def _curve(axis, split, colour, points, best):
    """One line; a validation curve has its best value marked and named in the legend."""
    step, value = points.T
    label = split
    if split == "val":
        chosen = best(value)
        label = f"val (best {value[chosen]:.4g} at step {step[chosen]:,.0f})"
        axis.plot(step[chosen], value[chosen], "o", color="white", markeredgecolor=colour, markersize=7, zorder=3)
    axis.plot(
        step, value, color=colour, label=label, linewidth=1.4, marker="o" if len(step) < 30 else "", markersize=2.5
    )


def comparison(named: dict, path, label: str) -> None:
    """Dot and 95 % interval of several runs or arms, one row each, in the given order.

    A value is a list of numbers (one per seed: each is drawn, with the mean and Student's t interval of the mean) or an
    interval {"value", "low", "high"} of `tasks.summarize`.
    """
    if not named:
        raise ValueError("nothing to compare: expected at least one name with its numbers")
    with figure_at(path, (5.6, 1.0 + 0.42 * len(named))) as (_, (axis,)):
        for row, (name, entry) in enumerate(named.items()):
            low, value, high = _span(name, entry)
            axis.plot([low, high], [row, row], color=BLUE, linewidth=2.2, solid_capstyle="round")
            axis.plot(value, row, "o", color=BLUE, markersize=6, markeredgecolor="white", zorder=3)
            if not isinstance(entry, dict):
                axis.plot(entry, [row + 0.22] * len(entry), "|", color=GREY, markersize=5)
            text = f" {value:.4f}  [{low:.4f}, {high:.4f}]" if low < high else f" {value:.4f}"
            axis.text(1.01, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
        axis.set_yticks(range(len(named)), [short(name, 32) for name in named])
        axis.set(xlabel=f"{label}, 95 % interval", ylim=(len(named) - 0.4, -0.6))
        axis.tick_params(axis="y", length=0, labelcolor="#222222")
        axis.grid(True, axis="x")
        axis.spines["left"].set_visible(False)


def _span(name, entry):
    if isinstance(entry, dict):
        if None in entry.values():
            raise ValueError(f"{name!r}: the metric is undefined there, found {entry}")
        return entry["low"], entry["value"], entry["high"]
    values = np.asarray(entry, float)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"{name!r}: expected a list of finite numbers, found {entry!r}")
    half = 0.0
    if len(values) > 1:
        half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - half, values.mean(), values.mean() + half
