"""Regression of one or several targets; the network predicts them standardised, predictions hold their own units."""

import numpy as np

from tl_jax.tasks.intervals import group_sum, mean_defined
from tl_jax.tasks.predictions import Predictions
from tl_jax.tasks.task import Metrics, Rows

CHANGED = 0.01  # standard deviations of a target from which on two predictions differ


def fit_targets(labels: np.ndarray, names: tuple[str, ...], shares: bool = False) -> tuple[tuple[float, ...], ...]:
    """Mean and standard deviation of each target over training labels [N] or [N, T]; ValueError for a constant one.

    shares: minimum and range in place of these.
    """
    labels = np.asarray(labels, np.float64).reshape(len(labels), -1)
    if labels.shape[1] != len(names) or not np.isfinite(labels).all():
        raise ValueError(f"targets {labels.shape}, expected finite numbers [N, {len(names)}] for {', '.join(names)}")
    if constant := [name for name, column in zip(names, labels.T, strict=True) if (column == column[0]).all()]:
        raise ValueError(f"the training targets of {', '.join(constant)} are all equal: nothing can be learned of them")
    found = (labels.min(axis=0), np.ptp(labels, axis=0)) if shares else (labels.mean(axis=0), labels.std(axis=0))
    return tuple(tuple(each.tolist()) for each in found)


def scores(predictions: Predictions) -> dict[str, float]:
    """Squared error of the standardised targets and RMSE in their units, both means over the targets, in float64."""
    squared = (predictions.values.astype(np.float64) - predictions.labels) ** 2
    return {
        "loss": float((squared / np.square(predictions.spec.target_std)).mean()),
        "rmse": float(np.sqrt(squared.mean(axis=0)).mean()),
    }


def _weighted(predictions, weights) -> dict:
    """RMSE, MAE and R2 of each target, [B, T]. R2 is undefined in a resample whose target is constant."""
    labels, total = predictions.labels.astype(np.float64), weights.sum(axis=0)
    error = predictions.values.astype(np.float64) - labels
    squared, absolute = (error.T**2) @ weights, np.abs(error).T @ weights
    r2 = 1 - squared / np.stack([_spread(column, weights, total) for column in labels.T])
    return _with_means(rmse_each=np.sqrt(squared / total).T, mae_each=(absolute / total).T, r2_each=r2.T)


def _spread(values, weights, total):
    """The weighted sum of squared deviations from the mean [B]; NaN where all sampled values are the same."""
    mean = values @ weights / total
    spread = (np.square(values[:, None] - mean) * weights).sum(axis=0)
    rounding = total * (8 * np.finfo(np.float64).eps * np.abs(values).max()) ** 2
    return np.where(spread > rounding, spread, np.nan)


def _weighted_ranks(predictions, weights) -> dict:
    pairs = zip(predictions.labels.T, predictions.values.T, strict=True)
    return _with_means(spearman_each=np.stack([_spearman(y, x, weights) for y, x in pairs], axis=1))


def _spearman(a, b, weights):
    """Spearman's rank correlation in each resample [B], ties by mean ranks; NaN where one side is constant."""
    a, b = _centred_ranks(a, weights), _centred_ranks(b, weights)
    product = (a * b * weights).sum(axis=0)
    scale = (a * a * weights).sum(axis=0) * (b * b * weights).sum(axis=0)
    return np.where(scale > 0, product / np.sqrt(np.maximum(scale, 0.25)), np.nan)


def _centred_ranks(values, weights):
    """The mean rank of each example within each resample [N, B], minus the mean of all ranks."""
    distinct, place = np.unique(values, return_inverse=True)
    copies = group_sum(place, len(distinct), weights).astype(np.float64)
    rank = np.cumsum(copies, axis=0) - (copies - 1) / 2
    return rank[place] - (weights.sum(axis=0) + 1) / 2


def _with_means(**each):
    """Metrics of each target, NAME_each [B, T], and their means over the targets where they are defined, [B]."""
    return each | {name.removesuffix("_each"): mean_defined(values, axis=1) for name, values in each.items()}


METRICS = Metrics(
    scalars=("rmse", "mae", "r2", "spearman"),
    less=("rmse", "mae"),
    monitor=(("rmse", "min"), ("loss", "min")),
    scores=scores,
    parts=(_weighted, _weighted_ranks),
    differ=lambda a, b: (np.abs(a.values - b.values) > CHANGED * np.asarray(a.spec.target_std)).any(axis=1),
    loss_label="loss (squared error, standardised)",
    rows=Rows("target", ("rmse_each", "mae_each", "r2_each", "spearman_each")),
)
