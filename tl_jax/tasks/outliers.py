"""Out-of-distribution scores, larger the further an example lies from what the network was trained on.

energy: minus the log of the summed exponentials of the logits (Liu et al. 2020). mahalanobis: the squared distance of
the features to the nearest class mean of train, under one covariance of all classes (Lee et al. 2018), shrunk (Ledoit
and Wolf 2004) as it must have an inverse for few examples too; without classes, to the one mean. knn: the distance to
the k-th nearest example of train (Sun et al. 2022). The last two are of features scaled to length 1, without which
either finds less (docs/trust.md has the comparison).
"""

from typing import NamedTuple

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.tasks.predictions import Predictions

SCORES = ("mahalanobis", "knn", "energy", "none")
NEIGHBOURS, KEPT = 5, 4096  # k of knn, and the examples of train that it keeps
FLOOR = 1e-6  # of the eigenvalues of the covariance, as a share of their mean


class Reference(NamedTuple):
    """What a score is measured from; both arrays are empty where it needs no features.

    points: float32 [C, R], class means in whitened coordinates; of knn float32 [M, D], examples of train. whiten:
    float32 [D, R], from features of length 1 to these coordinates; of knn it has no rows.
    """

    name: str  # one of SCORES
    points: np.ndarray = np.zeros((0, 0), np.float32)
    whiten: np.ndarray = np.zeros((0, 0), np.float32)


def fit(name: str, train: Predictions | None) -> Reference:
    """The reference of a score; labels of train may be None, and then there is one mean.

    Raises ValueError for an unknown score, and for training features that are missing, not finite or all alike.
    """
    if name not in ("mahalanobis", "knn"):
        return Reference(name)
    if train is None or train.features is None:
        raise ValueError(f"ood={name!r} needs the features of train; found none: give them, or take 'energy' or 'none'")
    if not np.isfinite(train.features).all() or np.ptp(train.features, axis=0).max() == 0:
        raise ValueError("the features of train are not finite, or all alike: no distance can be made of them")
    x = _unit(train.features.astype(np.float64))
    if name == "knn":
        chosen = np.random.default_rng(0).permutation(len(x))[:KEPT]
        return Reference(name, x[np.sort(chosen)].astype(np.float32))
    from sklearn.covariance import ledoit_wolf  # here: it takes a second that others need not pay

    known = train.labels is not None and train.labels.ndim == 1
    _, which = np.unique(train.labels if known else np.zeros(len(x)), return_inverse=True)
    means = np.stack([x[which == c].mean(axis=0) for c in range(which.max() + 1)])
    if not np.abs(residuals := x - means[which]).max() > 0:  # one example a class
        means, residuals = x.mean(axis=0, keepdims=True), x - x.mean(axis=0)
    values, vectors = np.linalg.eigh(ledoit_wolf(residuals, assume_centered=True)[0])
    whiten = vectors / np.sqrt(np.maximum(values, FLOOR * values.mean()))
    return Reference(name, (means @ whiten).astype(np.float32), whiten.astype(np.float32))


def score(reference: Reference, logits: np.ndarray, features: np.ndarray | None) -> np.ndarray:
    """float64 [N]; 0 of "none". Raises ValueError for features [N, D] that are missing or of another size."""
    name, points, whiten = reference
    if name == "none":
        return np.zeros(len(logits))
    if name == "energy":
        return -scipy.special.logsumexp(np.asarray(logits, np.float64), axis=1)
    size = len(whiten) or points.shape[1]
    if features is None or features.shape != (len(logits), size):
        found = "none" if features is None else list(features.shape)
        raise ValueError(f"the {name} score needs features [{len(logits)}, {size}], found {found}")
    x = _unit(np.asarray(features, np.float32))
    if name == "mahalanobis":
        x = x @ whiten
        squared = np.square(x).sum(axis=1) + (np.square(points).sum(axis=1) - 2 * (x @ points.T)).T
        return squared.min(axis=0).astype(np.float64)
    k, found = min(NEIGHBOURS, len(points)) - 1, []
    for part in np.array_split(x, -(-len(x) // 1024)):  # of unit features the most similar are the nearest
        nearest = np.argpartition(-(part @ points.T), k, axis=1)[:, k]
        found.append(np.linalg.norm(part - points[nearest], axis=1))
    return np.concatenate(found).astype(np.float64)


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
