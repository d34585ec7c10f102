"""Figures of a run; the suffix of the path picks .png or .svg, none both."""

from collections.abc import Mapping

import numpy as np

from tl_jax import tasks
from tl_jax.core import files
from tl_jax.core.options import LANGUAGE
from tl_jax.core.plotting import BLUE, GREY, PALETTE, VERMILION, end_of, figure_at, headed, sheet
from tl_jax.data.examples import Source
from tl_jax.data.image import decode
from tl_jax.tasks import figures, mistakes

SHOWN = 1000  # examples of a domain
MISTAKES = 24  # of a gallery
TEXTS = 100  # mistakes of a table


def draw_run(
    rows: list[dict], predictions: tasks.Predictions, folder, scored: str, step: int | None = None, how: str = "pca"
) -> None:
    """All figures of one run but that of its mistakes, in its folder; see `figure_at` for a path without suffix.

    rows: of metrics.jsonl. scored: what is predicted, at `step`. how: of the feature map.
    """
    if rows:  # a probe without gradient takes no steps
        metrics = tasks.METRICS[predictions.spec.name]
        monitored = metrics.monitor[0][0]
        learning_curves(rows, folder / "learning_curves", {"loss": metrics.loss_label, monitored: monitored}, step)
    with headed(scored):
        figures.draw(predictions, folder, how)


def gallery(predictions: tasks.Predictions, source: Source, path, scored: str) -> None:
    """The surest mistakes of a network, or the largest errors of a regression, with the names of their files.

    source: what the predictions are of: images are drawn, texts are a table in path.tsv. Nothing is left where nothing
    is wrong, or of other inputs and of language modelling.
    """
    if source.input not in ("image", "text") or predictions.spec.name in LANGUAGE:
        return
    found, text = mistakes.said(predictions), source.input == "text"
    chosen = mistakes.worst(found, TEXTS if text else MISTAKES)
    place = {name: k for k, name in enumerate(source.ids)}
    if not chosen:
        return
    names = [str(predictions.ids[i]) for i in chosen]
    if text:
        rows = [source.inputs[place[name]] for name in names]
        files.write_text(path.with_suffix(".tsv"), mistakes.to_tsv(predictions, found, chosen, rows))
        return
    pictures = [decode.thumbnail(source.inputs[place[name]], source.form) for name in names]
    words = [mistakes.in_words(predictions, found, i) for i in chosen]
    captions = [(end_of(name, 28), *lines) for name, lines in zip(names, words, strict=True)]
    count = f"{len(chosen)} of {found.wrong.sum():,} mistakes, the surest first"
    what = "the largest errors" if predictions.spec.name == "regression" else count
    sheet(path, pictures, captions, title=f"{end_of(scored, 60)}\n{what}")


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


def learning_curves(rows: list[dict], path, names: Mapping[str, str], scored: int | None = None) -> None:
    """The columns train/NAME and val/NAME of metrics.jsonl against the step; names: {NAME: label of its axis}.

    Any key may be missing in a row. The best value on val is marked and named in the legend, and `scored` is the step
    whose network was scored at the end.
    """
    with figure_at(path, (3.6 * len(names), 3.2), columns=len(names)) as (_, axes):
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
                style = {"linestyle": "-" if split == "val" else "--", "marker": marker, "markersize": 2.5}
                axis.plot(step, value, color=colour, label=legend, linewidth=1.4, **style)
            if scored is not None:
                axis.axvline(scored, color=GREY, linestyle=":", linewidth=1.2, label=f"scored: step {scored:,}")
            axis.set(xlabel="step", ylabel=label)
            axis.grid(True)
            if axis.lines:
                axis.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=7.5, borderpad=0)
