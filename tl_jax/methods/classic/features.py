"""Features that two domains share: projections, kernels, maps and transport. numpy and scipy, float64."""

import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.core import checks
from tl_jax.methods.classic.classifiers import Fit, nearest, squared_distances

Count = Annotated[int, checks.integer(1)]
Strength = Annotated[float, checks.number(0, above=True)]
Width = Annotated[float, checks.number(0)]
Kernel = Annotated[str, checks.one_of("linear", "rbf")]
Map = Callable[[np.ndarray], np.ndarray]


class Data(NamedTuple):
    """What a method may read. Labels of the target are not in it, except those of `shots`."""

    source: np.ndarray  # [N_s, D] float64
    labels: np.ndarray  # [N_s]
    target: np.ndarray  # [N_t, D] float64
    fit: Fit = nearest
    shots: tuple[np.ndarray, np.ndarray] | None = None  # a few labelled examples of the target: [M, D], [M]


class Found(NamedTuple):
    """What a method gives; None: unchanged, unweighted, or the classifier's own.

    source: [N_s, d]. transform: of target rows [N, D] -> [N, d]. weights: of the source [N_s], mean 1. facts: of the
    fit, JSON-able. predict: target rows -> labels, where the method brings its own classifiers.
    """

    source: np.ndarray | None = None
    transform: Map | None = None
    weights: np.ndarray | None = None
    facts: Mapping[str, Any] = types.MappingProxyType({})
    predict: Map | None = None


def none(data: Data) -> Found:
    """The baseline: the features as they are."""
    return Found()


def pca(data: Data, k: Count = 100) -> Found:
    """The first k principal components of both domains together; at most their rank.

    Gong et al. 2012, whose tables take the concatenated data.
    """
    both = np.concatenate([data.source, data.target])
    components, values = _principal(both, k)

    def transform(x):
        return (x - both.mean(axis=0)) @ components

    explained = float(values.sum() / max(np.square(both - both.mean(axis=0)).sum(), 1e-300))
    return Found(transform(data.source), transform, facts={"components": len(values), "explained": explained})


def autoencoder(
    data: Data,
    layers: Count = 3,
    corruption: Annotated[float, checks.number(0, 1, below=True)] = 0.5,
    ridge: Strength = 1e-5,
) -> Found:
    """Marginalised stacked denoising autoencoder (Chen et al. 2012, equations 3-5 and 8): no gradient, no seed.

    W = P Q^-1 is the best linear reconstruction of rows of which each feature is set to 0 with probability
    `corruption`, over infinitely many draws; the constant feature is never corrupted. A layer gives tanh(W [x, 1]) and
    feeds the next; input and layers together are the features [N, (layers + 1) D]. With more columns than rows the
    system is solved among the rows (Woodbury). ridge: added to the diagonal of Q, 1e-5 as in the authors' code. The
    defaults suit features of mean 0. The nonlinearity makes it more than PCA, whose span any linear one has.
    """
    current, maps = np.concatenate([data.source, data.target]), []
    for _ in range(layers):
        maps.append(_denoiser(current, corruption, ridge))
        current = maps[-1](current)

    def transform(x):
        found = [x]
        for each in maps:
            found.append(each(found[-1]))
        return np.concatenate(found, axis=1)

    return Found(transform(data.source), transform, facts={"layers": layers, "corruption": corruption})


def _denoiser(x: np.ndarray, corruption: float, ridge: float) -> Map:
    """x -> tanh(W [x, 1]). With Y = [X, 1] diag(q): Q = Y'Y + D, P = X'Y, so W' = (Y'Y + D)^-1 Y'X."""
    kept = np.append(np.full(x.shape[1], 1 - corruption), 1.0)
    extended = np.append(x, np.ones((len(x), 1)), axis=1)
    y, diagonal = extended * kept, kept * (1 - kept) * np.square(extended).sum(axis=0) + ridge
    if len(x) < y.shape[1]:
        left = (y / diagonal).T
        right = scipy.linalg.solve(np.eye(len(x)) + y @ left, x, assume_a="pos")
    else:
        left, right = scipy.linalg.solve(y.T @ y + np.diag(diagonal), y.T @ x, assume_a="pos"), None

    def apply(rows):
        hidden = np.append(rows, np.ones((len(rows), 1)), axis=1) @ left
        return np.tanh(hidden if right is None else hidden @ right)

    return apply


