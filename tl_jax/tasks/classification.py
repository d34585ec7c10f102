"""Classification: one of K classes, softmax and cross-entropy."""

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.tasks.intervals import binned, calibration_error, group_sum, mean_defined, rates, roc_auc
from tl_jax.tasks.predictions import Predictions
from tl_jax.tasks.task import Metrics, Rows


def answer(predictions: Predictions) -> np.ndarray:
    """The predicted class [N]; the lower one on a tie."""
    return predictions.values.argmax(1)


def scores(predictions: Predictions) -> dict[str, float]:
    """Accuracy and negative log-likelihood (natural log, mean over examples) in float64."""
    labels, log_p = predictions.labels, _log_probabilities(predictions)
    return {
        "loss": float(-log_p[np.arange(len(labels)), labels].mean()),
        "accuracy": float((answer(predictions) == labels).mean()),
    }


def reliability(predictions: Predictions) -> tuple[np.ndarray, ...]:
    """Count, accuracy and mean confidence of equal-width bins of the confidence (Guo et al. 2017); NaN where empty."""
    confidence = np.exp(_log_probabilities(predictions).max(axis=1))
    return binned(answer(predictions) == predictions.labels, confidence)


def _log_probabilities(predictions):
    """Log-softmax in float64, unclipped: a confident mistake keeps its whole cost."""
    return scipy.special.log_softmax(predictions.values.astype(np.float64), axis=1)


def _log_odds(predictions):
    """Log p/(1-p) of each class [N, K]: ranks like the probability, but confident examples do not tie at 1."""
    log_p = _log_probabilities(predictions)
    rest = np.log1p(-np.minimum(np.exp(log_p), 0.9))  # exact up to 0.9; beyond, from the other classes' own sum:
    row, top = np.nonzero(log_p > np.log(0.9))
    others = log_p[row]
    others[np.arange(len(row)), top] = -np.inf
    rest[row, top] = scipy.special.logsumexp(others, axis=1)
    return log_p - rest


def _in_top(predictions, k):
    """Whether the label is among the k largest logits; ties go to the lower class, as in argmax."""
    logits, labels = predictions.values, predictions.labels[:, None]
    own = np.take_along_axis(logits, labels, axis=1)
    ahead = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels))
    return ahead.sum(axis=1) < k


def _weighted(predictions, weights) -> dict:
    labels, predicted, log_p = predictions.labels, answer(predictions), _log_probabilities(predictions)
    classes, total, hit = log_p.shape[1], weights.sum(axis=0), predicted == labels
    accuracy = hit.astype(np.float64) @ weights / total
    # With one label and one guess for each example, all micro averages are the accuracy.
    result = {"accuracy": accuracy, **{f"{name}_micro": accuracy for name in _RATES}}
    if classes > 5:
        result["top5"] = _in_top(predictions, 5).astype(np.float64) @ weights / total
    true_positive = group_sum(labels[hit], classes, weights, np.flatnonzero(hit)).astype(np.float64)
    support, guessed = group_sum(labels, classes, weights), group_sum(predicted, classes, weights)
    for name, rate in rates(true_positive, support, guessed).items():
        result[name], result[f"{name}_macro"] = rate.T, np.nanmean(rate, axis=0)
    nll = -log_p[np.arange(len(labels)), labels] @ weights / total
    return result | {"nll": nll, "ece": calibration_error(hit, np.exp(log_p.max(axis=1)), weights)}


def _weighted_auc(predictions, weights) -> dict:
    score = _log_odds(predictions)
    auc = np.stack([roc_auc(score[:, k], predictions.labels == k, weights) for k in range(score.shape[1])], axis=1)
    return {"roc_auc": auc, "roc_auc_macro": mean_defined(auc, axis=1)}


_RATES = ("precision", "recall", "f1")
METRICS = Metrics(
    scalars=(
        "accuracy", "top5", *(f"{name}_macro" for name in _RATES), *(f"{name}_micro" for name in _RATES),
        "roc_auc_macro", "nll", "ece",
    ),
    less=("nll", "ece"),
    monitor=(("accuracy", "max"), ("loss", "min")),
    scores=scores,
    parts=(_weighted, _weighted_auc),
    differ=lambda a, b: answer(a) != answer(b),
    rows=Rows("class", (*_RATES, "roc_auc"), lambda p: np.bincount(p.labels, minlength=len(p.spec.class_names))),
    answer=answer,
    reliability=(reliability, ("accuracy", "confidence")),
)  # fmt: skip
