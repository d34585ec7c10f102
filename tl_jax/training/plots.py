"""Figures of a run and of a comparison, in a colour-blind-safe palette; the suffix of the path picks .png or .svg."""

import contextlib
import pathlib

import matplotlib
import numpy as np
import scipy  # loads its parts when they are used
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from tl_jax.core import files
from tl_jax.tasks import metrics

# Okabe and Ito 2008, with grey for their yellow (too faint on white); blue and vermilion carry the two-colour plots
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#000000")
BLUE, VERMILION, GREY = PALETTE[0], PALETTE[1], "#6B6B6B"
BLUES = LinearSegmentedColormap.from_list("blues", ["#FFFFFF", "#9CCBE8", BLUE, "#00304D"])
MARKERS = "osD^v"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#222222",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "text.parse_math": False,  # class names may hold dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "tl_jax",
}


def draw_run(rows: list[dict], predictions: metrics.Predictions, folder) -> None:
    """All figures of one run, as PNG files in its folder; rows as in metrics.jsonl."""
    if rows:  # a closed form takes no steps
        learning_curves(rows, folder / "learning_curves.png")
    confusion_matrix(predictions, folder / "confusion_matrix.png")
    reliability(predictions, folder / "reliability.png")
    if predictions.features is not None and min(predictions.features.shape) >= 2:  # a plane needs two of each
        feature_map(predictions, folder / "feature_map.png")


def learning_curves(rows: list[dict], path) -> None:
    """Loss and accuracy against the step, training and validation; rows as in metrics.jsonl, any key may be missing."""
    with figure_at(path, (7.2, 2.9), columns=2) as (_, axes):
        for axis, label, best in zip(axes, ("loss", "accuracy"), (np.argmin, np.argmax), strict=True):
            for split, colour in (("train", BLUE), ("val", VERMILION)):
                name = f"{split}/{label}"
                points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                if points:
                    _curve(axis, split, colour, np.array(points, float), best)
            axis.set(xlabel="step", ylabel=f"{label} (nats)" if label == "loss" else label)
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


def confusion_matrix(predictions: metrics.Predictions, path) -> None:
    """Confusion matrix, coloured by the share of the true class.

    To 20 classes the counts are written in, beyond it the commonest confusions beside it; beyond 200 the cells are
    blocks of neighbouring classes.
    """
    counts = metrics.confusion(predictions)
    classes = len(counts)
    side, listed = min(2.8 + 0.34 * classes, 7.2), classes > 20
    grid = {"columns": 2, "ratios": [side, 3.2]} if listed else {}
    with figure_at(path, (side + (4.0 if listed else 0.6), side), **grid) as (figure, axes):
        share, block = _share(counts)
        image = axes[0].imshow(
            share, cmap=BLUES, norm=PowerNorm(0.5, 0, 1), interpolation="nearest", extent=(0, classes, classes, 0)
        )
        blocks = f"; cells are blocks of {block} classes" if block > 1 else ""
        axes[0].set(xlabel="predicted class", ylabel="true class")
        axes[0].set_title(f"{counts.trace():,} of {counts.sum():,} correct{blocks}")
        axes[0].spines[:].set_visible(True)
        axes[0].tick_params(length=0)
        bar = figure.colorbar(image, ax=axes[0], shrink=0.8, ticks=[0, 0.05, 0.2, 0.5, 1])
        bar.set_label("share of the true class", fontsize=8)
        bar.outline.set_visible(False)
        if classes <= 50:
            _name_classes(axes[0], predictions.class_names)
        if listed:
            _list_confusions(axes[1], counts, predictions.class_names)
            return
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if share[i, j] > 0.3 else "black"
            axes[0].text(j + 0.5, i + 0.5, count or "", ha="center", va="center", fontsize=8, color=colour)


