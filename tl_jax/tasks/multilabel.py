"""Multi-label classification: K labels, each present or absent, each with a sigmoid output of its own."""

import numpy as np

from tl_jax.tasks.intervals import average_precision, mean_defined, rates, sigmoid_losses
from tl_jax.tasks.predictions import Predictions
from tl_jax.tasks.task import Metrics, Rows


def answer(predictions: Predictions) -> np.ndarray:
    """Whether each label is predicted [N, K]: its probability is above one half."""
    return predictions.values > 0


def scores(predictions: Predictions) -> dict[str, float]:
    """Cross-entropy (natural log, mean over examples and labels) and mean average precision, in float64."""
    precision = _weighted_precision(predictions, np.ones((len(predictions.labels), 1), np.float32))
    return {
        "loss": float(sigmoid_losses(predictions).mean()),
        "mean_average_precision": float(precision["mean_average_precision"][0]),
    }


def _weighted(predictions, weights) -> dict:
    labels, guess, total = predictions.labels == 1, answer(predictions), weights.sum(axis=0)
    hit, support, guessed = (x.astype(np.float64).T @ weights for x in (labels & guess, labels, guess))
    each = {name: rate.T for name, rate in rates(hit, support, guessed).items()}
    wrong = labels != guess
    return each | {
        "f1_macro": mean_defined(each["f1"], axis=1),
        "f1_micro": rates(*(x.sum(axis=0) for x in (hit, support, guessed)))["f1"],
        "subset_accuracy": (~wrong.any(axis=1)).astype(np.float64) @ weights / total,
        "hamming_loss": wrong.mean(axis=1) @ weights / total,
    }


def _weighted_precision(predictions, weights) -> dict:
    pairs = zip(predictions.values.T, (predictions.labels == 1).T, strict=True)
    each = np.stack([average_precision(logits, positive, weights) for logits, positive in pairs], axis=1)
    return {"average_precision": each, "mean_average_precision": mean_defined(each, axis=1)}


METRICS = Metrics(
    scalars=("f1_macro", "f1_micro", "subset_accuracy", "hamming_loss", "mean_average_precision"),
    less=("hamming_loss",),
    monitor=(("mean_average_precision", "max"), ("loss", "min")),
    scores=scores,
    parts=(_weighted, _weighted_precision),
    differ=lambda a, b: (answer(a) != answer(b)).any(axis=1),
    rows=Rows("label", ("precision", "recall", "f1", "average_precision"), lambda p: p.labels.sum(axis=0)),
)
