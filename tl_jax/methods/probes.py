"""Probes without gradient: nearest neighbours, logistic and ridge regression on the features of a frozen network."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # loads its parts when they are used; scikit-learn is slow to import

from tl_jax.core import messages

GRIDS = {
    "knn": (1, 3, 5, 10, 20, 50, 100, 200),  # neighbours; of these defaults, those that the train set has
    "logistic": tuple(10.0**e for e in range(-4, 4)),  # C, the inverse strength of the penalty on the summed loss
    "ridge": tuple(10.0**e for e in range(-2, 6)),  # alpha, the strength of the penalty on the summed squares
}
NAMES = tuple(GRIDS)
WITHOUT_STEPS = (*NAMES, "tip_adapter", "none")  # also tip_adapter.py, and none, which scores a network as loaded
SYMBOLS = {"knn": "k", "logistic": "C", "ridge": "alpha", "tip_adapter": "alpha, beta"}
MAX_SCALE = 100.0  # of ridge scores: where every example is predicted well, the best scale would be infinite
MAX_ITERATIONS = 10_000  # of L-BFGS

Examples = tuple[np.ndarray, np.ndarray]  # features [N, D], labels [N]
Head = dict[str, np.ndarray]


class Fitted(NamedTuple):
    """A fitted classifier.

    predict: features [N, D] -> logits [N, K] float32. chosen: the number of neighbours, C, alpha, or several.
    tried: one row {"value", "val/accuracy", "val/nll", "converged"} for each candidate, None where there is no val.
    head: {"kernel" [D, K], "bias" [K]} float32 for raw features; None of knn.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    chosen: float | list[float]
    tried: list[dict[str, Any]]
    head: Head | None


class Candidates(NamedTuple):
    """One classifier for each value of the grid: predict(features, values) -> {value: logits [N, K] float64}."""

    predict: Callable[[np.ndarray, Sequence[float]], dict[float, np.ndarray]]
    heads: Mapping[float, Head]
    converged: Mapping[float, bool]


