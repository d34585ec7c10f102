"""Classifiers on features: `fit(features [N, D], labels [N], weights [N] or None)` returns features -> labels."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from tl_jax.core.checks import refuse

Predict = Callable[[np.ndarray], np.ndarray]
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray | None], Predict]
ROWS = 1024  # examples whose distances are in memory at a time
log = logging.getLogger(__name__)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances [N, M] of rows [N, D] and [M, D]; about a common centre, where least cancels."""
    a, b = a - b.mean(axis=0), b - b.mean(axis=0)
    return np.maximum(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T, 0)


def nearest(features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Predict:
    """The label of the one nearest example by Euclidean distance, of the first among equals. It knows no weights."""
    refuse("1nn", [] if weights is None else ["it cannot use weights of examples; take svm or logistic"])

    def predict(rows: np.ndarray) -> np.ndarray:
        parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
        return np.concatenate([labels[:0], *(labels[squared_distances(part, features).argmin(1)] for part in parts)])

    return predict


def linear_svm(features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Predict:
    """A linear SVM for each pair of classes, which vote; hinge loss, C = 1 (Chang & Lin 2011)."""
    from sklearn.svm import SVC  # here, as scikit-learn is slow to import

    return _fit(SVC(kernel="linear"), features, labels, weights)


def logistic(features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Predict:
    """Multinomial logistic regression, C = 1."""
    from sklearn.linear_model import LogisticRegression

    return _fit(LogisticRegression(max_iter=10_000), features, labels, weights)


def _fit(model: Any, features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> Predict:
    from sklearn.exceptions import ConvergenceWarning

    counted = np.ones(len(labels), bool) if weights is None else weights > 0
    if len(found := np.unique(labels[counted])) == 1:  # nothing to tell apart
        return lambda rows: np.full(len(rows), found[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features[counted], labels[counted], None if weights is None else weights[counted])
    if any(issubclass(each.category, ConvergenceWarning) for each in caught):
        log.warning("%s did not converge; scale the features, for example by zscore", type(model).__name__)
    return model.predict


CLASSIFIERS: dict[str, Fit] = {"1nn": nearest, "svm": linear_svm, "logistic": logistic}
WEIGHTED = ("svm", "logistic")
