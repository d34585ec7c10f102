"""What a head predicts, and what follows from it; no other room names a metric. Scoring needs no jax; `make` does."""

import numpy as np

from tl_jax.core.messages import nearest
from tl_jax.tasks import binary, classification, multilabel, regression
from tl_jax.tasks.intervals import interval, resample, wilson
from tl_jax.tasks.predictions import Predictions, load_predictions, make_predictions, save_predictions
from tl_jax.tasks.tables import format_classes, format_sets, format_table
from tl_jax.tasks.task import Metrics, Spec, Task, card_fields, preference, spec_of, spec_problems, unchanged

__all__ = [
    "CALIBRATION", "METRICS", "NAMES", "Metrics", "Predictions", "Spec", "Task", "card_fields", "confusion",
    "direction", "fit_spec", "format_classes", "format_sets", "format_table", "load_predictions", "make",
    "make_predictions", "paired_difference", "point", "preference", "save_predictions", "scalar_names", "scores",
    "share_interval", "spec_of", "summarize",
]  # fmt: skip

METRICS = {
    "classification": classification.METRICS,
    "binary": binary.METRICS,
    "multilabel": multilabel.METRICS,
    "regression": regression.METRICS,
}
NAMES = tuple(METRICS)
CALIBRATION = "ece"  # the scalar that belongs to a reliability diagram
_LESS = {"loss", *(name for metrics in METRICS.values() for name in metrics.less)}


def make(
    spec: Spec,
    *,
    label_smoothing: float = 0.0,
    class_weight: tuple[float, ...] = (),
    pos_weight: tuple[float, ...] = (),
) -> Task:
    """The task of a spec; one ValueError for a spec or weights that do not fit.

    class_weight: of a classification, one number a class, see `losses.classification`. pos_weight: of the positives of
    a binary task (one number) or of each label (multilabel).
    """
    _check_name(spec.name)
    problems, labels = spec_problems(spec), len(spec.class_names)
    problems += _weight_problems("class_weight", class_weight, {"classification": labels}, spec.name)
    problems += _weight_problems("pos_weight", pos_weight, {"binary": 1, "multilabel": labels}, spec.name)
    if label_smoothing and (spec.name == "regression" or not 0 <= label_smoothing < 1):
        problems.append(f"label_smoothing={label_smoothing}: expected 0 .. 1, below 1; 0 for a regression")
    if problems:
        raise ValueError(f"this {spec.name} task cannot be made: {'; '.join(problems)}")
    from tl_jax.tasks import losses  # here, as jax takes its time and metrics do without it

    metrics, trained = METRICS[spec.name], losses.TRAINED[spec.name]
    parts = trained(spec, label_smoothing, tuple(class_weight) or tuple(pos_weight))
    scoring = (metrics.scores, metrics.monitor, metrics.calibrate or unchanged, metrics)
    return Task(spec, *parts, losses.each_once, *scoring)


def _weight_problems(option: str, weights: tuple[float, ...], sizes: dict[str, int], name: str) -> list[str]:
    if not len(weights):
        return []
    if name not in sizes:
        return [f"{option} is of the tasks {', '.join(sizes)}"]
    numbers = np.asarray(weights, np.float64)
    if numbers.shape != (sizes[name],) or not np.isfinite(numbers).all() or (numbers <= 0).any():
        return [f"{option}={tuple(weights)}: expected {sizes[name]} numbers above 0"]
    return []


def fit_spec(name: str, labels: np.ndarray, class_names: tuple[str, ...] = ()) -> Spec:
    """The spec of a task for training labels: of a regression with their mean and standard deviation.

    Without class_names those of a binary task are "0" and "1". ValueError where labels or names do not fit the task.
    """
    _check_name(name)
    spec = Spec(name, tuple(map(str, class_names)) or (("0", "1") if name == "binary" else ()))
    if name == "regression":
        mean, std = regression.fit_targets(labels, spec.class_names)
        spec = spec._replace(target_mean=mean, target_std=std)
    if problems := spec_problems(spec):
        raise ValueError("; ".join(problems))
    return spec


def scores(predictions: Predictions) -> dict[str, float]:
    """The loss, without weights and smoothing, and the monitored metric, in float64: for model selection."""
    return METRICS[predictions.spec.name].scores(predictions)


def point(predictions: Predictions) -> dict:
    """The point estimates of all metrics, {name: scalar or [rows]}; NaN where undefined."""
    metrics = METRICS[predictions.spec.name]
    if metrics.point:
        return metrics.point(predictions)
    once = np.ones((len(predictions.labels), 1), np.float32)
    return {name: x[0] for part in metrics.parts for name, x in part(predictions, once).items()}


