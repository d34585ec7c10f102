"""Weights of source examples, so that the source counts like the target: mean 1, float64."""

import math
from typing import Annotated, Any

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.core import checks
from tl_jax.methods.classic.classifiers import squared_distances
from tl_jax.methods.classic.features import Count, Data, Found, Strength, Width, median_width

TOLERANCE = 1e-9  # of the largest entry of the projected gradient of KMM
Seed = Annotated[int, checks.integer(0)]


def kmm(
    data: Data,
    gamma: Width = 0.0,
    bound: Strength = 1000.0,
    epsilon: Annotated[float, checks.number(0)] | None = None,
    iterations: Count = 20_000,
) -> Found:
    """Kernel mean matching (Huang et al. 2007, equation 5): the weighted mean of the source nears that of the target.

    min 1/2 b'Kb - kappa'b with kappa_i = N_s/N_t sum_j k(x_i, t_j), 0 <= b <= bound, |sum b - N_s| <= N_s epsilon;
    bound and epsilon = (sqrt N_s - 1) / sqrt N_s are the paper's. k(x, y) = exp(-gamma d^2); gamma = 0: one over the
    median of the target's and source's d^2. Accelerated projected gradient with restarts (O'Donoghue & Candes 2015).
    facts: whether it converged, and sum b / N_s, by which b is divided. Memory: [N_s, N_s].
    """
    count, across = len(data.source), squared_distances(data.source, data.target)
    gamma = gamma or median_width(across)
    kernel = np.exp(-gamma * squared_distances(data.source, data.source))
    kappa = count * np.exp(-gamma * across).mean(axis=1)
    slack = (math.sqrt(count) - 1) / math.sqrt(count) if epsilon is None else epsilon
    limits = count * max(1 - slack, 0.0), min(count * (1 + slack), count * bound)
    step, found = 1 / kernel.sum(axis=1).max(), _project(np.ones(count), bound, *limits)
    ahead, momentum, residual = found, 1.0, math.inf
    for _ in range(iterations):
        before, gradient = found, kernel @ ahead - kappa
        found = _project(ahead - step * gradient, bound, *limits)
        residual = float(np.abs(found - ahead).max() / step)
        if residual < TOLERANCE * count:
            break
        restart = (ahead - found) @ (found - before) > 0
        following = 1.0 if restart else (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = found if restart else found + (momentum - 1) / following * (found - before)
        momentum = following
    facts = {"gamma": gamma, "sum": float(found.sum() / count), "converged": residual < TOLERANCE * count}
    return _weighted(found, facts)


def _project(x: np.ndarray, bound: float, low: float, high: float) -> np.ndarray:
    """The nearest point of {0 <= b <= bound, low <= sum b <= high}."""
    clipped = np.clip(x, 0, bound)
    if low <= (total := clipped.sum()) <= high:
        return clipped
    goal = low if total < low else high

    def excess(shift):
        return np.clip(x - shift, 0, bound).sum() - goal

    return np.clip(x - scipy.optimize.brentq(excess, x.min() - bound, x.max(), xtol=1e-14), 0, bound)


def kliep(data: Data, gamma: Width = 0.0, centres: Count = 100, folds: Count = 5, seed: Seed = 0) -> Found:
    """KLIEP (Sugiyama et al. 2008, equations 8-10): max sum_j log (A a)_j with b'a = 1, a >= 0; weights K a.

    A_jl = k(t_j, c_l), b_l = mean_i k(x_i, c_l), the centres c a random subset of the target's rows. gamma = 0: the
    largest held-out likelihood in `folds` parts of the target, of seven values around one over the median of d^2.
    Solved as max mean log A a - b'a over a >= 0, whose optimum has b'a = 1, by L-BFGS-B: a step of machine epsilon, as
    in existing code, never leaves the start.
    """
    order = np.random.default_rng(seed).permutation(len(data.target))
    centre = data.target[order[:centres]]
    near, far = squared_distances(data.target, centre), squared_distances(data.source, centre)
    parts = [part for part in (order[i::folds] for i in range(folds)) if 0 < len(part) < len(order)]

    def held_out(width):
        a, b = np.exp(-width * near), np.exp(-width * far).mean(axis=0)
        likelihoods = []
        for part in parts:
            used = ~np.isin(order[:centres], part)  # a held-out row is no centre, where its own density is largest
            alpha, _ = _kliep(np.delete(a, part, axis=0)[:, used], b[used], steps=100)
            likelihoods.append(np.log(np.maximum(a[part][:, used] @ alpha, 1e-300)).mean())
        return np.mean(likelihoods)

    middle = median_width(near)
    gamma = gamma or (max((middle * 4.0**e for e in range(-3, 4)), key=held_out) if parts else middle)
    alpha, value = _kliep(np.exp(-gamma * near), np.exp(-gamma * far).mean(axis=0))
    return _weighted(np.exp(-gamma * far) @ alpha, {"gamma": float(gamma), "log_likelihood": value})


def _kliep(a: np.ndarray, b: np.ndarray, steps: int = 1000) -> tuple[np.ndarray, float]:
    """(alpha, mean log A alpha) with b'alpha = 1; solved in alpha_l b_l, which are shares of a mixture."""
    scaled = a / np.maximum(b, 1e-300)

    def loss(shares):
        density = np.maximum(scaled @ shares, 1e-300)
        return shares.sum() - np.log(density).mean(), 1 - (scaled / density[:, None]).mean(axis=0)

    options = {"maxiter": steps, "maxfun": 2 * steps, "ftol": 1e-12, "gtol": 1e-9}
    start = np.full(len(b), 1 / len(b))
    shares = scipy.optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(b), options=options
    ).x
    shares /= shares.sum()
    return shares / np.maximum(b, 1e-300), float(np.log(np.maximum(scaled @ shares, 1e-300)).mean())


