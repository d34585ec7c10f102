"""The figures of predictions, by task; the suffix of the path picks .png or .svg, none both."""

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.patheffects import withStroke

from tl_jax import tasks
from tl_jax.core.options import LANGUAGE
from tl_jax.core.plotting import BLUE, BLUES, GREY, MARKERS, PALETTE, VERMILION, figure_at, short
from tl_jax.tasks.predictions import Predictions

LABELS, TARGETS, MAPPED = 40, 6, 2000  # at most so many are shown


def draw(predictions: Predictions, folder, how: str = "pca") -> None:
    """All figures of a task, in the folder; how: of the feature map."""
    for name, figure in FIGURES[predictions.spec.name].items():
        figure(predictions, folder / name)
    classes, features = tasks.METRICS[predictions.spec.name].answer, predictions.features
    if classes and features is not None and min(features.shape) >= 2:  # a plane needs two
        feature_map(predictions, folder / "feature_map", how)


def confusion_matrix(predictions: Predictions, path) -> None:
    """Confusion matrix, coloured by the share of the true class, in blocks of classes beyond 200 of them.

    To 20 classes the counts are written in, beyond it the commonest confusions next to it.
    """
    counts, class_names = tasks.confusion(predictions), predictions.spec.class_names
    classes, listed = len(counts), len(counts) > 20
    side = min(2.8 + 0.34 * classes, 7.2)
    grid = {"columns": 2, "ratios": [side, 3.2]} if listed else {}
    with figure_at(path, (side + (4.0 if listed else 0.6), side), **grid) as (figure, (axis, *others)):
        share, block = _share(counts)
        style = {"cmap": BLUES, "norm": PowerNorm(0.5, 0, 1), "interpolation": "nearest"}
        image = axis.imshow(share, extent=(0, classes, classes, 0), **style)
        blocks = f"; cells are blocks of {block} classes" if block > 1 else ""
        title = f"{counts.trace():,} of {counts.sum():,} correct{blocks}"
        axis.set(xlabel="predicted class", ylabel="true class", title=title)
        axis.spines[:].set_visible(True)
        axis.tick_params(length=0)
        bar = figure.colorbar(image, ax=axis, shrink=0.8, ticks=[0, 0.05, 0.2, 0.5, 1])
        bar.set_label("share of the true class", fontsize=8)
        bar.outline.set_visible(False)
        if classes <= 50:
            names, centres = [short(name) for name in class_names], np.arange(classes) + 0.5
            size, rotation = 6 if listed else 9, 90 if max(map(len, names)) > 2 else 0
            axis.set_xticks(centres, names, rotation=rotation, fontsize=size)
            axis.set_yticks(centres, names, fontsize=size)
        if listed:
            _list_confusions(others[0], counts, class_names)
        for (i, j), count in () if listed else np.ndenumerate(counts):
            colour = "white" if share[i, j] > 0.3 else "black"
            axis.text(j + 0.5, i + 0.5, count or "", ha="center", va="center", fontsize=8, color=colour)


def _share(counts):
    """Rows divided by their sums, and how many classes a cell stands for: at most 200 cells a side stay visible."""
    block = -(-len(counts) // 200)
    start = np.arange(0, len(counts), block)
    pooled = np.add.reduceat(np.add.reduceat(counts, start, axis=0), start, axis=1)
    return pooled / np.maximum(pooled.sum(axis=1, keepdims=True), 1), block


def _list_confusions(axis, counts, class_names, limit=25):
    """The pairs that are taken for each other most often, as text: what a large matrix cannot show."""
    wrong, arrow = counts - np.diag(counts.diagonal()), "\N{RIGHTWARDS ARROW}"
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
    lines = ["commonest confusions", f"(count  true {arrow} predicted)", ""]
    lines += [f"{wrong[i, j]:>4,}  {short(class_names[i])} {arrow} {short(class_names[j])}" for i, j in pairs]
    axis.axis("off")
    axis.text(0, 0.92, "\n".join(lines), va="top", fontsize=7, linespacing=1.5, transform=axis.transAxes)


def reliability(predictions: Predictions, path) -> None:
    """Reliability diagram (Guo et al. 2017): observed by expected share, the gap, and the examples of each bin."""
    measure, (observed, expected) = tasks.METRICS[predictions.spec.name].reliability
    count, share, probability = measure(predictions)
    total, bins = count.sum(), len(count)
    ece = np.nansum(count * np.abs(share - probability)) / total
    left, bar = np.arange(bins) / bins, {"width": 1 / bins, "align": "edge", "linewidth": 0.6}
    halo = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3}, "zorder": 3}
    with figure_at(path, (3.8, 4.6), rows=2, ratios=[3, 1]) as (_, (top, bottom)):
        top.bar(left, share, color=BLUE, alpha=0.85, edgecolor="white", label=observed, **bar)
        gap = {"color": "none", "edgecolor": VERMILION, "hatch": "/////", "label": f"gap to {expected}"}
        top.bar(left, probability - share, bottom=share, **gap, **bar)
        top.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        top.set(xlim=(0, 1), ylim=(0, 1), ylabel=observed, title=f"ECE {ece:.4f} ({bins} bins)")
        top.tick_params(labelbottom=False)
        top.legend(loc="upper left")
        bottom.bar(left, count, color=GREY, edgecolor="white", **bar)
        for x, examples in zip(left + 0.5 / bins, count, strict=True):
            bottom.text(x, examples, f"{examples:,.0f}", ha="center", va="bottom", fontsize=5.5, rotation=90, **halo)
        for name, values, colour, line in (observed, share, BLUE, "-"), (expected, probability, VERMILION, "--"):
            mean = np.nansum(count * values) / total
            bottom.axvline(mean, color=colour, ls=line, lw=1.4, label=f"mean {name} {mean:.3f}")
        bottom.set(xlim=(0, 1), ylim=(0, 1.4 * count.max()), xlabel=expected, ylabel="examples")
        bottom.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=7, borderpad=0.2)


