"""Scores by which a checkpoint is chosen without target labels, in numpy: the higher, the better; always finite.

Each is a function of plain arrays, P [N, K] probabilities and F [N, D] features; SELECTORS says what a candidate gives
it. None wins everywhere: entropy and SND reward collapse onto one class, DEV is unbounded where domains separate.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy  # loads its parts when they are used

SHARPNESS = 0.05  # temperature of SND's softmax over neighbours
DOMINANT = 0.55  # weight of the first of two mixed inputs in MixVal
ROWS = 1024  # of a matrix of all pairs, at a time
LARGEST = 30.0  # log odds beyond which a ratio of densities is cut: past it the domains are simply apart


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """What a checkpoint wrote of source (S, labelled) and target (T, not), float64; log P are log probabilities.

    log_source [N, K], source_labels int [N], source_features [N, D]: of the source's val; source_domains int [N], where
    there are several. train_features [M, D]: of a sample of the source's train. log_target [T, K], target_features
    [T, D]: of the target's held-out split; log_mixed [T, K]: of its inputs mixed, DOMINANT x + (1 - DOMINANT) x'.
    None: there is none.
    """

    log_target: np.ndarray
    target_features: np.ndarray
    log_mixed: np.ndarray | None = None
    log_source: np.ndarray | None = None
    source_labels: np.ndarray | None = None
    source_features: np.ndarray | None = None
    train_features: np.ndarray | None = None
    source_domains: np.ndarray | None = None

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """The density ratio at source_features [N], fitted once for all selectors that read it."""
        return density_ratio(self.train_features, self.target_features, self.source_features)


class Selector(NamedTuple):
    """scores(candidates) -> one number for each; reads: whose labels, "source" or "none"."""

    scores: Callable[[Sequence[Candidate]], list[float]]
    reads: str = "none"
    fields: tuple[str, ...] = ()  # of a candidate, without which there is no score
    pool: bool = False  # whether a score depends on the other candidates


def entropy_of(p: np.ndarray) -> np.ndarray:
    """-sum p log p over the last axis, in nats; 0 log 0 = 0."""
    return -scipy.special.xlogy(p, p).sum(-1)


def entropy(p: np.ndarray) -> float:
    """-E H(p): confident answers (Morerio, Cavazza and Murino 2018)."""
    return float(-entropy_of(p).mean())


def infomax(p: np.ndarray) -> float:
    """H(E p) - E H(p): confident and diverse answers (Shi and Sha 2012)."""
    return float(entropy_of(p.mean(0)) - entropy_of(p).mean())


def bnm(p: np.ndarray) -> float:
    """The nuclear norm |P|_* / N (Cui et al. 2020)."""
    return float(np.linalg.svd(p, compute_uv=False).sum() / len(p))


def snd(p: np.ndarray, temperature: float = SHARPNESS) -> float:
    """Soft neighbourhood density (Saito et al. 2021): the mean entropy of each example's neighbours.

    The neighbours' weights are softmax(cosine / temperature) over all other examples; 0 where there is none.
    """
    if len(p) < 2:
        return 0.0
    unit, total = p / np.linalg.norm(p, axis=1, keepdims=True), 0.0
    for start in range(0, len(p), ROWS):
        similarity = unit[start : start + ROWS] @ unit.T / temperature
        similarity[np.arange(len(similarity)), start + np.arange(len(similarity))] = -np.inf
        total += entropy_of(scipy.special.softmax(similarity, axis=1)).sum()
    return float(total / len(p))


def corr_c(p: np.ndarray) -> float:
    """-tr(C) / |C|_F with C = P'P: few classes confused, all of them used (Tu et al. 2023, Corr-C)."""
    classes = p.T @ p
    return float(-np.trace(classes) / np.linalg.norm(classes))


def class_ami(p: np.ndarray, features: np.ndarray) -> float:
    """Adjusted mutual information of answers and k-means of the features, a cluster a class (Musgrave et al. 2022).

    0 where there are fewer distinct examples than two, or one class is predicted.
    """
    import threadpoolctl  # scikit-learn brings it
    from sklearn import cluster, metrics  # here, as they take their time

    answers, distinct = p.argmax(1), len(np.unique(features, axis=0))
    if distinct < 2 or len(np.unique(answers)) < 2:
        return 0.0
    with threadpoolctl.threadpool_limits(1):  # the same sums on any number of cores, and no wait for each other
        found = cluster.KMeans(min(p.shape[1], distinct), n_init=10, random_state=0).fit_predict(features)
    return float(metrics.adjusted_mutual_info_score(answers, found))


def mixval(p: np.ndarray, mixed: np.ndarray) -> float:
    """The share of mixed inputs that are answered as their dominant part alone is (Hu et al. 2023, MixVal)."""
    return float((p.argmax(1) == mixed.argmax(1)).mean())


