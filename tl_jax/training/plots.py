"""Figures of a run and of a comparison; the suffix of the path picks .png or .svg."""

from collections.abc import Mapping

import numpy as np

from tl_jax import tasks
from tl_jax.core.plotting import BLUE, VERMILION, figure_at
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
