"""Retrieval between two inputs: at which place each finds its own among all of the other kind, in numpy."""

import numpy as np

from tl_jax.tasks.intervals import interval, resample, resampled_mean

AT = (1, 5, 10)  # places up to which a recall counts
PART = 2**22  # similarities in memory at a time


def ranks(queries: np.ndarray, found: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The place, from 1, of the best hit of each query [Q] among all items, by the product of their vectors.

    queries [Q, D], found [M, D]: of length 1. pairs int [P, 2]: which item is a hit of which query. Items that are none
    and have an equal product come first, so that equal vectors are no success.
    """
    queries, found = queries.astype(np.float64), found.astype(np.float64)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    places = []
    for part in np.array_split(np.arange(len(queries)), len(queries) * len(found) // PART + 1):
        similar, hit = queries[part] @ found.T, np.zeros((len(part), len(found)), bool)
        own = pairs[slice(*np.searchsorted(pairs[:, 0], [part[0], part[-1] + 1]))]
        hit[own[:, 0] - part[0], own[:, 1]] = True
        best = np.where(hit, similar, -np.inf).max(axis=1, keepdims=True)
        places.append(1 + (~hit & (similar >= best)).sum(axis=1))
    return np.concatenate(places)


def both(
    model: np.ndarray, other: np.ndarray, model_identity: np.ndarray, other_identity: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"model_to_other", "other_to_model"}: (ranks, first partner) of the queries of N pairs of vectors [N, D].

    The identities [N] say what is one input in several pairs, such as an image with several captions: it is one query,
    one item that is found, and all its partners are hits. first partner: by it, queries can be drawn together.
    """
    (a_rows, a), (b_rows, b) = (
        np.unique(each, return_index=True, return_inverse=True)[1:] for each in (model_identity, other_identity)
    )
    pairs = np.stack([a, b], axis=1)
    return {
        "model_to_other": (ranks(model[a_rows], other[b_rows], pairs), b[a_rows]),
        "other_to_model": (ranks(other[b_rows], model[a_rows], pairs[:, ::-1]), a[b_rows]),
    }


def summarize(
    places: np.ndarray, groups: np.ndarray | None = None, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict:
    """{"queries", "recall@1", "recall@5", "recall@10", "median_rank"} of ranks [Q], with intervals over the queries.

    groups [Q]: queries that are not independent, such as the captions of one image, which are drawn together.
    """
    how = {"resamples": resamples, "seed": seed, "groups": groups, "level": level}
    found = {f"recall@{k}": resampled_mean((places <= k).astype(np.float64), **how) for k in AT}
    chunks = [_medians(places, w) for w in resample(len(places), resamples, seed, groups)]
    median = interval(float(np.median(places)), np.concatenate(chunks), level)
    return {"queries": len(places), **found, "median_rank": median}


def _medians(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The medians [B] of values [N] that count `weights` [N, B] times."""
    order = np.argsort(values, kind="stable")
    total = weights.sum(axis=0).astype(np.int64)
    ends = weights[order].cumsum(axis=0)
    middle = [(ends >= place).argmax(axis=0) for place in ((total + 1) // 2, total // 2 + 1)]
    return sum(values[order][at] for at in middle) / 2
