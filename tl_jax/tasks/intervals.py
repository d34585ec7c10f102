"""The one bootstrap over examples that all metrics share (Efron 1979), and sums over resamples that metrics are made of."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.core.messages import nearest
from tl_jax.tasks.predictions import Predictions
from tl_jax.tasks.task import Metrics

CHUNK = 2**22  # weights held at a time: 16 MiB in float32


def summarize(
    metrics: Metrics, predictions: Predictions, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict:
    """Every metric with its interval; see `tl_jax.tasks.summarize`."""
    _check(resamples, level)
    value = metrics.point(predictions)
    chunks = [
        {name: sample for part in metrics.parts for name, sample in part(predictions, weights).items()}
        for weights in resample(len(predictions.labels), resamples, seed)
    ]
    samples = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in value}
    scalars = {name: interval(value[name], samples[name], level) for name in value if np.ndim(value[name]) == 0}
    tables = {f"per_{metrics.rows.noun}": _table(metrics, predictions, value, samples, level)} if metrics.rows else {}
    tables |= {"confusion": metrics.confusion(predictions).tolist()} if metrics.confusion else {}
    return {
        "count": len(predictions.labels),
        **scalars,
        **tables,
        "level": level,
        "resamples": resamples,
        "seed": seed,
    }


def _table(metrics, predictions, value, samples, level) -> list[dict]:
    rows = [{metrics.rows.noun: name} for name in predictions.spec.class_names]
    if metrics.rows.support:
        for row, count in zip(rows, metrics.rows.support(predictions), strict=True):
            row["support"] = int(count)
    for name in metrics.rows.metrics:
        full = f"{name}{metrics.rows.suffix}"
        for k, row in enumerate(rows):
            row[name] = interval(value[full][k], samples[full][:, k], level)
    return rows


def paired_difference(
    metrics: Metrics,
    a: Predictions,
    b: Predictions,
    *,
    metric: str,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict:
    """A scalar metric of a minus that of b on the same resamples; see `tl_jax.tasks.paired_difference`."""
    _check(resamples, level)
    order = dict(zip(b.ids.tolist(), range(len(b.ids)), strict=True))
    if unmatched := sorted(set(order).symmetric_difference(a.ids.tolist())):
        raise ValueError(f"a paired comparison needs the same examples; {len(unmatched)} are in one: {unmatched[:5]}")
    order = [order[name] for name in a.ids.tolist()]
    same = (a.spec.name, a.spec.class_names) == (b.spec.name, b.spec.class_names)
    if not same or not np.array_equal(a.labels, b.labels[order]):
        raise ValueError("a paired comparison needs the same classes and labels; these two runs disagree about them")
    b = b._replace(outputs={name: x[order] for name, x in b.outputs.items()}, labels=a.labels, ids=a.ids)
    part = _part_with(metrics, a, metric)
    samples = [part(a, weights)[metric] - part(b, weights)[metric] for weights in resample(len(order), resamples, seed)]
    return interval(metrics.point(a)[metric] - metrics.point(b)[metric], np.concatenate(samples), level)


def _part_with(metrics: Metrics, predictions: Predictions, metric: str) -> Callable:
    """The one of `metrics.parts` that gives a scalar metric."""
    once = np.ones((len(predictions.labels), 1), np.float32)
    found = {name: part for part in metrics.parts for name, x in part(predictions, once).items() if x.ndim == 1}
    if metric not in found:
        raise ValueError(f"unknown metric {metric!r}{nearest(metric, found)}; known: {', '.join(found)}")
    return found[metric]


def point_of(*parts: Callable) -> Callable:
    """The point estimates of `Metrics.parts`: every example once."""

    def point(predictions: Predictions) -> dict:
        once = np.ones((len(predictions.labels), 1), np.float32)
        return {name: x[0] for part in parts for name, x in part(predictions, once).items()}

    return point


def resample(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields [N, B] float32: how often each example is drawn in B resamples of N, in chunks that fit the memory."""
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // count)
    for start in range(0, resamples, size):
        columns = min(size, resamples - start)
        drawn = rng.integers(count, size=(columns, count))
        flat = (drawn * columns + np.arange(columns)[:, None]).ravel()
        yield np.bincount(flat, minlength=count * columns).reshape(count, columns).astype(np.float32)