def density_ratio(data: Data, c: Strength = 1.0) -> Found:
    """w(x) = p(t | x) / p(s | x) * N_s / N_t of a logistic regression of the domain (Bickel et al. 2007, equation 6).

    c: inverse strength of its penalty. The target's probability is the numerator; existing code has the inverse. Where
    the domains separate, few examples carry all weight: see `effective`.
    """
    from sklearn.linear_model import LogisticRegression

    both = np.concatenate([data.source, data.target])
    domain = np.repeat([0, 1], [len(data.source), len(data.target)])
    model = LogisticRegression(C=c, max_iter=10_000, tol=1e-8).fit(both, domain)
    logits = model.decision_function(both)
    log_ratio = logits[: len(data.source)] + math.log(len(data.source) / len(data.target))
    facts = {"domain_accuracy": float(((logits > 0) == domain).mean())}
    return _weighted(np.exp(log_ratio - log_ratio.max()), facts)


def tradaboost(data: Data, rounds: Count = 20) -> Found:
    """TrAdaBoost (Dai et al. 2007, figure 1): boosting that lowers source examples which the target's contradict.

    Needs a few labelled target examples. In each round: fit on both by weight; e is the weighted error on the target,
    b_t = e / (1 - e), which code that takes e / (2 - e) changes; errors of the source are multiplied by
    b = 1 / (1 + sqrt(2 ln N_s / rounds)), those of the target divided by b_t. The rounds from the middle on vote by
    log 1/b_t, for two classes as in the paper. It ends at an error of 1/2 or more; an error of 0 counts as 1e-10.
    """
    count, (few, few_labels) = len(data.source), data.shots
    rows, labels = np.concatenate([data.source, few]), np.append(data.labels, few_labels)
    weights, beta = np.ones(len(rows)), 1 / (1 + math.sqrt(2 * math.log(count) / rounds))
    fitted, votes, errors = [], [], []
    for _ in range(rounds):
        predict = data.fit(rows, labels, weights / weights.mean())
        wrong = predict(rows) != labels
        error = float(weights[count:] @ wrong[count:] / weights[count:].sum())
        errors.append(error)
        if error >= 0.5 and fitted:
            break
        kept = min(max(error, 1e-10), 0.5 - 1e-10)
        fitted.append(predict)
        votes.append(math.log((1 - kept) / kept))
        if error >= 0.5:
            break
        weights[:count] *= beta ** wrong[:count]
        weights[count:] *= ((1 - kept) / kept) ** wrong[count:]
    first = (len(fitted) + 1) // 2 - 1  # round ceil(N / 2)
    classes = np.unique(labels)

    def vote(x):
        chosen = zip(fitted[first:], votes[first:], strict=True)
        total = sum(v * (predict(x)[:, None] == classes) for predict, v in chosen)
        return classes[total.argmax(axis=1)]

    return _weighted(weights[:count], {"rounds": len(fitted), "errors": errors})._replace(predict=vote)


def _weighted(weights: np.ndarray, facts: dict[str, Any]) -> Found:
    """Weights of mean 1; facts: the largest, and the effective number of examples (sum w)^2 / sum w^2."""
    if not (np.isfinite(weights).all() and weights.sum() > 0):
        raise ValueError("no source example has a weight: the domains do not touch at this width; take a smaller gamma")
    weights = weights / weights.mean()
    effective = float(len(weights) ** 2 / np.square(weights).sum())
    return Found(weights=weights, facts=facts | {"effective": effective, "largest": float(weights.max())})


METHODS = {each.__name__: each for each in (kmm, kliep, density_ratio, tradaboost)}
