"""What a head predicts, and what follows from it; no other room names a metric. Scoring needs no jax; `make` does."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from tl_jax.core.messages import nearest
from tl_jax.core.options import LANGUAGE
from tl_jax.tasks import binary, classification, language, multilabel, regression
from tl_jax.tasks.intervals import interval, resample
from tl_jax.tasks.predictions import Predictions, load_predictions, make_predictions, save_predictions
from tl_jax.tasks.tables import format_classes, format_sets, format_table
from tl_jax.tasks.task import Metrics, Spec, Task, card_fields, preference, refuse_language, spec_of, spec_problems

__all__ = [
    "CALIBRATION", "METRICS", "Metrics", "Predictions", "Spec", "Task", "bounds", "card_fields", "confusion",
    "direction", "fit_spec", "format_classes", "format_sets", "format_table", "load_predictions", "make",
    "make_predictions", "paired_difference", "point", "preference", "refuse_language", "save_predictions",
    "scalar_names", "scores", "share_interval", "span", "spec_of", "summarize",
]  # fmt: skip

METRICS = {
    "classification": classification.METRICS,
    "binary": binary.METRICS,
    "multilabel": multilabel.METRICS,
    "regression": regression.METRICS,
    **dict.fromkeys(LANGUAGE, language.METRICS),
}
CALIBRATION = "ece"  # the scalar that belongs to a reliability diagram
_ENDS = {"loss": (0, math.inf), "nll": (0, math.inf), "rmse": (0, math.inf), "mae": (0, math.inf),
         "perplexity": (1, math.inf), "r2": (-math.inf, 1), "spearman": (-1, 1)}  # fmt: skip
_LESS = {"loss", *(name for metrics in METRICS.values() for name in metrics.less)}


def make(
    spec: Spec, *, label_smoothing: float = 0.0, class_weight: Sequence[float] = (), pos_weight: Sequence[float] = ()
) -> Task:
    """The task of a spec; one ValueError for a spec or weights that do not fit.

    class_weight: one number a class. pos_weight: of the positives of a binary task (one number) or of each label.
    """
    metrics, problems, labels = _metrics(spec.name), spec_problems(spec), len(spec.class_names)
    for option, weights, sizes in (
        ("class_weight", class_weight, {"classification": labels}),
        ("pos_weight", pos_weight, {"binary": 1, "multilabel": labels}),
    ):
        if len(weights) and spec.name not in sizes:
            problems.append(f"{option} is of the tasks {', '.join(sizes)}")
        elif len(weights) not in (0, sizes.get(spec.name)) or not all(0 < weight < math.inf for weight in weights):
            problems.append(f"{option}={tuple(weights)}: expected {sizes[spec.name]} numbers above 0")
    if label_smoothing and (spec.name in ("regression", *LANGUAGE) or not 0 <= label_smoothing < 1):
        expected = "expected 0 .. 1, below 1; 0 for a regression and for language modelling"
        problems.append(f"label_smoothing={label_smoothing}: {expected}")
    if problems:
        raise ValueError(f"this {spec.name} task cannot be made: {'; '.join(problems)}")
    from tl_jax.tasks import losses  # here, as jax takes its time and metrics do without it

    trained = losses.TRAINED[spec.name](spec, label_smoothing, tuple(class_weight) or tuple(pos_weight))
    counted = losses.COUNTS.get(spec.name, losses.each_once)
    return Task(spec, *trained, counted, metrics.scores, metrics.monitor, metrics.calibrate)


def fit_spec(name: str, labels: np.ndarray, class_names: tuple[str, ...] = (), *, shares: bool = False) -> Spec:
    """The spec of a task for training labels: of a regression with their mean and standard deviation.

    shares: with their minimum and range in place of these, so that the network predicts 0 to 1, as a cosine does.
    Without class_names those of a binary task are "0" and "1". ValueError where labels or names do not fit the task.
    """
    _metrics(name)
    spec = Spec(name, tuple(map(str, class_names)) or (("0", "1") if name == "binary" else ()))
    if name == "regression":
        mean, std = regression.fit_targets(labels, spec.class_names, shares)
        spec = spec._replace(target_mean=mean, target_std=std)
    if problems := spec_problems(spec):
        raise ValueError("; ".join(problems))
    return spec


def scores(predictions: Predictions) -> dict[str, float]:
    """The loss, without weights and smoothing, and the monitored metric, in float64: for model selection."""
    return METRICS[predictions.spec.name].scores(predictions)


def point(predictions: Predictions) -> dict:
    """The point estimates of all metrics, {name: scalar or [rows]}; NaN where undefined."""
    once = np.ones((len(predictions.labels), 1), np.float32)
    return {name: values[0] for name, values in _estimates(predictions, once).items()}


def _estimates(predictions, weights) -> dict:
    parts = METRICS[predictions.spec.name].parts
    return {name: values for part in parts for name, values in part(predictions, weights).items()}


def confusion(predictions: Predictions) -> np.ndarray:
    """Counts [K, K] of a task that predicts one class; rows are true classes, columns predicted ones."""
    classes, answer = len(predictions.spec.class_names), METRICS[predictions.spec.name].answer(predictions)
    return np.bincount(classes * predictions.labels + answer, minlength=classes**2).reshape(classes, classes)


def summarize(predictions: Predictions, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> dict:
    """Every metric with its interval, as plain JSON-able data (undefined numbers are None); see docs/metrics.md.

    Intervals are percentiles of the bootstrap over examples (Efron 1979), or over their groups, with the same resamples
    for all metrics. Each of `scalar_names` is {"value", "low", "high"}; also count, and groups where there are some; a
    list of rows per_class, per_label or per_target; confusion (rows: true, columns: predicted); level, resamples, seed.
    """
    metrics, value, count = METRICS[predictions.spec.name], point(predictions), len(predictions.labels)
    chunks = [_estimates(predictions, weights) for weights in resample(count, resamples, seed, predictions.groups)]
    samples = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in value}
    if predictions.groups is not None and len(np.unique(predictions.groups)) < 2:  # one group tells of no other
        samples = {name: np.full_like(x, np.nan) for name, x in samples.items()}
    found = {name: interval(value[name], samples[name], level) for name in metrics.scalars if name in value}
    if metrics.rows:
        noun, columns, support = metrics.rows
        found[f"per_{noun}"] = rows = [{noun: name} for name in predictions.spec.class_names]
        for k, row in enumerate(rows):
            if support:
                row["support"] = int(support(predictions)[k])
            for name in columns:
                row[name.removesuffix("_each")] = interval(value[name][k], samples[name][:, k], level)
    if metrics.answer:
        found["confusion"] = confusion(predictions).tolist()
    grouped = {} if predictions.groups is None else {"groups": len(np.unique(predictions.groups))}
    return {"count": count, **grouped, **found, "level": level, "resamples": resamples, "seed": seed}


def paired_difference(
    a: Predictions, b: Predictions, *, metric: str = "", resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict:
    """A scalar metric of a minus that of b on the same examples (matched by id): {"value", "low", "high"}.

    Both models see the same resamples, so what is hard for both cancels. metric: "" is the monitored one. ValueError
    for different examples, labels or classes, or an unknown metric.
    """
    place = {name: i for i, name in enumerate(b.ids.tolist())}
    if unmatched := sorted(set(place).symmetric_difference(a.ids.tolist())):
        raise ValueError(f"a paired comparison needs the same examples; {len(unmatched)} are in one: {unmatched[:5]}")
    order = [place[name] for name in a.ids.tolist()]
    same = (a.spec.name, a.spec.class_names) == (b.spec.name, b.spec.class_names)
    if not same or not np.array_equal(a.labels, b.labels[order]):
        raise ValueError("a paired comparison needs the same classes and labels; these two runs disagree about them")
    b = b._replace(outputs={name: x[order] for name, x in b.outputs.items()}, labels=a.labels, ids=a.ids)
    metrics, once = METRICS[a.spec.name], np.ones((len(order), 1), np.float32)
    metric = metric or metrics.monitor[0][0]
    parts = {name: part for part in metrics.parts for name in part(a, once) if name in metrics.scalars}
    if metric not in parts:
        raise ValueError(f"unknown metric {metric!r}{nearest(metric, parts)}; known: {', '.join(parts)}")
    value, *samples = (
        np.subtract(*(parts[metric](p, weights)[metric] for p in (a, b)))
        for weights in itertools.chain([once], resample(len(order), resamples, seed, a.groups))
    )
    return interval(value[0], np.concatenate(samples), level)


def direction(metric: str) -> int:
    """1 where more of a metric is better, -1 where less is; "NAME/metric" is that of a set of data.extra_eval."""
    return -1 if metric.rpartition("/")[2] in _LESS else 1


def bounds(metric: str) -> tuple[float, float]:
    """The ends of a metric's scale; infinite where it has none, or where the metric is not known."""
    name = metric.rpartition("/")[2]
    known = any(name in metrics.scalars for metrics in METRICS.values())
    return _ENDS.get(name, (0, 1) if known else (-math.inf, math.inf))


def span(metric: str) -> tuple[float, float]:
    """The ends of the scale of a difference of two values of a metric."""
    least, most = bounds(metric)
    return least - most, most - least


def share_interval(name: str, value: float | None, count: int) -> dict[str, float]:
    """{"low", "high"}: the 95 % score interval (Wilson 1927) of the monitored metric if it is a share, otherwise {}."""
    if METRICS[name].monitor[0][0] != "accuracy" or value is None:
        return {}
    z = 1.959964
    centre, spread = value + z * z / (2 * count), z * math.sqrt(value * (1 - value) / count + (z / (2 * count)) ** 2)
    return {"low": (centre - spread) / (1 + z * z / count), "high": (centre + spread) / (1 + z * z / count)}


def scalar_names(name: str) -> tuple[str, ...]:
    """The scalars that `summarize` gives for a task; of a classification top5 only for more than five classes."""
    return _metrics(name).scalars


def _metrics(name: str) -> Metrics:
    if name not in METRICS:
        raise ValueError(f"there is no task {name!r}{nearest(str(name), METRICS)}; known: {', '.join(METRICS)}")
    return METRICS[name]