def _share(counts):
    """Rows divided by their sums, and how many classes a cell stands for: at most 200 cells a side stay visible."""
    block = -(-len(counts) // 200)
    start = np.arange(0, len(counts), block)
    pooled = np.add.reduceat(np.add.reduceat(counts, start, axis=0), start, axis=1)
    return pooled / np.maximum(pooled.sum(axis=1, keepdims=True), 1), block


def _name_classes(axis, class_names):
    names, size = [short(name) for name in class_names], 9 if len(class_names) <= 20 else 6
    centres = np.arange(len(names)) + 0.5
    axis.set_xticks(centres, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
    axis.set_yticks(centres, names, fontsize=size)


def _list_confusions(axis, counts, class_names, limit=25):
    """The pairs that are taken for each other most often, as text: what a large matrix cannot show."""
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    arrow = "\N{RIGHTWARDS ARROW}"
    lines = ["commonest confusions", f"(count  true {arrow} predicted)", ""]
    for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[i, j]:
            lines.append(f"{wrong[i, j]:>4,}  {short(class_names[i])} {arrow} {short(class_names[j])}")
    axis.axis("off")
    axis.text(0, 0.92, "\n".join(lines), va="top", fontsize=7, linespacing=1.5, transform=axis.transAxes)


def reliability(predictions: metrics.Predictions, path) -> None:
    """Reliability diagram (Guo et al. 2017): accuracy by confidence, its gap, and the share of each bin."""
    count, accuracy, confidence = metrics.reliability(predictions)
    total, bins = count.sum(), len(count)
    ece = np.nansum(count * np.abs(accuracy - confidence)) / total
    left, width = np.arange(bins) / bins, 1 / bins
    with figure_at(path, (3.8, 4.4), rows=2, ratios=[3, 1]) as (_, (top, bottom)):
        bar = {"width": width, "align": "edge", "linewidth": 0.6}
        top.bar(left, accuracy, color=BLUE, alpha=0.85, edgecolor="white", label="accuracy", **bar)
        gap = {"color": "none", "edgecolor": VERMILION, "hatch": "/////", "label": "gap to confidence"}
        top.bar(left, confidence - accuracy, bottom=accuracy, **gap, **bar)
        top.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"ECE {ece:.4f} ({bins} bins)")
        top.tick_params(labelbottom=False)
        top.legend(loc="upper left")
        bottom.bar(left, count / total, color=GREY, edgecolor="white", **bar)
        mean_accuracy, mean_confidence = (np.nansum(count * mean) / total for mean in (accuracy, confidence))
        bottom.axvline(mean_accuracy, color=BLUE, linewidth=1.4, label=f"mean accuracy {mean_accuracy:.3f}")
        bottom.axvline(
            mean_confidence, color=VERMILION, ls="--", lw=1.4, label=f"mean confidence {mean_confidence:.3f}"
        )
        bottom.set(xlim=(0, 1), xlabel="confidence", ylabel="share")
        bottom.legend(loc="upper left", fontsize=7.5)


def feature_map(predictions: metrics.Predictions, path) -> None:
    """The two leading principal components of the features, coloured by class, with the misclassified examples ringed.

    Classes are named at their medians up to 10, in a legend up to 40, and drawn alike beyond. ValueError where the
    predictions carry no features.
    """
    features, labels, names = predictions.features, predictions.labels, predictions.class_names
    if features is None or min(features.shape) < 2:
        found = "no features" if features is None else f"features {features.shape}"
        raise ValueError(f"the predictions carry {found}; a feature map needs [N >= 2, D >= 2]")
    import sklearn.decomposition

    pca = sklearn.decomposition.PCA(2, random_state=0)
    points = pca.fit_transform(features.astype(np.float64))
    wrong = predictions.logits.argmax(1) != labels
    legend = 10 < len(names) <= 40
    with figure_at(path, (7.4 if legend else 5.4, 4.8)) as (figure, (axis,)):
        size = float(np.clip(6000 / len(labels), 3, 16))
        for k in np.unique(labels):
            colour, marker = PALETTE[k % len(PALETTE)], MARKERS[k // len(PALETTE) % len(MARKERS)]
            colour, marker = (colour, marker) if len(names) <= 40 else ("#9AA5AE", "o")
            style = {"color": colour, "marker": marker, "alpha": 0.65, "linewidths": 0, "rasterized": True}
            axis.scatter(*points[labels == k].T, s=size, label=short(names[k]), **style)
        ring = {"facecolors": "none", "edgecolors": "black", "linewidths": 0.8, "rasterized": True}
        axis.scatter(*points[wrong].T, s=3.5 * size, **ring)
        for k in np.unique(labels) if len(names) <= 10 else ():
            halo = [withStroke(linewidth=2.5, foreground="white")]
            x, y = np.median(points[labels == k], axis=0)
            axis.text(x, y, short(names[k]), ha="center", va="center", weight="bold", path_effects=halo)
        first, second = pca.explained_variance_ratio_
        axis.set(xlabel=f"component 1 ({first:.1%} of the variance)", ylabel=f"component 2 ({second:.1%})")
        axis.set_title(f"{features.shape[1]} features; {wrong.sum():,} of {len(wrong):,} misclassified (ringed)")
        if legend:
            scale = 5 / size**0.5
            figure.legend(loc="outside right upper", fontsize=7, markerscale=scale, ncols=1 + (len(names) > 22))


def comparison(named: dict, path, label: str = "accuracy") -> None:
    """Dot and 95 % interval of several runs or arms, one row each, in the given order.

    A value is a list of numbers (one per seed: each is drawn, with the mean and Student's t interval of the mean) or an
    interval {"value", "low", "high"} of `metrics.summarize`.
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


def short(name, limit=22):
    return name if len(name) <= limit else name[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


@contextlib.contextmanager
def figure_at(path, size, rows=1, columns=1, ratios=None):
    """Yields a styled figure of `size` inches and its axes; on leaving, writes it whole to .png (150 dpi) or .svg."""
    path = pathlib.Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: figures are written as .png or .svg")
    grid = {"height_ratios" if rows > 1 else "width_ratios": ratios}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **grid).ravel()
        with files.atomic_write(path) as file:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=metadata)