def tca(data: Data, k: Count = 100, strength: Strength = 1.0, kernel: Kernel = "linear", gamma: Width = 0.0) -> Found:
    """Transfer component analysis (Pan et al. 2011, equations 9-12): K H K a = phi (K L K + strength I) a, top k.

    L = e e', e_i = 1/N_s in the source and -1/N_t in the target; H centres; features are rows of K A. A problem of
    symmetric matrices, so phi is real and the order certain: code that takes I + K L K with another K H K, or a
    symmetric solver for their quotient, solves something else. gamma of the rbf kernel exp(-gamma d^2); 0: one over the
    median of d^2. k is at most the rank of K. Each a is scaled so that a'(K L K + strength I)a = 1.
    The system has the size of the rank of K: min(N, D) for the linear kernel.
    """
    embedded, embed, facts = _embedding(data, kernel, gamma)
    directions, phi = _components(embedded, _marginal(data), strength, k)
    facts |= {"components": len(phi), "phi": phi.tolist()}
    return Found((embedded @ directions)[: len(data.source)], lambda x: embed(x) @ directions, facts=facts)


def jda(
    data: Data,
    k: Count = 100,
    strength: Strength = 1.0,
    rounds: Count = 10,
    kernel: Kernel = "linear",
    gamma: Width = 0.0,
    unit: Annotated[bool, checks.FLAG] = True,
) -> Found:
    """Joint distribution adaptation (Long et al. 2013, equations 6-9 and algorithm 1): TCA for each class as well.

    K H K a = phi (K M K + strength I) a, M = C M_0 + sum_c M_c over its Frobenius norm. M_c holds the means of class c,
    of the source's labels and of the target's pseudo-labels, which 1-NN in the last round's features gives; in the
    first round only M_0. A class without pseudo-label has no M_c in that round: dividing by its count gives inf.
    unit: rows and features are scaled to length 1, as in the authors' code. The rest is as in `tca`.
    """
    if unit:
        data = data._replace(source=row_l2(data.source), target=row_l2(data.target))
    embedded, embed, facts = _embedding(data, kernel, gamma)
    count, classes, changed, absent = len(data.source), np.unique(data.labels), [], []
    marginal, pseudo = _marginal(data), None

    def scale(x):
        return row_l2(x) if unit else x

    for _ in range(rounds):
        columns = [np.sqrt(len(classes)) * marginal]
        for c in classes if pseudo is not None else ():
            ours, theirs = data.labels == c, pseudo == c
            if theirs.any():
                columns.append(np.append(ours / ours.sum(), theirs / -theirs.sum())[:, None])
        means = np.concatenate(columns, axis=1)
        means /= np.sqrt(np.linalg.norm(means.T @ means))  # M = means means'
        directions, phi = _components(embedded, means, strength, k)
        features = scale(embedded @ directions)
        before, pseudo = pseudo, nearest(features[:count], data.labels)(features[count:])
        changed.append(len(pseudo) if before is None else int((pseudo != before).sum()))
        absent.append(len(classes) - len(np.unique(pseudo)))
    facts |= {"components": len(phi), "changed": changed, "empty_pseudo_classes": absent}

    def transform(x):
        return scale(embed(row_l2(x) if unit else x) @ directions)

    return Found(features[:count], transform, facts=facts)


def _marginal(data: Data) -> np.ndarray:
    """e [N, 1]: the mean of the source minus that of the target is e'X."""
    ours, theirs = len(data.source), len(data.target)
    return np.repeat([1 / ours, -1 / theirs], [ours, theirs])[:, None]


def _embedding(data: Data, kernel: str, gamma: float) -> tuple[np.ndarray, Map, dict[str, Any]]:
    """(K U [N, r], x -> k(x, X) U, facts) for the r eigenvectors U of K of both domains that are not of value 0.

    Every solution a of K H K a = phi (K L K + c I) a with phi > 0 is U b, so that b has r numbers, not N.
    """
    both = np.concatenate([data.source, data.target])
    if kernel == "linear":
        u, s, v = np.linalg.svd(both, full_matrices=False)
        found = s > s[0] * 1e-10
        into = v[found].T * s[found]
        return u[:, found] * s[found] ** 2, lambda x: x @ into, {"rank": int(found.sum())}
    distances = squared_distances(both, both)
    gamma = gamma or median_width(distances)
    values, vectors = np.linalg.eigh(np.exp(-gamma * distances))
    found = values > values[-1] * 1e-10
    vectors = vectors[:, found]

    def embed(x):
        return np.exp(-gamma * squared_distances(x, both)) @ vectors

    return vectors * values[found], embed, {"rank": int(found.sum()), "gamma": gamma}


