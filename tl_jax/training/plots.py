"""Figures of a run and of a comparison; the suffix of the path picks .png or .svg."""

from collections.abc import Mapping

import numpy as np

from tl_jax import tasks
from tl_jax.core.plotting import BLUE, PALETTE, VERMILION, figure_at, headed
from tl_jax.tasks import figures

SHOWN = 1000  # examples of a domain


def draw_run(rows: list[dict], predictions: tasks.Predictions, folder, scored: str) -> None:
    """All figures of one run, as PNG files in its folder; rows: of metrics.jsonl; scored: what is predicted."""
    if rows:  # a probe without gradient takes no steps
        metrics = tasks.METRICS[predictions.spec.name]
        monitored = metrics.monitor[0][0]
        learning_curves(rows, folder / "learning_curves.png", {"loss": metrics.loss_label, monitored: monitored})
    with headed(scored):
        figures.draw(predictions, folder)


def domain_map(start: Mapping[str, np.ndarray], end: Mapping[str, np.ndarray], names, path) -> None:
    """Two leading principal components of source and target features, before and after training.

    start, end: arrays of `candidates.read`. The left column is coloured by domain, the right by class: that of the
    source's labels, and the one predicted where there are none, as in the target. names: of the classes.
    """
    import sklearn.decomposition  # here, as it takes half a second

    with figure_at(path, (7.4, 6.6), rows=2, columns=2) as (figure, axes):
        for row, (when, arrays) in enumerate({"before": start, "after": end}.items()):
            source, target = (
                arrays[f"{domain}_features"][:SHOWN].astype(np.float64) for domain in ("source", "target")
            )
            points = sklearn.decomposition.PCA(2, random_state=0).fit_transform(np.concatenate([source, target]))
            answers = {name: arrays[f"{name}_logits"].argmax(axis=1) for name in ("source", "target")}
            labels = [arrays.get("source_labels", answers["source"])[:SHOWN], answers["target"][:SHOWN]]
            halves = points[: len(source)], points[len(source) :]
            by_domain, by_class = axes[2 * row : 2 * row + 2]
            for half, label, colour, marker in zip(halves, labels, (BLUE, VERMILION), "ox", strict=True):
                style = {"s": 10, "alpha": 0.6, "marker": marker, "linewidths": 0.7, "rasterized": True}
                by_domain.scatter(*half.T, color=colour, label="source" if marker == "o" else "target", **style)
                by_class.scatter(*half.T, color=[PALETTE[k % len(PALETTE)] for k in label], **style)
            by_domain.set_title(f"{when} training, by domain")
            by_class.set_title(f"by class of {len(names)} (target: as predicted)")
            for axis in (by_domain, by_class):
                axis.set(xticks=[], yticks=[])
        figure.legend(*by_domain.get_legend_handles_labels(), loc="outside lower center", ncols=2)


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