def feature_map(predictions: Predictions, path, how: str = "pca") -> None:
    """The features in the plane, by class, with the misclassified examples ringed. ValueError without features.

    how: "pca", the two leading principal components, or "tsne", t-SNE (van der Maaten and Hinton 2008) of at most 2,000
    examples drawn by a fixed seed. To 40 classes each has a colour and a marker in the legend, and to 10 its name
    stands at its median.
    """
    features, labels, names = predictions.features, predictions.labels, predictions.spec.class_names
    if features is None or min(features.shape) < 2:
        found = "no features" if features is None else f"features {features.shape}"
        raise ValueError(f"the predictions carry {found}; a feature map needs [N >= 2, D >= 2]")
    wrong = tasks.METRICS[predictions.spec.name].answer(predictions) != labels
    told = f"{features.shape[1]} features; {wrong.sum():,} of {len(wrong):,} misclassified"
    chosen, points, axis_names = _plane(features, how)
    told += f"\n{len(chosen):,} examples of {len(labels):,} drawn" if len(chosen) < len(labels) else ""
    labels, wrong, named = labels[chosen], wrong[chosen], len(names) <= 40
    with figure_at(path, (7.0 if named else 5.4, 4.8)) as (figure, (axis,)):
        size = float(np.clip(6000 / len(labels), 5, 16))
        for k in np.unique(labels):
            style = {"color": PALETTE[k % len(PALETTE)], "marker": MARKERS[k % len(MARKERS)]}
            style = style if named else {"color": "#9AA5AE", "marker": "o"}
            style |= {"alpha": 0.65, "linewidths": 0, "rasterized": True, "label": short(names[k])}
            axis.scatter(*points[labels == k].T, s=size, **style)
        ring = {"facecolors": "none", "edgecolors": "black", "linewidths": 0.7, "label": "misclassified"}
        axis.scatter(*points[wrong].T, s=3.5 * size, rasterized=True, **ring)
        halo = [withStroke(linewidth=2.5, foreground="white")]
        for k in np.unique(labels) if len(names) <= 10 else ():
            x, y = np.median(points[labels == k], axis=0)
            axis.text(x, y, short(names[k]), ha="center", va="center", weight="bold", path_effects=halo)
        axis.set(xlabel=axis_names[0], ylabel=axis_names[1])
        axis.set_title(told)
        if named:
            style = {"fontsize": 7, "markerscale": 5 / size**0.5, "ncols": 1 + (len(names) > 22)}
            figure.legend(loc="outside right upper", **style)