def confusion(predictions: Predictions) -> np.ndarray:
    """Counts [K, K] of a task that predicts one class; rows are true classes, columns predicted ones."""
    classes, answer = len(predictions.spec.class_names), METRICS[predictions.spec.name].answer(predictions)
    return np.bincount(classes * predictions.labels + answer, minlength=classes**2).reshape(classes, classes)


def summarize(predictions: Predictions, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> dict:
    """Every metric with its interval, as plain JSON-able data (undefined numbers are None).

    Intervals are percentiles of the bootstrap over examples (Efron 1979), with the same resamples for all metrics.
    Each of `scalar_names` is {"value", "low", "high"}; also count; a list of rows per_class, per_label or per_target;
    confusion (rows: true, columns: predicted); level, resamples, seed. docs/metrics.md has the definitions.
    """
    _check(resamples, level)
    metrics, value = METRICS[predictions.spec.name], point(predictions)
    chunks = [
        {name: sample for part in metrics.parts for name, sample in part(predictions, weights).items()}
        for weights in resample(len(predictions.labels), resamples, seed)
    ]
    samples = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in value}
    found = {name: interval(value[name], samples[name], level) for name in value if np.ndim(value[name]) == 0}
    if metrics.rows:
        found[f"per_{metrics.rows.noun}"] = _table(predictions, value, samples, level)
    if metrics.answer:
        found["confusion"] = confusion(predictions).tolist()
    return {"count": len(predictions.labels), **found, "level": level, "resamples": resamples, "seed": seed}


def _table(predictions, value, samples, level) -> list[dict]:
    noun, columns, support, suffix = METRICS[predictions.spec.name].rows
    rows = [{noun: name} for name in predictions.spec.class_names]
    for k, row in enumerate(rows):
        if support:
            row["support"] = int(support(predictions)[k])
        row |= {name: interval(value[name + suffix][k], samples[name + suffix][:, k], level) for name in columns}
    return rows


def paired_difference(
    a: Predictions, b: Predictions, *, metric: str = "", resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict:
    """A scalar metric of a minus that of b on the same examples (matched by id): {"value", "low", "high"}.

    Both models see the same resamples, so what is hard for both cancels. metric: "" is the monitored one. ValueError
    for different examples, labels or classes, or an unknown metric.
    """
    _check(resamples, level)
    order = dict(zip(b.ids.tolist(), range(len(b.ids)), strict=True))
    if unmatched := sorted(set(order).symmetric_difference(a.ids.tolist())):
        raise ValueError(f"a paired comparison needs the same examples; {len(unmatched)} are in one: {unmatched[:5]}")
    order = [order[name] for name in a.ids.tolist()]
    same = (a.spec.name, a.spec.class_names) == (b.spec.name, b.spec.class_names)
    if not same or not np.array_equal(a.labels, b.labels[order]):
        raise ValueError("a paired comparison needs the same classes and labels; these two runs disagree about them")
    b = b._replace(outputs={name: x[order] for name, x in b.outputs.items()}, labels=a.labels, ids=a.ids)
    metrics, once = METRICS[a.spec.name], np.ones((len(order), 1), np.float32)
    metric = metric or metrics.monitor[0][0]
    parts = {name: part for part in metrics.parts for name, x in part(a, once).items() if x.ndim == 1}
    if metric not in parts:
        raise ValueError(f"unknown metric {metric!r}{nearest(metric, parts)}; known: {', '.join(parts)}")
    samples = [np.subtract(*(parts[metric](p, weights)[metric] for p in (a, b)))
               for weights in resample(len(order), resamples, seed)]  # fmt: skip
    return interval(point(a)[metric] - point(b)[metric], np.concatenate(samples), level)


def direction(metric: str) -> int:
    """1 where more of a metric is better, -1 where less is; "NAME/metric" is that of a set of data.extra_eval."""
    return -1 if metric.rpartition("/")[2] in _LESS else 1


def share_interval(name: str, value: float | None, count: int) -> dict[str, float]:
    """{"low", "high"}: the 95 % score interval (Wilson 1927) of the monitored metric if it is a share, otherwise {}."""
    if METRICS[name].monitor[0][0] != "accuracy" or value is None:
        return {}
    return dict(zip(("low", "high"), wilson(value, count), strict=True))


def scalar_names(name: str) -> tuple[str, ...]:
    """The scalars that `summarize` gives for a task; of a classification top5 only for more than five classes."""
    _check_name(name)
    return METRICS[name].scalars


def _check_name(name: str) -> None:
    if name not in METRICS:
        raise ValueError(f"there is no task {name!r}{nearest(str(name), NAMES)}; known: {', '.join(NAMES)}")


def _check(resamples, level):
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples={resamples}, level={level}: expected at least 1, and a level between 0 and 1")
