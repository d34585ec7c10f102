"""Scores of how well a frozen network suits a task, from its features and its source classes alone; higher is better.

Each is a function of features or probabilities and labels, in float64 numpy. features: [N, D], what the head reads.
probabilities: [N, S], what the network's own classifier says of the N examples. labels: int [N] that count into K
classes, of which each occurs; or numbers [N, T], the targets of a regression or 0 and 1 for each of several labels.
Constant features, a class of one example and fewer examples than features give finite scores.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy  # loads its parts when they are used; scikit-learn is slow to import

from tl_jax.core import checks
from tl_jax.core.messages import nearest
from tl_jax.methods import probes

NEIGHBOURS = 5
RATE_EPS = 1e-4  # of TransRate, as published
PAIRED = 2000  # examples at most whose pairs PARC compares
GRID = np.linspace(-28.0, 28.0, 113)  # logarithms of alpha / beta over the largest squared singular value, of LogME


class Score(NamedTuple):
    """compute: (features or probabilities, labels) -> float. reads: which of them. kinds: of labels, as of a Source."""

    compute: Callable[[np.ndarray, np.ndarray], float]
    reads: str = "features"
    kinds: tuple[str, ...] = ("classes",)


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """LEEP: the mean log-likelihood of y under sum_z P(y | z) p(z | x) (Nguyen et al. 2020, equations 1 and 2)."""
    joint = _one_hot(labels).T @ probabilities
    mass = joint.sum(axis=0)
    given = joint / np.where(mass > 0, mass, 1)  # P(y | z), [K, S]
    return float(np.log((probabilities * given[labels]).sum(axis=1)).mean())


def nleep(features: np.ndarray, labels: np.ndarray) -> float:
    """NLEEP: LEEP with the components of a Gaussian mixture as source classes (Li et al. 2021, section 3.2).

    Five components a class, or half as many as examples, on the principal components with 80 % of the variance.
    """
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    scaled = _unit_variance(features)
    if not scaled.any():
        return leep(np.ones((len(labels), 1)), labels)
    reduced = PCA(0.8, svd_solver="full").fit_transform(scaled)
    mixture = GaussianMixture(max(1, min(5 * (labels.max() + 1), len(labels) // 2)), random_state=0)
    with warnings.catch_warnings():  # of duplicates some components share a place; any mixture has a LEEP
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(reduced)
    return leep(mixture.predict_proba(reduced), labels)


def nce(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """NCE: -H(Y | Z) for the most probable source class Z (Tran, Nguyen & Hassner 2019, equation 7), as a hard LEEP."""
    return leep(_one_hot(np.unique(probabilities.argmax(axis=1), return_inverse=True)[1]), labels)


def logme(features: np.ndarray, labels: np.ndarray) -> float:
    """LogME: the mean over targets of log p(y | F) / N at its maximum (You et al. 2021, equations 1 and 2).

    y ~ N(F w, 1 / beta) with w ~ N(0, 1 / alpha). For a given ratio alpha / beta the best beta is N over the misfit, so
    that a search over the ratio alone ends where the published iteration converges.
    """
    targets = _targets(labels)
    count, (left, singular, _) = len(targets), np.linalg.svd(features, full_matrices=False)
    squares, projected = singular**2, left.T @ targets
    rest = ((targets - left @ projected) ** 2).sum(axis=0)
    scale = np.log(squares.max() or 1.0)

    def evidence(ratio: float, z: np.ndarray, r: float) -> float:
        shrink = np.exp(ratio + scale) / (np.exp(ratio + scale) + squares)
        misfit = r + shrink @ z**2
        return (np.log(shrink).sum() / count - np.log(2 * np.pi * misfit / count) - 1) / 2

    found = []
    for z, r in zip(projected.T, rest, strict=True):
        best = GRID[np.argmax([evidence(ratio, z, r) for ratio in GRID])]  # there may be several maxima
        about = best - 0.5, best + 0.5
        near = scipy.optimize.minimize_scalar(
            lambda ratio, z=z, r=r: -evidence(ratio, z, r), bounds=about, method="bounded", options={"xatol": 1e-9}
        )
        found.append(-near.fun)
    return float(np.mean(found))


def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """H-score: tr(cov(f)^+ cov(E[f | y])) (Bao et al. 2019, definition 2).

    With f = U S V^T it is the squared norm of the class means of U, so that no covariance is inverted. From D >= N - 1
    on it is K - 1 whatever the labels: take `h_score_reg`.
    """
    left, singular, _ = np.linalg.svd(_centred(features), full_matrices=False)
    left = left[:, singular > max(features.shape) * np.finfo(float).eps * np.abs(features).max() * len(labels) ** 0.5]
    return float((_class_means(left, labels) ** 2).sum())


def h_score_reg(features: np.ndarray, labels: np.ndarray) -> float:
    """tr(S^-1 (1 - a) cov(E[f | y])), S shrunk by a (Ledoit & Wolf 2004; Ibrahim, Ponomareva & Mazumder 2021)."""
    from sklearn.covariance import LedoitWolf

    scaled = _unit_variance(features)
    if not scaled.any():
        return 0.0
    shrunk, means = LedoitWolf().fit(scaled), _class_means(scaled, labels)
    between = means.T @ means / (len(labels) - 1)
    inverse = np.linalg.pinv(shrunk.covariance_, hermitian=True)
    return float((1 - shrunk.shrinkage_) * (inverse * between).sum())


def transrate(features: np.ndarray, labels: np.ndarray) -> float:
    """TransRate: R(F) less the mean of R over classes, R = logdet(I + F^T F / (n eps)) / 2 (Huang et al. 2022).

    As their listing has it: F is centred, and every class counts alike. It depends on the scale of the features.
    """
    centred = _centred(features)

    def rate(rows: np.ndarray) -> float:
        return np.log1p(np.linalg.svd(rows, compute_uv=False) ** 2 / (len(rows) * RATE_EPS)).sum() / 2

    return float(rate(centred) - np.mean([rate(centred[labels == c]) for c in range(labels.max() + 1)]))


def parc(features: np.ndarray, labels: np.ndarray) -> float:
    """PARC: Spearman's correlation of two distances over all pairs of examples (Bolya, Mittapalli & Hoffman 2021).

    Both are 1 - Pearson's correlation: of the features of two examples, and of their one-hot labels. 0 where either is
    constant. Of more than PAIRED examples a fixed sample counts.
    """
    if len(labels) > PAIRED:
        chosen = np.random.default_rng(0).choice(len(labels), PAIRED, replace=False)
        features, labels = features[chosen], labels[chosen]
    pairs = np.triu_indices(len(labels), 1)
    rows = _centred(features.T).T
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(length > 1e-9 * np.abs(features).max(axis=1, keepdims=True), length, np.inf)
    distances = (1 - rows @ rows.T)[pairs].round(12)  # of duplicates, whose order rounding would make up
    differ = labels[pairs[0]] != labels[pairs[1]]
    if np.ptp(distances) == 0 or differ.all() or not differ.any():
        return 0.0
    return float(scipy.stats.spearmanr(distances, differ).statistic)


def knn(features: np.ndarray, labels: np.ndarray) -> float:
    """The accuracy of the 5 nearest others by cosine similarity, or of all others where there are fewer."""
    votes = probes.left_out_neighbours(features, labels, labels.max() + 1, min(NEIGHBOURS, len(labels) - 1))
    return float((votes.argmax(axis=1) == labels).mean())


def probe(features: np.ndarray, labels: np.ndarray) -> float:
    """Leave-one-out of a ridge regression: the accuracy for classes, else R^2, the mean over targets.

    The penalty of `probes.GRIDS` with the least squared error counts, itself left out.
    """
    from sklearn.preprocessing import StandardScaler

    targets = _targets(labels)
    fits = probes.ridge(StandardScaler().fit_transform(features), targets, probes.GRIDS["ridge"])
    left_out = min((found[-1] for _, found in fits), key=lambda values: ((targets - values) ** 2).sum())
    if labels.ndim == 1:
        return float((left_out.argmax(axis=1) == labels).mean())
    return float(1 - (((targets - left_out) ** 2).mean(axis=0) / targets.var(axis=0)).mean())


_ANY = ("classes", "multilabel", "targets")
SCORES = {
    "leep": Score(leep, "probabilities"),
    "nce": Score(nce, "probabilities"),
    "nleep": Score(nleep),
    "logme": Score(logme, kinds=_ANY),
    "h_score": Score(h_score),
    "h_score_reg": Score(h_score_reg),
    "transrate": Score(transrate),
    "parc": Score(parc),
    "knn": Score(knn),
    "probe": Score(probe, kinds=_ANY),
}


def names_for(kind: str, asked: Sequence[str] = ()) -> list[str]:
    """The names of SCORES for labels of a kind, or those asked; one ValueError for what does not exist or fit."""
    fitting = [name for name, score in SCORES.items() if kind in score.kinds]
    problems = [
        f"{name!r}: it takes labels of the kinds {', '.join(SCORES[name].kinds)}, found {kind}"
        if name in SCORES
        else f"there is no score {name!r}{nearest(name, SCORES)}; known: {', '.join(SCORES)}"
        for name in asked
        if name not in fitting
    ]
    checks.refuse("the scores do not fit", problems)
    return list(dict.fromkeys(asked)) or fitting


def compute(
    names: Sequence[str], features: np.ndarray, probabilities: np.ndarray | None, labels: np.ndarray
) -> dict[str, float | None]:
    """{name: score}, None where it needs probabilities and there are none; see the top of this file.

    Labels may count into more classes than occur. Raises one ValueError for arrays that cannot be scored: other shapes,
    values that are not finite, rows of probabilities that do not sum to 1, labels of which none differs.
    """
    labels, given = np.asarray(labels), {"features": features, "probabilities": probabilities}
    read = {name: np.asarray(x, np.float64) for name, x in given.items() if x is not None}
    checks.refuse("these features and labels cannot be scored", _problems(read, labels))
    if labels.ndim == 1:
        labels = np.unique(labels, return_inverse=True)[1]
    found = ((name, read.get(SCORES[name].reads)) for name in names)
    return {name: None if x is None else SCORES[name].compute(x, labels) for name, x in found}


def _problems(read: dict[str, np.ndarray], labels: np.ndarray) -> list[str]:
    problems = []
    for name, x in read.items():
        if x.ndim != 2 or len(x) != len(labels) or not x.size:
            problems.append(f"{name} have the shape {list(x.shape)}, expected [N, D] for {len(labels)} labels")
        elif bad := np.flatnonzero(~np.isfinite(x).all(axis=1)).tolist():
            problems.append(f"{name} of {len(bad)} examples are not finite, such as {bad[:5]}; the weights are damaged")
        elif name == "probabilities" and ((x < 0).any() or not np.allclose(x.sum(axis=1), 1, atol=1e-4)):
            problems.append("the rows of the probabilities do not sum to 1")
    if labels.ndim not in (1, 2) or (labels.ndim == 1 and labels.dtype.kind not in "iu"):
        problems.append(f"labels are {labels.dtype} {list(labels.shape)}, expected classes [N] or numbers [N, T]")
    elif not np.isfinite(labels).all():
        problems.append("some labels are not finite")
    elif not (labels != labels[:1]).any():
        problems.append(f"all {len(labels)} examples have the same label; expected two that differ")
    return problems


def _one_hot(labels: np.ndarray) -> np.ndarray:
    return np.eye(labels.max() + 1)[labels]


def _targets(labels: np.ndarray) -> np.ndarray:
    """What a regression fits, [N, T]: one column a class, 0 and 1 as they are, standardised numbers.

    Of targets that are the same for all examples there is nothing to learn, so that they are left out.
    """
    if labels.ndim == 1:
        return _one_hot(labels)
    varied = labels[:, (labels != labels[:1]).any(axis=0)].astype(np.float64)
    return varied if labels.dtype.kind in "iu" else (varied - varied.mean(axis=0)) / varied.std(axis=0)


def _centred(features: np.ndarray) -> np.ndarray:
    return features - features.mean(axis=0)


def _unit_variance(features: np.ndarray) -> np.ndarray:
    """Centred, and divided by one number: the root of the mean variance. Zeros where no feature varies."""
    centred = _centred(features)
    spread = np.sqrt((centred**2).mean())
    return centred / spread if spread > 1e-12 * np.abs(features).max() else np.zeros_like(centred)


def _class_means(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each row replaced by the mean of its class."""
    return (_one_hot(labels).T @ rows / np.bincount(labels)[:, None])[labels]
