"""What a head predicts, and what follows from it: the loss, the log, metrics with intervals, the metric that selects.

No other room names a metric. Scoring needs no jax; `make` does.
"""

import numpy as np

from tl_jax.core.messages import nearest
from tl_jax.tasks import binary, classification, intervals, multilabel, regression
from tl_jax.tasks.predictions import LEAST, Predictions, load_predictions, make_predictions, save_predictions
from tl_jax.tasks.tables import format_classes, format_table
from tl_jax.tasks.task import Metrics, Spec, Task, card_fields, preference, spec_of, spec_problems

__all__ = [
    "CALIBRATION", "CONFUSION", "METRICS", "NAMES", "RELIABILITY", "Metrics", "Predictions", "Spec", "Task",
    "card_fields", "direction", "fit_spec", "format_classes", "format_table", "load_predictions", "make",
    "make_predictions", "paired_difference", "preference", "save_predictions", "scalar_names", "scores",
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
# Predictions -> count, observed share and expected share of each bin; and what these two are called.
RELIABILITY = {
    "classification": (classification.reliability, ("accuracy", "confidence")),
    "binary": (binary.reliability, ("share of positives", "probability of the positive")),
}
CONFUSION = {name: metrics.confusion for name, metrics in METRICS.items() if metrics.confusion}
_LESS = {"loss", *(name for metrics in METRICS.values() for name in metrics.less)}


def make(
    spec: Spec,
    *,
    label_smoothing: float = 0.0,
    class_weight: tuple[float, ...] = (),
    pos_weight: tuple[float, ...] = (),
) -> Task:
    """The task of a spec.

    class_weight: of a classification, one number a class; the loss stays a plain mean over the examples, see
    `classification.make`. pos_weight: of the positives of a binary task (one number) or of each label (multilabel).
    Raises one ValueError for a spec or weights that do not fit.
    """
    _check_name(spec.name)
    problems = spec_problems(spec, LEAST)
    sizes = {"binary": 1, "multilabel": len(spec.class_names)}
    problems += _weight_problems("class_weight", class_weight, {"classification": len(spec.class_names)}, spec.name)
    problems += _weight_problems("pos_weight", pos_weight, sizes, spec.name)
    if label_smoothing and (spec.name == "regression" or not 0 <= label_smoothing < 1):
        problems.append(f"label_smoothing={label_smoothing}: expected 0 .. 1, below 1; 0 for a regression")
    if problems:
        raise ValueError(f"this {spec.name} task cannot be made: {'; '.join(problems)}")
    if spec.name == "classification":
        return classification.make(spec, label_smoothing, tuple(class_weight))
    if spec.name == "regression":
        return regression.make(spec)
    module = binary if spec.name == "binary" else multilabel
    return module.make(spec, label_smoothing, tuple(pos_weight))


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
    class_names = tuple(map(str, class_names)) or (("0", "1") if name == "binary" else ())
    spec = Spec(name, class_names)
    if name == "regression":
        mean, std = regression.fit_targets(labels, class_names)
        spec = spec._replace(target_mean=mean, target_std=std)
    if problems := spec_problems(spec, LEAST):
        raise ValueError("; ".join(problems))
    return spec


def summarize(predictions: Predictions, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> dict:
    """Every metric with its interval, as plain JSON-able data (undefined numbers are None).

    Intervals are percentiles of the bootstrap over examples (Efron 1979), with the same resamples for all metrics.
    Each of `scalar_names` is {"value", "low", "high"}; also count; a list of rows per_class, per_label or per_target;
    confusion (rows: true, columns: predicted); level, resamples, seed. docs/metrics.md has the definitions.
    """
    metrics = METRICS[predictions.spec.name]
    return intervals.summarize(metrics, predictions, resamples=resamples, level=level, seed=seed)


def paired_difference(
    a: Predictions, b: Predictions, *, metric: str = "", resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict:
    """A scalar metric of a minus that of b on the same examples (matched by id): {"value", "low", "high"}.

    Both models see the same resamples, so what makes an example hard for both cancels: the interval is narrower than
    two separate ones suggest. metric: "" is the monitored one. Raises ValueError for different examples, labels or
    classes, or an unknown metric.
    """
    metrics = METRICS[a.spec.name]
    metric = metric or metrics.monitor[0][0]
    return intervals.paired_difference(metrics, a, b, metric=metric, resamples=resamples, level=level, seed=seed)


def scores(predictions: Predictions) -> dict[str, float]:
    """The loss, without weights and smoothing, and the monitored metric, in float64: for model selection."""
    return METRICS[predictions.spec.name].scores(predictions)


def direction(metric: str) -> int:
    """1 where more of a metric is better, -1 where less is; "NAME/metric" is that of a further set."""
    return -1 if metric.rpartition("/")[2] in _LESS else 1


def share_interval(name: str, value: float | None, count: int) -> dict[str, float]:
    """{"low", "high"}: the 95 % score interval of the monitored metric on `count` examples, where it is a share of them
    (Wilson 1927); else {}."""
    if METRICS[name].monitor[0][0] != "accuracy" or value is None:
        return {}
    return dict(zip(("low", "high"), intervals.wilson(value, count), strict=True))


def scalar_names(name: str) -> tuple[str, ...]:
    """The scalars that `summarize` gives for a task; of a classification top5 only for more than five classes."""
    _check_name(name)
    return METRICS[name].scalars


def _check_name(name: str) -> None:
    if name not in METRICS:
        raise ValueError(f"there is no task {name!r}{nearest(str(name), NAMES)}; known: {', '.join(NAMES)}")
