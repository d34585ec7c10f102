"""Binary classification: one sigmoid output, the probability of class 1 (the positive)."""

import numpy as np

from tl_jax.tasks.intervals import average_precision, bin_of, binned, group_sum, point_of, roc_auc
from tl_jax.tasks.predictions import Predictions
from tl_jax.tasks.task import Metrics, Spec, Task

ECE_BINS = 15
THRESHOLD = 0.5


def make(spec: Spec, label_smoothing: float, pos_weight: tuple[float, ...]) -> Task:
    """Binary cross-entropy of logits [B] or [B, 1], its positives weighted by `pos_weight`."""
    import jax.numpy as jnp  # here, as jax takes its time and metrics do without it

    from tl_jax.tasks import losses

    weight, threshold = (pos_weight or (1.0,))[0], THRESHOLD if spec.threshold is None else spec.threshold
    positive_from = float(np.log(threshold) - np.log1p(-threshold))

    def logits_of(outputs):
        return outputs["logits"].reshape(outputs["logits"].shape[0]).astype(jnp.float32)

    def running(outputs, labels):
        return {"accuracy": ((logits_of(outputs) >= positive_from) == labels).astype(jnp.float32)}

    return Task(
        spec=spec,
        outputs=1,
        encode=lambda labels: losses.smooth_binary(labels, label_smoothing),
        loss=lambda outputs, targets: losses.binary_cross_entropy(logits_of(outputs), targets, weight),
        count=losses.each_once,
        running=running,
        keep=lambda outputs: {"logits": logits_of(outputs)},
        scores=scores,
        monitor=METRICS.monitor,
        calibrate=calibrate,
        metrics=METRICS,
    )


def probability(predictions: Predictions) -> np.ndarray:
    """Of the positive, [N] float64."""
    logits = predictions.values.astype(np.float64)
    return np.exp(-np.logaddexp(0, -logits))


def answer(predictions: Predictions) -> np.ndarray:
    """The predicted class [N], 0 or 1: positive where the probability is at least the threshold of the spec."""
    threshold = predictions.spec.threshold
    return (probability(predictions) >= (THRESHOLD if threshold is None else threshold)).astype(np.int32)


def calibrate(predictions: Predictions) -> Spec:
    """The spec with the threshold of the highest F1, among equals the one nearest to 0.5; for predictions on val.

    Thresholds lie halfway between neighbouring probabilities. Unchanged where there is no positive or no negative.
    """
    p, labels = probability(predictions), predictions.labels
    if labels.min() == labels.max():
        return predictions.spec
    edges, place = np.unique(p, return_inverse=True)
    positives, examples = np.bincount(place, labels), np.bincount(place)
    true, guessed = (np.cumsum(x[::-1])[::-1] for x in (positives, examples))
    f1 = 2 * true / (labels.sum() + guessed)
    halfway = (edges + np.r_[0.0, edges[:-1]]) / 2
    halfway = np.where(halfway > np.r_[0.0, edges[:-1]], halfway, edges)  # neighbours with no number between them
    usable = np.flatnonzero((f1 == f1.max()) & (halfway > 0) & (halfway < 1))
    if not len(usable):
        return predictions.spec
    return predictions.spec._replace(threshold=float(halfway[usable[np.abs(halfway[usable] - 0.5).argmin()]]))


def scores(predictions: Predictions) -> dict[str, float]:
    """Cross-entropy (natural log, mean over examples) and the area under the ROC curve, in float64."""
    once = np.ones((len(predictions.labels), 1), np.float32)
    auc = roc_auc(predictions.values, predictions.labels == 1, once)
    return {"loss": float(_losses(predictions).mean()), "roc_auc": float(auc[0])}


def confusion(predictions: Predictions) -> np.ndarray:
    """Counts [2, 2]; rows are true classes, columns predicted ones, the negative first."""
    return np.bincount(2 * predictions.labels + answer(predictions), minlength=4).reshape(2, 2)


def reliability(predictions: Predictions, bins: int = ECE_BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, share of positives and mean probability [bins] of equal bins of the positive's probability; NaN if empty."""
    p = probability(predictions)
    return binned(bin_of(p, bins), predictions.labels, p, bins)


def _losses(predictions):
    """Cross-entropy of each example in float64, unclipped."""
    signed = np.where(predictions.labels == 1, -1.0, 1.0) * predictions.values.astype(np.float64)
    return np.logaddexp(0, signed)


def _weighted(predictions, weights) -> dict:
    labels, p = predictions.labels, probability(predictions)
    counts = group_sum(2 * labels + answer(predictions), 4, weights).astype(np.float64)
    (tn, fp, fn, tp), total = counts, weights.sum(axis=0)
    positives, negatives = tp + fn, tn + fp
    recall = np.where(positives > 0, tp / np.maximum(positives, 1), np.nan)
    specificity = np.where(negatives > 0, tn / np.maximum(negatives, 1), np.nan)
    error = group_sum(bin_of(p, ECE_BINS), ECE_BINS, weights, values=labels - p)
    return {
        "accuracy": (tp + tn) / total,
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": np.where(positives > 0, tp / np.maximum(tp + fp, 1), np.nan),  # nothing predicted positive: 0
        "recall": recall,
        "specificity": specificity,
        "f1": np.where(positives > 0, 2 * tp / np.maximum(2 * tp + fp + fn, 1), np.nan),
        "nll": _losses(predictions) @ weights / total,
        "ece": np.abs(error).sum(axis=0) / total,
    }


def _weighted_areas(predictions, weights) -> dict:
    logits, positive = predictions.values, predictions.labels == 1
    areas = {"roc_auc": roc_auc, "average_precision": average_precision}
    return {name: area(logits, positive, weights) for name, area in areas.items()}


METRICS = Metrics(
    scalars=(
        "accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1", "nll", "ece", "roc_auc",
        "average_precision",
    ),
    less=("nll", "ece"),
    monitor=(("roc_auc", "max"), ("loss", "min")),
    scores=scores,
    point=point_of(_weighted, _weighted_areas),
    parts=(_weighted, _weighted_areas),
    differ=lambda a, b: answer(a) != answer(b),
    confusion=confusion,
)  # fmt: skip
