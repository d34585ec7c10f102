"""Binary classification: one sigmoid output, the probability of class 1 (the positive)."""

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.tasks import intervals
from tl_jax.tasks.intervals import calibration_error, group_sum, rates, sigmoid_losses
from tl_jax.tasks.predictions import Predictions
from tl_jax.tasks.task import Metrics, Spec


def threshold_of(spec: Spec) -> float:
    """The probability from which a prediction is positive."""
    return 0.5 if spec.threshold is None else spec.threshold


def probability(predictions: Predictions) -> np.ndarray:
    """Of the positive, [N] float64."""
    return np.exp(scipy.special.log_expit(predictions.values.astype(np.float64)))


def answer(predictions: Predictions) -> np.ndarray:
    """The predicted class [N], 0 or 1: positive where the probability is at least the threshold of the spec."""
    return (probability(predictions) >= threshold_of(predictions.spec)).astype(np.int32)


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
    f1, lower = 2 * true / (labels.sum() + guessed), np.r_[0.0, edges[:-1]]
    halfway = (edges + lower) / 2
    halfway = np.where(halfway > lower, halfway, edges)  # neighbours with no number between them
    usable = halfway[(f1 == f1.max()) & (halfway > 0) & (halfway < 1)]
    if not len(usable):
        return predictions.spec
    return predictions.spec._replace(threshold=float(usable[np.abs(usable - 0.5).argmin()]))


def scores(predictions: Predictions) -> dict[str, float]:
    """Cross-entropy (natural log, mean over examples) and the area under the ROC curve, in float64."""
    once = np.ones((len(predictions.labels), 1), np.float32)
    auc = intervals.roc_auc(predictions.values, predictions.labels == 1, once)
    return {"loss": float(sigmoid_losses(predictions).mean()), "roc_auc": float(auc[0])}


def reliability(predictions: Predictions) -> tuple[np.ndarray, ...]:
    """Count, share of positives and mean probability of equal bins of the probability; NaN where empty."""
    return intervals.binned(predictions.labels, probability(predictions))


def _weighted(predictions, weights) -> dict:
    labels, p = predictions.labels, probability(predictions)
    counts = group_sum(2 * labels + answer(predictions), 4, weights).astype(np.float64)
    (tn, fp, fn, tp), total = counts, weights.sum(axis=0)
    of_positives, specificity = rates(tp, tp + fn, tp + fp), rates(tn, tn + fp, tn + fn)["recall"]
    return {
        **of_positives,
        "accuracy": (tp + tn) / total,
        "balanced_accuracy": (of_positives["recall"] + specificity) / 2,
        "specificity": specificity,
        "nll": sigmoid_losses(predictions) @ weights / total,
        "ece": calibration_error(labels, p, weights),
    }


def _weighted_areas(predictions, weights) -> dict:
    given = predictions.values, predictions.labels == 1, weights
    return {"roc_auc": intervals.roc_auc(*given), "average_precision": intervals.average_precision(*given)}


METRICS = Metrics(
    scalars=(
        "accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1", "nll", "ece", "roc_auc",
        "average_precision",
    ),
    less=("nll", "ece"),
    monitor=(("roc_auc", "max"), ("loss", "min")),
    scores=scores,
    parts=(_weighted, _weighted_areas),
    differ=lambda a, b: answer(a) != answer(b),
    answer=answer,
    reliability=(reliability, ("share of positives", "probability of the positive")),
    calibrate=calibrate,
)  # fmt: skip
