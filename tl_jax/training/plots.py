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

    Any key may be missing in a row. The best value on val is marked and named in the legend.
    """
    with figure_at(path, (3.6 * len(names), 2.9), columns=len(names)) as (_, axes):
        for axis, (name, label) in zip(axes, names.items(), strict=True):
            for split, colour in (("train", BLUE), ("val", VERMILION)):
                column = f"{split}/{name}"
                points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
                if not points:
                    continue
                step, value = np.array(points, float).T
                legend = split
                if split == "val":
                    best = value.argmax() if tasks.direction(name) > 0 else value.argmin()
                    legend = f"val (best {value[best]:.4g} at step {step[best]:,.0f})"
                    ring = {"color": "white", "markeredgecolor": colour, "markersize": 7, "zorder": 3}
                    axis.plot(step[best], value[best], "o", **ring)
                marker = "o" if len(step) < 30 else ""
                axis.plot(step, value, color=colour, label=legend, linewidth=1.4, marker=marker, markersize=2.5)
            axis.set(xlabel="step", ylabel=label)
            axis.grid(True)
            if axis.lines:
                axis.legend(loc="best")