def ensv(pool: Sequence[np.ndarray]) -> list[float]:
    """For each candidate the share of answers that it shares with the mean of all (Hu et al. 2023, EnsV)."""
    together = sum(pool[1:], start=pool[0]).argmax(1)
    return [float((p.argmax(1) == together).mean()) for p in pool]


def rankme(features: np.ndarray) -> float:
    """exp H(s / sum s) of the singular values s, the effective rank (Garrido et al. 2023); 0 of zeros."""
    values = np.linalg.svd(features, compute_uv=False)
    return float(np.exp(entropy_of(values / values.sum()))) if values.sum() > 0 else 0.0


def density_ratio(source: np.ndarray, target: np.ndarray, features: np.ndarray) -> np.ndarray:
    """p_T / p_S at features [N, D] from samples [M, D] of S and T: N_s / N_t times the odds of a classifier for T.

    A logistic regression on features standardised over both (Bickel, Brueckner and Scheffer 2007).
    """
    import threadpoolctl
    from sklearn import linear_model

    both = np.concatenate([source, target])
    mean, std = both.mean(0), both.std(0)
    is_target = np.repeat([0, 1], [len(source), len(target)])
    scaled = (both - mean) / (std + (std == 0))
    with threadpoolctl.threadpool_limits(1):  # as above
        fitted = linear_model.LogisticRegression(tol=1e-8, max_iter=1000).fit(scaled, is_target)
    odds = fitted.decision_function((features - mean) / (std + (std == 0)))
    return len(source) / len(target) * np.exp(np.clip(odds, -LARGEST, LARGEST))


def iwcv_risk(losses: np.ndarray, weights: np.ndarray) -> float:
    """The source risk weighted to the target, mean(w l) (Sugiyama, Krauledat and Mueller 2007)."""
    return float((weights * losses).mean())


def dev_risk(losses: np.ndarray, weights: np.ndarray) -> float:
    """mean(w l) + eta mean(w) - eta, eta = -cov(w l, w) / var(w) (You et al. 2019): of lower variance.

    eta is 0 where the weights do not vary, of which one example is a case.
    """
    varies = len(weights) > 1 and weights.var() > 0
    eta = -np.cov(weights * losses, weights)[0, 1] / weights.var(ddof=1) if varies else 0.0
    return float((weights * losses).mean() + eta * weights.mean() - eta)


def source_risk(log_p: np.ndarray, labels: np.ndarray, domains: np.ndarray | None = None) -> float:
    """Accuracy on the source's val; of several domains the mean of theirs ("training-domain validation" of DomainBed,
    Gulrajani and Lopez-Paz 2021).
    """
    hit = log_p.argmax(1) == labels
    parts = [hit] if domains is None else [hit[domains == d] for d in np.unique(domains)]
    return float(np.mean([part.mean() for part in parts]))


def _weighted(risk: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Candidate], float]:
    def score(c: Candidate) -> float:
        losses = -c.log_source[np.arange(len(c.source_labels)), c.source_labels]
        return -risk(losses, c.weights)

    return score


def _each(score: Callable[[Candidate], float], *fields: str, reads: str = "none") -> Selector:
    return Selector(lambda candidates: [score(c) for c in candidates], reads, fields)


_LABELLED = ("log_source", "source_labels", "source_features")
SELECTORS: dict[str, Selector] = {
    "source_risk": _each(
        lambda c: source_risk(c.log_source, c.source_labels, c.source_domains), *_LABELLED, reads="source"
    ),
    "iwcv": _each(_weighted(iwcv_risk), *_LABELLED, "train_features", reads="source"),
    "dev": _each(_weighted(dev_risk), *_LABELLED, "train_features", reads="source"),
    "entropy": _each(lambda c: entropy(np.exp(c.log_target))),
    "infomax": _each(lambda c: infomax(np.exp(c.log_target))),
    "bnm": _each(lambda c: bnm(np.exp(c.log_target))),
    "snd": _each(lambda c: snd(np.exp(c.log_target))),
    "corr_c": _each(lambda c: corr_c(np.exp(c.log_target))),
    "class_ami": _each(lambda c: class_ami(c.log_target, c.target_features)),
    "mixval": _each(lambda c: mixval(c.log_target, c.log_mixed), "log_mixed"),
    "ensv": Selector(lambda pool: ensv([np.exp(c.log_target) for c in pool]), pool=True),
    "rankme": _each(lambda c: rankme(c.target_features)),
}


def weighted_spearman(scores: Sequence[float], values: Sequence[float], power: float = 2.0) -> float | None:
    """Spearman's correlation with the weights max(r_score, r_value)^power, r ranks over the number of candidates.

    So that an order among the best counts most (after Musgrave, Belongie and Lim 2022). Ties share their mean
    rank; None of fewer than two candidates, or where all scores or all values are equal.
    """
    a, b = (scipy.stats.rankdata(x) / max(len(x), 1) for x in (scores, values))
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    weights = np.maximum(a, b) ** power
    covariance = np.cov(a, b, aweights=weights, ddof=0)
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))
