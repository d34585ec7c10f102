"""Retrieval between two inputs: at which place each finds its own among all of the other kind, in numpy."""

import numpy as np

from tl_jax.tasks.intervals import interval, resample, resampled_mean

AT = (1, 5, 10)  # places up to which a recall counts
PART = 2**22  # similarities in memory at a time


def ranks(queries: np.ndarray, found: np.ndarray, own: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The place, from 1, of the best own item of each query [Q] among all items, by the product of their vectors.

    queries [Q, D], found [M, D]: of length 1. own [Q], of [M]: identities; an item of a query has the same. Items of
    others with an equal product come first, so that equal vectors are no success.
    """
    queries, found = queries.astype(np.float64), found.astype(np.float64)
    parts = np.array_split(np.arange(len(queries)), len(queries) * len(found) // PART + 1)
    places = []
    for part in parts:
        similar, mine = queries[part] @ found.T, own[part][:, None] == of
        best = np.where(mine, similar, -np.inf).max(axis=1, keepdims=True)
        places.append(1 + (~mine & (similar >= best)).sum(axis=1))
    return np.concatenate(places)


def both(model: np.ndarray, other: np.ndarray, identity: np.ndarray, shared: str = "") -> dict[str, np.ndarray]:
    """{"model_to_other", "other_to_model"}: ranks of the queries that an input gives in N pairs of vectors [N, D].

    identity [N]: of what stands in several pairs, such as an image with several captions. It is one query, and one item
    that is found, in the input that is `shared`, "model" or "other"; its pairs are all hits. "": none is.
    """
    first = np.unique(identity, return_index=True)[1] if shared else np.arange(len(identity))
    places = {name: first if name == shared else np.arange(len(identity)) for name in ("model", "other")}
    vectors = {"model": model, "other": other}
    found = {}
    for a, b in (("model", "other"), ("other", "model")):
        i, j = places[a], places[b]
        found[f"{a}_to_{b}"] = ranks(vectors[a][i], vectors[b][j], identity[i], identity[j])
    return found


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