def fit(
    name: str,
    train: Examples,
    val: Examples | None,
    num_classes: int,
    grid: Sequence[float] = (),
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> Fitted:
    """Fits one of NAMES on train = (features [N, D], labels [N]) and chooses the value of `grid` on val alone.

    The highest val accuracy wins, among equals the lowest val nll, then the stronger regularisation (more neighbours,
    smaller C, larger alpha). An empty grid means GRIDS[name]. check_stop is called before each value of the grid, and
    may raise. Raises one ValueError for unusable arguments, also where the grid leaves a choice and there is no val.
    """
    _check(name, grid, train, val, num_classes)
    values = sorted(set(grid)) or [v for v in GRIDS[name] if name != "knn" or v <= len(train[1])]
    values = [int(v) if name == "knn" else float(v) for v in values]
    features, labels = np.asarray(train[0], np.float64), np.asarray(train[1])
    candidates = FIT[name](features, labels, num_classes, values, check_stop)
    tried = [{"value": v, "val/accuracy": None, "val/nll": None, "converged": candidates.converged[v]} for v in values]
    if val is not None:
        logits = candidates.predict(np.asarray(val[0], np.float64), values)
        for row in tried:
            row |= score(logits[row["value"]], np.asarray(val[1]))
    chosen = _choose(name, tried) if val is not None else values[0]

    def predict(features: np.ndarray) -> np.ndarray:
        return candidates.predict(np.asarray(features, np.float64), [chosen])[chosen].astype(np.float32)

    return Fitted(predict, chosen, tried, candidates.heads.get(chosen))


def cross_predict(
    name: str,
    features: np.ndarray,
    labels: np.ndarray,
    splits: Iterable[tuple[np.ndarray, np.ndarray]],
    num_classes: int,
    value: float,
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """Predicts every example by the model that has not seen it: logits [N, K] float32, one array per repeat.

    splits: (train indices, held-out indices) pairs, as scikit-learn's splitters give them; a repeat ends when all N
    examples have been held out. check_stop is called before each fit, and may raise. Raises ValueError where a split
    trains on what it holds out, or a repeat does not hold out each example exactly once.
    """
    splits, count, finished = list(splits), len(labels), []
    leave_one_out = name == "knn" and all(len(held) == 1 and len(train) == count - 1 for train, held in splits)
    left_out = left_out_neighbours(features, labels, num_classes, value) if leave_one_out else None
    logits, left = np.empty((count, num_classes), np.float32), np.ones(count, bool)
    for number, (train, held) in enumerate(splits):
        if (wrong := held[np.isin(held, train) | ~left[held]]).size:
            what = "holds out examples that it trains on, or that the repeat has held out before"
            raise ValueError(f"split {number} {what}: {wrong[:5].tolist()}; expected each exactly once in a repeat")
        if left_out is None:
            model = fit(name, (features[train], labels[train]), None, num_classes, (value,), check_stop=check_stop)
            logits[held] = model.predict(features[held])
        else:
            logits[held] = left_out[held]
        left[held] = False
        if not left.any():
            finished.append(logits)
            logits, left = np.empty_like(logits), np.ones(count, bool)
    if not left.all() or not finished:
        missed = f"{left.sum()} of {count} examples are never held out, such as {np.flatnonzero(left)[:5].tolist()}"
        raise ValueError(f"{missed}; expected each exactly once in a repeat, as in leave-one-out or k-fold")
    return finished


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """{"val/accuracy", "val/nll"} of logits [N, K]; the mean nll in nats."""
    log_probabilities = scipy.special.log_softmax(logits, axis=1)
    return {
        "val/accuracy": float((logits.argmax(axis=1) == labels).mean()),
        "val/nll": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
    }


def _shown(name: str, value: float | Sequence[float]) -> str:
    values = value if isinstance(value, Sequence) else [value]
    return ", ".join(f"{symbol} = {x:g}" for symbol, x in zip(SYMBOLS[name].split(", "), values, strict=True))


def choice_line(name: str, chosen: float | Sequence[float], tried: Sequence[Mapping[str, Any]]) -> str:
    """Which value of its grid a probe took, by what, and whether the nll on val would have taken another."""
    row = next((row for row in tried if row["value"] == chosen), None)
    if len(tried) < 2 or row is None or row["val/accuracy"] is None:
        return f"{name} with {_shown(name, chosen)}, as given"
    scores = "accuracy {val/accuracy:.4f}, nll {val/nll:.4f}"
    best = min(tried, key=lambda row: row["val/nll"])
    other = f"; by nll it would be {_shown(name, best['value'])} ({scores.format_map(best)})"
    told = f"{name} with {_shown(name, chosen)}, chosen of {len(tried)} by accuracy on val ({scores.format_map(row)})"
    slow = "" if row["converged"] else f"; it has not converged in {MAX_ITERATIONS:,} iterations"
    return told + (other if best["val/nll"] < row["val/nll"] else ", and nll agrees") + slow


def _choose(name: str, tried: list[dict[str, Any]]) -> float:
    stronger = -1 if name == "logistic" else 1
    return max(tried, key=lambda row: (row["val/accuracy"], -row["val/nll"], stronger * row["value"]))["value"]


def _fit_knn(features, labels, num_classes, values, check_stop) -> Candidates:
    """The labels of the k train examples of the highest cosine similarity, each one vote; one search for all k."""
    from sklearn.neighbors import NearestNeighbors

    check_stop()
    index = NearestNeighbors().fit(_normalise(features))  # Euclidean distances have the order of cosine similarity

    def predict(features, values):
        found = labels[index.kneighbors(_normalise(features), max(values), return_distance=False)]
        return {k: _votes(found[:, :k], num_classes) for k in values}

    return Candidates(predict, {}, dict.fromkeys(values, True))


def left_out_neighbours(features, labels, num_classes, k) -> np.ndarray:
    """Logits [N, K] of each example by its k nearest others, from one search instead of N."""
    from sklearn.neighbors import NearestNeighbors

    _check("knn", (k,), (features, labels), None, num_classes, left_out=1)
    points = _normalise(np.asarray(features, np.float64))
    found = NearestNeighbors().fit(points).kneighbors(points, int(k) + 1, return_distance=False)
    itself = found == np.arange(len(found))[:, None]
    itself[~itself.any(axis=1), -1] = True  # not among its own nearest, where more than k + 1 examples are the same
    return _votes(labels[found[~itself].reshape(len(found), -1)], num_classes).astype(np.float32)


def _votes(found: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels [N, k] of neighbours -> finite logits [N, K], log((votes + 1 / K) / (k + 1))."""
    count, k = found.shape
    cells = found + num_classes * np.arange(count)[:, None]
    votes = np.bincount(cells.ravel(), minlength=count * num_classes).reshape(count, num_classes)
    return np.log((votes + 1 / num_classes) / (k + 1))


def _normalise(features: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)


def _fit_logistic(features, labels, num_classes, values, check_stop) -> Candidates:
    """Multinomial logistic regression on standardised features, by L-BFGS; the bias is not penalised."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    standardised, fitted, converged = scaler.transform(features), {}, {}
    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError(f"cannot fit logistic: train holds the one class {present.tolist()}; expected two or more")
    for value in values:
        check_stop()
        model = LogisticRegression(C=value, max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings():  # `tried` reports it, for each value
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(standardised, labels)
        kernel, bias = model.coef_.T, model.intercept_
        if len(present) == 2:  # scikit-learn has one column, the log-odds of the second class
            kernel, bias = np.concatenate([-kernel, kernel], axis=1) / 2, np.concatenate([-bias, bias]) / 2
        # Classes without a train example: log(N + 1) below the mean logit, so that none is ever predicted.
        all_kernels = np.repeat(kernel.mean(axis=1, keepdims=True), num_classes, axis=1)
        all_biases = np.full(num_classes, bias.mean() - math.log(len(labels) + 1))
        all_kernels[:, present], all_biases[present] = kernel, bias
        fitted[value] = all_kernels, all_biases
        converged[value] = bool(model.n_iter_.max() < MAX_ITERATIONS)
    return _linear(scaler, fitted, converged)


def _fit_ridge(features, labels, num_classes, values, check_stop) -> Candidates:
    """Ridge regression of the one-hot labels, times the inverse temperature of the left-out scores (see `_scale`)."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    standardised, fitted = scaler.transform(features), {}
    check_stop()
    for alpha, (kernel, bias, left_out) in ridge(standardised, np.eye(num_classes)[labels], values):
        check_stop()
        scale = _scale(left_out, labels)
        fitted[alpha] = scale * kernel, scale * bias
    return _linear(scaler, fitted, dict.fromkeys(values, True))


def ridge(inputs: np.ndarray, targets: np.ndarray, alphas: Sequence[float]) -> Iterator[tuple[float, tuple]]:
    """Minimises |targets - inputs kernel - bias|^2 + alpha |kernel|^2 for each alpha in turn with one SVD; float64.

    inputs [N, D], targets [N, K] -> pairs (alpha, (kernel [D, K], bias [K], left_out [N, K])); left_out[i] is the
    prediction for example i by the model fitted without it, y_i - (y_i - f_i) / (1 - h_ii) with the hat matrix h
    (Hastie et al. 2009, The Elements of Statistical Learning, section 7.10.1).
    """
    centre, mean = inputs.mean(axis=0), targets.mean(axis=0)
    left, singular, right = np.linalg.svd(inputs - centre, full_matrices=False)
    projected = left.T @ (targets - mean)
    for alpha in alphas:
        kernel = right.T @ ((singular / (singular**2 + alpha))[:, None] * projected)
        bias = mean - centre @ kernel
        leverage = 1 / len(inputs) + left**2 @ (singular**2 / (singular**2 + alpha))
        rest = np.maximum(1 - leverage, 1e-9)  # 0 where the fit goes through an example, as a tiny alpha does
        residual = targets - inputs @ kernel - bias
        yield alpha, (kernel, bias, targets - residual / rest[:, None])


def _scale(scores: np.ndarray, labels: np.ndarray) -> float:
    """The factor, up to MAX_SCALE, that minimises the nll of scores [N, K] as logits (Guo et al. 2017, section 4.2)."""
    bounds = (-math.log(MAX_SCALE), math.log(MAX_SCALE))
    found = scipy.optimize.minimize_scalar(
        lambda log_scale: score(math.exp(log_scale) * scores, labels)["val/nll"], bounds=bounds, method="bounded"
    )
    return math.exp(found.x)


def _linear(scaler: Any, fitted: Mapping[float, tuple], converged: Mapping[float, bool]) -> Candidates:
    """The classifiers of raw features, from {value: (kernel, bias)} for standardised ones."""
    heads = {}
    for value, (kernel, bias) in fitted.items():
        folded = kernel / scaler.scale_[:, None]
        heads[value] = {"kernel": folded.astype(np.float32), "bias": (bias - scaler.mean_ @ folded).astype(np.float32)}

    def predict(features, values):
        return {v: features @ heads[v]["kernel"].astype(np.float64) + heads[v]["bias"] for v in values}

    return Candidates(predict, heads, converged)


FIT = {"knn": _fit_knn, "logistic": _fit_logistic, "ridge": _fit_ridge}


def _check(name, grid, train: Examples, val: Examples | None, num_classes: int, left_out: int = 0) -> None:
    """Raises one ValueError that lists everything wrong with the arguments of `fit`."""
    if name not in NAMES:
        raise ValueError(f"unknown probe {name!r}{messages.nearest(name, NAMES)}; known: {', '.join(NAMES)}")
    problems, count = [], len(train[1]) - left_out
    if len(set(grid)) != 1 and val is None:
        found = f"the {len(set(grid))} values {list(grid)}" if grid else "an empty grid, which means the default one"
        problems.append(f"found {found} and no val to choose by; give a val split, or one value")
    whole = name == "knn"
    if bad := [v for v in grid if not (math.isfinite(v) and v > 0) or (whole and v != int(v))]:
        problems.append(f"found {bad} in the grid, expected {'whole numbers from 1' if whole else 'numbers above 0'}")
    if whole and (bad := [v for v in grid if v > count]):
        problems.append(f"found {bad} neighbours, but train has {count} examples; take fewer")
    problems += _example_problems("train", *train, num_classes)
    problems += _example_problems("val", *val, num_classes) if val is not None else []
    if not problems and val is not None and np.shape(train[0])[1] != np.shape(val[0])[1]:
        problems.append(f"train has {np.shape(train[0])[1]} features, val {np.shape(val[0])[1]}; expected the same")
    if problems:
        raise ValueError(f"cannot fit {name}: " + "; ".join(problems))


def _example_problems(split: str, features: np.ndarray, labels: np.ndarray, num_classes: int) -> list[str]:
    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        return [f"{split} has features {features.shape} and labels {labels.shape}, expected [N >= 1, D] and [N]"]
    problems = []
    if (bad := np.flatnonzero(~np.isfinite(features).all(axis=1))).size:
        problems.append(f"{len(bad)} rows of the {split} features are not finite, first {bad[:5].tolist()}")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= num_classes:
        found = f"{labels.dtype} in {labels.min()}..{labels.max()}"
        problems.append(f"{split} labels are {found}, expected integers in 0..{num_classes - 1}")
    return problems
