"""The one bootstrap that all metrics share (Efron 1979), and the weighted sums that they are made of."""

from collections.abc import Iterator

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.tasks.predictions import Predictions

CHUNK = 2**22  # weights in memory at a time: 16 MiB in float32
BINS = 15  # of probabilities, for calibration


def resample(count: int, resamples: int, seed: int, groups: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yields [N, B] float32: how often each example is in each of B resamples of N, in chunks that fit the memory.

    With groups [N] it is these that are drawn, each whole (the cluster bootstrap: Davison and Hinkley 1997, section
    3.8), as the examples of a group are not independent.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected at least 1")
    rng, size = np.random.default_rng(seed), max(1, CHUNK // count)
    member = slice(None) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = count if groups is None else member.max() + 1
    for start in range(0, resamples, size):
        columns = min(size, resamples - start)
        sampled = rng.integers(count, size=(columns, count))
        flat = (sampled * columns + np.arange(columns)[:, None]).ravel()
        yield np.bincount(flat, minlength=count * columns).reshape(count, columns).astype(np.float32)[member]


def interval(value: float, samples: np.ndarray, level: float) -> dict:
    """The point estimate and the percentiles of the resamples where it is defined; None for what is not."""
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a number between 0 and 1")
    samples = samples[~np.isnan(samples)]
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2]).tolist() if len(samples) else (None, None)
    return {"value": None if np.isnan(value) else float(value), "low": low, "high": high}


def resampled_mean(
    values: np.ndarray, *, resamples: int = 1000, seed: int = 0, groups: np.ndarray | None = None, level: float = 0.95
) -> dict:
    """The mean of values [N] over examples, and its interval; see `resample`."""
    chunks = [values @ w / w.sum(0) for w in resample(len(values), resamples, seed, groups)]
    return interval(float(np.mean(values)), np.concatenate(chunks), level)


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


def _bins_of(probability):
    """The place of each probability among BINS equal bins (m/M, (m+1)/M]."""
    return np.clip(np.ceil(probability * BINS).astype(int) - 1, 0, BINS - 1)


def binned(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, ...]:
    """Count, mean observed and mean expected value of the examples of each bin of the expected; NaN where empty."""
    index = _bins_of(expected)
    count = np.bincount(index, minlength=BINS)
    total = np.where(count, count, np.nan)
    return count, *(np.bincount(index, x, minlength=BINS) / total for x in (observed, expected))


def calibration_error(observed: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The expected calibration error over the bins of the expected [B] (Guo et al. 2017, equation 3)."""
    gaps = group_sum(_bins_of(expected), BINS, weights, values=observed - expected)
    return np.abs(gaps).sum(axis=0) / weights.sum(axis=0)


def sigmoid_losses(predictions: Predictions) -> np.ndarray:
    """Binary cross-entropy of each logit in float64, unclipped."""
    return np.logaddexp(0, np.where(predictions.labels == 1, -1.0, 1.0) * predictions.values.astype(np.float64))


def rates(hit: np.ndarray, support: np.ndarray, guessed: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of counts; NaN without support, and precision 0 where nothing is guessed."""
    denominators = {"precision": guessed, "recall": support, "f1": (support + guessed) / 2}
    return {name: np.where(support > 0, hit / np.maximum(x, 0.5), np.nan) for name, x in denominators.items()}


def mean_defined(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over an axis of what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.where(defined, values, 0).sum(axis=axis) / defined.sum(axis=axis)