def _plane(features: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
    """Which examples are shown, their points [N, 2], and the names of the axes."""
    import sklearn.decomposition  # here, as it takes half a second

    chosen, features = np.arange(len(features)), features.astype(np.float64)
    if how == "tsne" and len(features) > 3:
        import sklearn.manifold

        chosen = np.sort(np.random.default_rng(0).permutation(len(features))[:MAPPED])
        few = min(50, *features[chosen].shape)  # section 4.1 of the paper
        few = sklearn.decomposition.PCA(few, random_state=0).fit_transform(features[chosen])
        perplexity = min(30.0, (len(chosen) - 1) / 3)
        points = sklearn.manifold.TSNE(2, perplexity=perplexity, random_state=0).fit_transform(few)
        return chosen, points, (f"t-SNE, perplexity {perplexity:.3g}: distances between clusters mean little", "")
    pca = sklearn.decomposition.PCA(2, random_state=0)
    points = pca.fit_transform(features)
    first, second = pca.explained_variance_ratio_
    return chosen, points, (f"component 1 ({first:.1%} of the variance)", f"component 2 ({second:.1%})")


def threshold_curves(predictions: Predictions, path) -> None:
    """ROC and precision-recall curve of a binary task, with the point of the threshold in use."""
    import sklearn.metrics  # here, as it takes half a second

    point, labels, logits = tasks.point(predictions), predictions.labels, predictions.values
    with figure_at(path, (7.2, 3.5), columns=2) as (_, (left, right)):
        if labels.min() < labels.max():
            fall_out, hit, _ = sklearn.metrics.roc_curve(labels, logits)
            precision, recall, _ = sklearn.metrics.precision_recall_curve(labels, logits)
            left.plot(fall_out, hit, color=BLUE, linewidth=1.6)
            right.step(recall, precision, color=BLUE, linewidth=1.6, where="post")
            dot = {"color": VERMILION, "marker": "o", "markersize": 6, "linestyle": "", "label": "threshold in use"}
            left.plot(1 - point["specificity"], point["recall"], **dot)
            right.plot(point["recall"], point["precision"], **dot)
        left.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        right.axhline(labels.mean(), color=GREY, linestyle="--", linewidth=1, label="share of positives")
        left.set(xlabel="1 - specificity", ylabel="recall", title=f"ROC, area {point['roc_auc']:.4f}")
        right.set(xlabel="recall", ylabel="precision", title=f"average precision {point['average_precision']:.4f}")
        for axis, place in ((left, "lower right"), (right, "lower left")):
            axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
            axis.grid(True)
            axis.legend(loc=place)


def label_bars(predictions: Predictions, path) -> None:
    """F1 and average precision of each label, the best first; of many labels those with the lowest precision."""
    point, names = tasks.point(predictions), predictions.spec.class_names
    order = np.argsort(-np.nan_to_num(point["average_precision"]), kind="stable")[-LABELS:]
    rows, height, support = np.arange(len(order)), 0.38, predictions.labels.sum(axis=0)
    few = f"; the {LABELS} lowest of {len(names)} labels" if len(order) < len(names) else ""
    with figure_at(path, (6.0, 1.3 + 0.34 * len(order))) as (figure, (axis,)):
        precision = point["average_precision"][order]
        axis.barh(rows - 0.5 * height, precision, height, color=BLUE, label="average precision")
        axis.barh(rows + 0.5 * height, point["f1"][order], height, color=VERMILION, label="F1")
        axis.set_yticks(rows, [f"{short(names[k])} ({support[k]:,})" for k in order])
        axis.set(xlim=(0, 1), ylim=(len(order) - 0.4, -0.6), xlabel=f"positives in brackets{few}")
        mean, macro = point["mean_average_precision"], point["f1_macro"]
        axis.set_title(f"mean average precision {mean:.4f}, macro F1 {macro:.4f}")
        axis.tick_params(axis="y", length=0, labelcolor="#222222")
        axis.grid(True, axis="x")
        figure.legend(loc="outside lower right", ncols=2, fontsize=8)


def predicted_and_true(predictions: Predictions, path) -> None:
    """Predicted against true values, and the residuals against the predicted: a row for each target."""
    point, names = tasks.point(predictions), predictions.spec.class_names
    shown = names[:TARGETS]
    style = {"s": float(np.clip(6000 / len(predictions.labels), 3, 16)), "color": BLUE, "alpha": 0.5, "linewidths": 0}
    with figure_at(path, (7.2, 3.2 * len(shown)), rows=len(shown), columns=2) as (_, axes):
        for k, (name, left, right) in enumerate(zip(shown, axes[::2], axes[1::2], strict=True)):
            true, predicted = (x[:, k].astype(np.float64) for x in (predictions.labels, predictions.values))
            ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
            left.plot(ends, ends, "--", color=GREY, linewidth=1)
            left.scatter(true, predicted, **style, rasterized=True)
            right.axhline(0, linestyle="--", color=GREY, linewidth=1)
            right.scatter(predicted, predicted - true, **style, rasterized=True)
            rmse, r2 = point["rmse_each"][k], point["r2_each"][k]
            left.set(xlabel="true", ylabel="predicted", title=f"{short(name)}: RMSE {rmse:.4g}, R2 {r2:.4f}")
            right.set(xlabel="predicted", ylabel="predicted - true")
            few = f"; {len(shown)} of {len(names)} targets" if k == 0 and len(shown) < len(names) else ""
            right.set_title(f"mean residual {(predicted - true).mean():.3g}{few}")
            for axis in (left, right):
                axis.grid(True)


_OF_CLASSES = {"confusion_matrix": confusion_matrix, "reliability": reliability}
FIGURES = {
    "classification": _OF_CLASSES,
    "binary": {**_OF_CLASSES, "threshold_curves": threshold_curves},
    "multilabel": {"labels": label_bars},
    "regression": {"predicted_and_true": predicted_and_true},
    **{name: {} for name in LANGUAGE},
}