def interval(value: float, samples: np.ndarray, level: float) -> dict:
    """The point estimate and the percentiles of the resamples where it is defined; None for what is not."""
    samples = samples[~np.isnan(samples)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(samples, tails).tolist() if len(samples) else (None, None)
    return {"value": None if np.isnan(value) else float(value), "low": low, "high": high}


def bin_of(probability: np.ndarray, bins: int) -> np.ndarray:
    """The place of each probability among equal bins (m/M, (m+1)/M]."""
    return np.clip(np.ceil(probability * bins).astype(int) - 1, 0, bins - 1)


def group_sum(index, groups, weights, columns=None, values=None) -> np.ndarray:
    """Sums weights [N, B] (times values) by group: [groups, B]; example `columns[i]` is in group `index[i]`."""
    columns = np.arange(len(index)) if columns is None else columns
    values = np.ones(len(index), np.float32) if values is None else values
    return scipy.sparse.csr_matrix((values, (index, columns)), shape=(groups, len(weights))) @ weights


def roc_auc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted probability that a positive outscores a negative, ties one half (Mann-Whitney U / (P N)): [B].

    Negatives are summed between and on the m distinct scores of the positives (2 m + 1 groups), once for all resamples.
    """
    edges, rank = np.unique(score[positive], return_inverse=True)
    below = np.searchsorted(edges, score[~positive], "left") + np.searchsorted(edges, score[~positive], "right")
    negatives = group_sum(below, 2 * len(edges) + 1, weights, np.flatnonzero(~positive)).astype(np.float64)
    positives = group_sum(rank, len(edges), weights, np.flatnonzero(positive)).astype(np.float64)
    beaten = np.cumsum(negatives, axis=0)[:-1:2] + negatives[1::2] / 2
    pairs = positives.sum(axis=0) * negatives.sum(axis=0)
    return np.where(pairs > 0, (positives * beaten).sum(axis=0) / np.maximum(pairs, 1), np.nan)


def average_precision(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean precision at the positives, sum_n (R_n - R_{n-1}) P_n without interpolation: [B]; NaN without positives.

    Only a threshold at a positive's score adds recall, so that the m distinct scores of the positives suffice.
    """
    edges, rank = np.unique(score[positive], return_inverse=True)
    below = np.searchsorted(edges, score[~positive], "right")  # group g: above g edges
    negatives = group_sum(below, len(edges) + 1, weights, np.flatnonzero(~positive)).astype(np.float64)[1:]
    positives = group_sum(rank, len(edges), weights, np.flatnonzero(positive)).astype(np.float64)
    true, false = (np.cumsum(x[::-1], axis=0)[::-1] for x in (positives, negatives))
    total = positives.sum(axis=0)
    gained = (positives * true / np.maximum(true + false, 1)).sum(axis=0)
    return np.where(total > 0, gained / np.maximum(total, 1), np.nan)


def binned(index: np.ndarray, observed: np.ndarray, expected: np.ndarray, bins: int) -> tuple[np.ndarray, ...]:
    """Count, mean observed and mean expected value [bins] of the examples of each bin; NaN where it is empty."""
    count = np.bincount(index, minlength=bins)
    total = np.where(count, count, np.nan)
    return count, *(np.bincount(index, x, minlength=bins) / total for x in (observed, expected))


def mean_defined(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over an axis of what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.where(defined, values, 0).sum(axis=axis) / defined.sum(axis=axis)


def _check(resamples, level):
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples={resamples}, level={level}: expected at least 1, and a level between 0 and 1")


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a share of `count` examples (Wilson 1927)."""
    centre, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)