def median_width(distances: np.ndarray) -> float:
    """One over the median of the squared distances that are above 0; 1 where there are none."""
    above = distances[distances > 0]
    return float(1 / np.median(above)) if above.size else 1.0


def _components(embedded: np.ndarray, means: np.ndarray, strength: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The top k (b, phi) of E'HE b = phi (E'V V'E + strength I) b for E [N, r], V [N, m]."""
    if not embedded.shape[1]:
        return np.zeros((0, 0)), np.zeros(0)
    centred, shifts = embedded - embedded.mean(axis=0), means.T @ embedded
    size = embedded.shape[1]
    right = shifts.T @ shifts + strength * np.eye(size)
    phi, b = scipy.linalg.eigh(centred.T @ centred, right, subset_by_index=[max(size - k, 0), size - 1])
    return b[:, ::-1], phi[::-1]


def sa(data: Data, k: Count = 20) -> Found:
    """Subspace alignment (Fernando et al. 2013, equation 2): X_s P_s (P_s' P_t) against X_t P_t.

    P are the first k principal directions of each domain, centred by itself. k is at most the smaller rank.
    """
    ps, pt = _subspaces(data, k, data.source.shape[1])
    middle = data.target.mean(axis=0)
    aligned = (data.source - data.source.mean(axis=0)) @ ps @ (ps.T @ pt)
    return Found(aligned, lambda x: (x - middle) @ pt, facts=_angle_facts(ps, pt))


def gfk(data: Data, k: Count = 20) -> Found:
    """Geodesic flow kernel (Gong et al. 2012, equations 5-7): x'Gy sums the projections of x and y on all subspaces
    between P_s and P_t, k principal directions of each domain. Features are x L with G = L L', so that the Euclidean
    distance is that of the kernel. k is at most the smaller rank and half of the columns.

    With theta the principal angles, A = P_s U and N the unit rest of P_t V outside P_s, a pair A_i, N_i has the block
    [[a, c], [c, b]], a, b = (1 +- sin 2 theta / 2 theta) / 2, c = (1 - cos 2 theta) / 4 theta. At theta = 0, where a
    quotient of code is 0 / 0, it is [[1, 0], [0, 0]] and N_i is not needed; so trace G = k always.
    """
    ps, pt = _subspaces(data, k, max(data.source.shape[1] // 2, 1))
    u, cosines, v = np.linalg.svd(ps.T @ pt)
    a_directions = ps @ u
    outside = pt @ v.T - a_directions * cosines
    sines = np.linalg.norm(outside, axis=0)
    theta = np.arctan2(sines, cosines)
    n_directions = outside / np.where(sines > 1e-12, sines, 1) * (sines > 1e-12)
    half = np.sinc(2 * theta / np.pi) / 2
    a, b, c = 0.5 + half, 0.5 - half, np.sin(theta) * np.sinc(theta / np.pi) / 2
    first = (a_directions * a + n_directions * c) / np.sqrt(a)
    second = n_directions * np.sqrt(np.maximum(b - c**2 / a, 0))
    factor = np.concatenate([first, second], axis=1)
    return Found(data.source @ factor, lambda x: x @ factor, facts=_angle_facts(ps, pt))


def _principal(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first principal directions [D, d] of rows [N, D], d = k or the rank if that is less, and s^2 [d]."""
    _, s, v = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    d = min(k, int((s > max(s[0], 1e-300) * 1e-10).sum()))
    return v[:d].T, s[:d] ** 2


def _subspaces(data: Data, k: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """P_s and P_t [D, d] of one size."""
    found = [_principal(x, min(k, most))[0] for x in (data.source, data.target)]
    d = min(each.shape[1] for each in found)
    if not d:
        raise ValueError("a domain has no direction of variance: all its rows are equal; expected two that differ")
    return found[0][:, :d], found[1][:, :d]


def _angle_facts(ps: np.ndarray, pt: np.ndarray) -> dict[str, Any]:
    return {"components": ps.shape[1], "angles": np.sort(scipy.linalg.subspace_angles(ps, pt)).tolist()}


def coral(data: Data, ridge: Strength = 1.0) -> Found:
    """CORAL (Sun, Feng & Saenko 2016, algorithm 1): X_s (C_s + I)^-1/2 (C_t + I)^1/2; the target stays.

    C are covariances (N - 1). The rows are not centred, and I has the factor `ridge` = 1: other code centres, or takes
    1e-5. Each power is I plus a matrix of the domain's rank, from the rows' singular vectors, so D may be large.
    """

    def power(x, rows, exponent):
        v, s2 = _principal(x, min(x.shape))
        variances = s2 / max(len(x) - 1, 1)
        gain = (variances + ridge) ** exponent - ridge**exponent
        return ridge**exponent * rows + (rows @ v * gain) @ v.T

    whitened = power(data.source, data.source, -0.5)
    return Found(power(data.target, whitened, 0.5))


def ot_da(
    data: Data,
    regularization: Width = 0.05,
    unit: Annotated[str, checks.one_of("median", "max", "one")] = "median",
    iterations: Count = 10_000,
) -> Found:
    """Optimal transport (Courty et al. 2017, equations 9 and 13): each source row moves to the mean of its plan.

    The plan has the least sum of cost + regularization * sum of plan log plan, with the cost the squared Euclidean
    distance and all rows of a domain of equal mass. regularization: in the unit of the median or largest cost, or as
    it is. 0: the exact plan by a linear program of N_s N_t variables; 1,000 x 1,000 take about ten seconds.
    The Sinkhorn iteration ends where the marginals fit to 1e-9, and absorbs its scalings, so that no exp underflows.
    """
    cost = squared_distances(data.source, data.target)
    size = {"median": np.median, "max": np.max, "one": lambda _: 1.0}[unit](cost) or 1.0
    if regularization:
        plan, error, used = _sinkhorn(cost, regularization * size, iterations)
    else:
        plan, error, used = _exact_plan(cost), 0.0, 0
    facts = {"cost": float((plan * cost).sum()), "marginal_error": error, "iterations": used}
    return Found(plan @ data.target / plan.sum(axis=1, keepdims=True), facts=facts)


def _sinkhorn(cost: np.ndarray, regularization: float, iterations: int) -> tuple[np.ndarray, float, int]:
    """(plan, largest error of a marginal, iterations). Schmitzer 2019, algorithm 2."""
    a, b = (np.full(n, 1 / n) for n in cost.shape)
    f = cost.min(axis=1)
    g = (cost - f[:, None]).min(axis=0)
    u, v, kernel = np.ones_like(a), np.ones_like(b), None
    for used in range(1, iterations + 1):
        if kernel is None or max(np.abs(np.log(u)).max(), np.abs(np.log(v)).max()) > 100:
            f, g = f + regularization * np.log(u), g + regularization * np.log(v)
            kernel, u, v = np.exp((f[:, None] + g - cost) / regularization), np.ones_like(a), np.ones_like(b)
        u = a / (kernel @ v)
        v = b / (u @ kernel)
        if used % 10 == 0 and np.abs(u * (kernel @ v) - a).sum() < 1e-9:
            break
    plan = u[:, None] * kernel * v
    return plan, float(np.abs(plan.sum(axis=1) - a).sum()), used


def _exact_plan(cost: np.ndarray) -> np.ndarray:
    rows, columns = cost.shape
    sums = [
        scipy.sparse.kron(scipy.sparse.eye_array(rows), np.ones((1, columns))),
        scipy.sparse.kron(np.ones((1, rows)), scipy.sparse.eye_array(columns)),
    ]
    marginals = np.repeat([1 / rows, 1 / columns], [rows, columns])
    found = scipy.optimize.linprog(cost.ravel(), A_eq=scipy.sparse.vstack(sums), b_eq=marginals, method="highs-ds")
    if found.x is None:
        raise ValueError(f"ot_da: the linear program has no solution ({found.message}); set regularization above 0")
    return found.x.reshape(cost.shape)


def row_sum(x: np.ndarray) -> np.ndarray:
    """Each row divided by its sum; a row of sum 0 stays."""
    total = x.sum(axis=1, keepdims=True)
    return x / np.where(total == 0, 1, total)


def row_l2(x: np.ndarray) -> np.ndarray:
    """Each row divided by its length; a row of zeros stays."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length == 0, 1, length)


def zscore(x: np.ndarray) -> np.ndarray:
    """Each column minus its mean, over its population standard deviation; a constant column becomes 0."""
    deviation = np.where(np.ptp(x, axis=0) == 0, np.inf, x.std(axis=0))
    return (x - x.mean(axis=0)) / deviation


SCALINGS: dict[str, Map] = {"row_sum": row_sum, "row_l2": row_l2, "zscore": zscore}
METHODS: dict[str, Callable[..., Found]] = {
    each.__name__: each for each in (none, pca, autoencoder, tca, jda, sa, gfk, coral, ot_da)
}
