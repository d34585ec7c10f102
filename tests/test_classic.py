"""Classic transfer on features against goldens, other libraries, and the papers' equations in plain numpy."""

import math

import numpy as np
import pytest
import scipy
import sklearn.metrics.pairwise
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

import tl_jax
from tl_jax.methods import classic
from tl_jax.methods.classic import classifiers, features, instances

ROW, COLUMN = np.arange(60)[:, None], np.arange(8)[None]
Y = np.arange(60) % 3
X = np.sin(0.7 * ROW + 1.3 * COLUMN) + 0.5 * np.cos(0.11 * ROW * (COLUMN + 1)) + 0.3 * np.cos(2 * Y[:, None] + COLUMN)
S, T = X[:30], X[30:]
GOLDEN = features.Data(S, Y[:30], T)
FEATURES = [name for name in features.METHODS if name != "none"]


def two_domains(n=45, m=31, d=7, classes=4, shift=0.7, seed=0):
    """Gaussian classes; the target is turned and shifted. Labels need not count from 0."""
    rng = np.random.default_rng(seed)
    centres, turn = 3 * rng.normal(size=(classes, d)), np.linalg.qr(rng.normal(size=(d, d)))[0]
    ys, yt = np.arange(n) % classes, np.arange(m) % classes
    xs = centres[ys] + rng.normal(size=(n, d))
    xt = (centres[yt] + rng.normal(size=(m, d))) @ scipy.linalg.fractional_matrix_power(turn, 0.05).real + shift
    return xs, ys * 3 + 2, xt, yt * 3 + 2


def test_subspace_alignment_has_the_golden_overlap_and_angles():
    found = features.sa(GOLDEN, k=3)
    np.testing.assert_allclose(found.facts["angles"], [0.0414989313, 0.3750243179, 1.2189607559], atol=1e-9)
    ps, pt = (np.linalg.svd(x - x.mean(0))[2][:3].T for x in (S, T))
    assert np.square(ps.T @ pt).sum() == pytest.approx(1.982870673, abs=1e-9)
    here, there = found.source, found.transform(T)
    expected = (S - S.mean(0)) @ ps @ ps.T @ pt @ pt.T @ (T - T.mean(0)).T  # no sign of a direction is in it
    np.testing.assert_allclose(here @ there.T, expected, atol=1e-10)


def test_geodesic_flow_kernel_has_the_golden_entries_and_the_trace_k():
    found = features.gfk(GOLDEN, k=3)
    factor = found.transform(np.eye(8))
    assert (factor @ factor.T)[0, 0] == pytest.approx(0.3231879056, abs=1e-9)
    assert found.source[0] @ found.transform(T)[0] == pytest.approx(-0.8129436842, abs=1e-9)
    assert np.trace(factor @ factor.T) == pytest.approx(3)


def test_geodesic_flow_kernel_is_the_integral_along_the_geodesic():
    ps, pt = (features._principal(x, 3)[0] for x in (S, T))
    u, cosines, v = np.linalg.svd(ps.T @ pt)
    theta = np.arccos(cosines)
    rest = (pt @ v.T - ps @ u * cosines) / np.sin(theta)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    flow = [ps @ u * np.cos(t * theta) + rest * np.sin(t * theta) for t in (nodes + 1) / 2]
    integral = sum(w / 2 * phi @ phi.T for w, phi in zip(weights, flow, strict=True))
    factor = features.gfk(GOLDEN, k=3).transform(np.eye(8))
    np.testing.assert_allclose(factor @ factor.T, integral, atol=1e-12)


def test_geodesic_flow_kernel_of_equal_domains_is_the_projection():
    found = features.gfk(features.Data(S, Y[:30], S + 2.5), k=4)
    factor, direction = found.transform(np.eye(8)), features._principal(S, 4)[0]
    np.testing.assert_allclose(factor @ factor.T, direction @ direction.T, atol=1e-7)
    assert np.isfinite(factor).all() and max(found.facts["angles"]) < 1e-6


def test_tca_has_the_golden_values_and_solves_the_paper_s_problem():
    found = features.tca(GOLDEN, k=3)
    np.testing.assert_allclose(found.facts["phi"], [28614.4193912087, 1632.1832695959, 142.4374355607], rtol=1e-9)
    for kernel, k in (("linear", X @ X.T), ("rbf", sklearn.metrics.pairwise.rbf_kernel(X, gamma=0.05))):
        e = np.repeat([1 / 30, -1 / 30], 30)
        centre = np.eye(60) - 1 / 60
        values, vectors = scipy.linalg.eig(k @ centre @ k, k @ np.outer(e, e) @ k + 0.3 * np.eye(60))
        top = np.argsort(-values.real)[:2]
        found = features.tca(GOLDEN, k=2, strength=0.3, kernel=kernel, gamma=0.05)
        np.testing.assert_allclose(found.facts["phi"], values.real[top], rtol=1e-6)
        expected, own = (k @ vectors[:, top].real)[:30], found.source
        for a, b in zip(expected.T, own.T, strict=True):
            assert abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("shape", [(20, 13, 40), (60, 50, 5)])
def test_kernel_of_few_rows_or_few_columns_gives_what_the_whole_system_gives(shape):
    xs, ys, xt, _ = two_domains(*shape)
    both = np.concatenate([xs, xt])
    e = np.repeat([1 / len(xs), -1 / len(xt)], [len(xs), len(xt)])
    k, centre = both @ both.T, np.eye(len(both)) - 1 / len(both)
    phi = scipy.linalg.eigh(k @ centre @ k, k @ np.outer(e, e) @ k + np.eye(len(both)), eigvals_only=True)[::-1]
    found = features.tca(features.Data(xs, ys, xt), k=4)
    np.testing.assert_allclose(found.facts["phi"], phi[:4], rtol=1e-8)


def plain_jda(xs, ys, xt, k, rounds):
    """Algorithm 1 of the paper with N x N matrices."""

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    x, n, m, classes = unit(np.concatenate([xs, xt])), len(xs), len(xt), np.unique(ys)
    kernel, centre, pseudo = x @ x.T, np.eye(n + m) - 1 / (n + m), None
    for _ in range(rounds):
        e = np.repeat([1 / n, -1 / m], [n, m])
        matrix = np.outer(e, e) * len(classes)
        for c in classes:
            if pseudo is not None and (pseudo == c).any():
                e = np.concatenate([(ys == c) / (ys == c).sum(), -1.0 * (pseudo == c) / (pseudo == c).sum()])
                matrix = matrix + np.outer(e, e)
        matrix = matrix / np.linalg.norm(matrix)
        right = kernel @ matrix @ kernel + np.eye(n + m)
        vectors = scipy.linalg.eigh(kernel @ centre @ kernel, right)[1][:, ::-1][:, :k]
        z = unit(kernel @ vectors)
        pseudo = KNeighborsClassifier(1).fit(z[:n], ys).predict(z[n:])
    return z, pseudo


def test_ten_rounds_of_jda_are_those_of_plain_numpy():
    xs, ys, xt, _ = two_domains()
    expected, pseudo = plain_jda(xs, ys, xt, 4, 10)
    found = classic.adapt("jda", xs, ys, xt, k=4)
    own = np.concatenate([found.source, found.target])
    np.testing.assert_allclose(own @ own.T, expected @ expected.T, atol=1e-8)
    np.testing.assert_array_equal(found.predict(xt), pseudo)
    assert len(found.facts["changed"]) == 10


def test_a_class_that_no_pseudo_label_has_leaves_jda_finite():
    xs, ys, xt, yt = two_domains()
    found = classic.adapt("jda", xs, ys, xt[yt == 5], k=3)
    assert max(found.facts["empty_pseudo_classes"]) > 0 and np.isfinite(found.target).all()
    expected, _ = plain_jda(xs, ys, xt[yt == 5], 3, 10)
    np.testing.assert_allclose(found.source @ found.source.T, (expected @ expected.T)[:45, :45], atol=1e-8)


@pytest.mark.parametrize("columns", [8, 90])
def test_coral_is_the_golden_map_with_few_and_with_many_columns(columns):
    found = features.coral(GOLDEN).source
    assert np.linalg.norm(found) == pytest.approx(12.7753160642, abs=1e-9)
    assert found[0, 0] == pytest.approx(0.877656039, abs=1e-9)
    rng = np.random.default_rng(1)
    xs, xt = rng.normal(size=(21, columns)) + 1, rng.normal(size=(34, columns)) * 2
    cs, ct = (np.cov(x.T) + np.eye(columns) for x in (xs, xt))
    expected = xs @ np.linalg.inv(scipy.linalg.sqrtm(cs)) @ scipy.linalg.sqrtm(ct)
    np.testing.assert_allclose(features.coral(features.Data(xs, None, xt)).source, expected, atol=1e-9)


def test_pca_is_that_of_scikit_learn_on_both_domains():
    both = PCA(3).fit(X)
    found = features.pca(GOLDEN, k=3)
    np.testing.assert_allclose(abs(found.transform(T)), abs(both.transform(T)), atol=1e-10)
    assert found.facts["explained"] == pytest.approx(both.explained_variance_ratio_.sum())


@pytest.mark.parametrize("shape", [(30, 25, 4), (5, 4, 20)])
def test_autoencoder_is_the_best_reconstruction_over_infinitely_many_corruptions(shape):
    n, m, d = shape
    rng = np.random.default_rng(2)
    xs, xt = rng.normal(size=(n, d)), rng.normal(size=(m, d)) + 0.3
    found = features.autoencoder(features.Data(xs, None, xt), layers=2, corruption=0.4)
    x = np.append(np.concatenate([xs, xt]), np.ones((n + m, 1)), axis=1).T  # the paper has examples in columns
    q, scatter = np.append(np.full(d, 0.6), 1), x @ x.T
    big = scatter * np.outer(q, q)
    np.fill_diagonal(big, q * np.diag(scatter))
    w = (scatter * q)[:d] @ np.linalg.inv(big + 1e-5 * np.eye(d + 1))
    np.testing.assert_allclose(found.source[:, d : 2 * d], np.tanh(w @ x[:, :n]).T, atol=1e-9)
    assert found.transform(xt).shape == (m, 3 * d)
    draws = 20_000
    kept = np.append(rng.random((draws, n + m, d)) < 0.6, np.ones((draws, n + m, 1)), axis=2) if d < 10 else None
    if kept is not None:  # against draws; to their error
        noisy = (kept * x.T).reshape(-1, d + 1)
        sampled = np.linalg.solve(noisy.T @ noisy, noisy.T @ np.tile(x[:d].T, (draws, 1))).T
        np.testing.assert_allclose(w, sampled, atol=0.02)


def test_transport_has_the_golden_costs_and_the_plans_of_pot():
    cost = classifiers.squared_distances(S, T)
    exact = features.ot_da(GOLDEN, regularization=0.0, unit="one")
    smooth = features.ot_da(GOLDEN, regularization=1.0, unit="one")
    assert exact.facts["cost"] == pytest.approx(1.6519366303, abs=1e-9)
    assert smooth.facts["cost"] == pytest.approx(2.2242240186, abs=1e-6)
    ot = pytest.importorskip("ot", reason="POT is a reference of requirements-dev.txt")
    uniform = np.full(30, 1 / 30)
    np.testing.assert_allclose(exact.source, 30 * ot.emd(uniform, uniform, cost) @ T, atol=1e-9)
    np.testing.assert_allclose(
        smooth.source, 30 * ot.sinkhorn(uniform, uniform, cost, 1.0, stopThr=1e-13) @ T, atol=1e-6
    )


@pytest.mark.parametrize("strength", [0.5, 0.01, 0.002])
def test_transport_of_unequal_domains_is_that_of_pot(strength):
    ot = pytest.importorskip("ot", reason="POT is a reference of requirements-dev.txt")
    xs, ys, xt, _ = two_domains(n=17, m=29, shift=50.0)
    cost = classifiers.squared_distances(xs, xt)
    a, b = np.full(17, 1 / 17), np.full(29, 1 / 29)
    found = features.ot_da(features.Data(xs, ys, xt), regularization=strength, unit="max", iterations=200_000)
    plan = ot.sinkhorn(a, b, cost, strength * cost.max(), "sinkhorn_log", numItermax=200_000, stopThr=1e-12)
    np.testing.assert_allclose(found.source, 17 * plan @ xt, atol=1e-5)
    exact = features.ot_da(features.Data(xs, ys, xt), regularization=0.0)
    np.testing.assert_allclose(exact.facts["cost"], ot.emd2(a, b, cost), rtol=1e-9)


@pytest.mark.parametrize("bound", [1000.0, 1.3])
def test_kernel_mean_matching_is_the_solution_of_a_quadratic_program(bound):
    xs, ys, xt, _ = two_domains(n=24, m=35, d=3)
    n, gamma = len(xs), 0.2
    k = sklearn.metrics.pairwise.rbf_kernel(xs, gamma=gamma)
    kappa = n * sklearn.metrics.pairwise.rbf_kernel(xs, xt, gamma=gamma).mean(1)
    slack = n * (math.sqrt(n) - 1) / math.sqrt(n)
    reference = scipy.optimize.minimize(
        lambda b: b @ k @ b / 2 - kappa @ b, np.ones(n), jac=lambda b: k @ b - kappa, method="SLSQP",
        bounds=[(0, bound)] * n, options={"maxiter": 1000, "ftol": 1e-14},
        constraints=[{"type": "ineq", "fun": lambda b, s=s: slack - s * (b.sum() - n)} for s in (1, -1)],
    )  # fmt: skip
    found = instances.kmm(features.Data(xs, ys, xt), gamma=gamma, bound=bound)
    beta = found.weights * found.facts["sum"]
    assert found.facts["converged"] and found.weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(beta, reference.x, atol=2e-5)
    assert beta.max() <= bound + 1e-12


def test_kernel_mean_matching_keeps_the_sum_within_its_limits():
    xs, ys, xt, _ = two_domains(n=24, m=35, d=3, shift=2.0)
    free = instances.kmm(features.Data(xs, ys, xt), gamma=0.2).facts["sum"]
    assert free < 0.8
    tight = instances.kmm(features.Data(xs, ys, xt), gamma=0.2, epsilon=0.1).facts["sum"]
    assert tight == pytest.approx(0.9, abs=1e-9)


def test_kliep_is_the_solution_of_its_convex_program():
    xs, ys, xt, _ = two_domains(n=30, m=22, d=2)
    gamma = 0.1
    a = sklearn.metrics.pairwise.rbf_kernel(xt, xt, gamma=gamma)
    b = sklearn.metrics.pairwise.rbf_kernel(xs, xt, gamma=gamma).mean(0)
    reference = scipy.optimize.minimize(
        lambda x: -np.log(a @ x).mean(), np.full(22, 1 / b.sum()), jac=lambda x: -(a / (a @ x)[:, None]).mean(0),
        method="SLSQP", bounds=[(0, None)] * 22, options={"maxiter": 2000, "ftol": 1e-15},
        constraints={"type": "eq", "fun": lambda x: b @ x - 1, "jac": lambda x: b},
    )  # fmt: skip
    found = instances.kliep(features.Data(xs, ys, xt), gamma=gamma)
    assert found.facts["log_likelihood"] == pytest.approx(-reference.fun, abs=1e-7)
    expected = sklearn.metrics.pairwise.rbf_kernel(xs, xt, gamma=gamma) @ reference.x
    np.testing.assert_allclose(found.weights, expected, atol=2e-3)
    assert found.weights.std() > 0.3  # it moved


@pytest.mark.slow
def test_kliep_takes_the_width_of_the_largest_held_out_likelihood():
    rng = np.random.default_rng(0)
    xs, xt = rng.normal(size=(300, 1)), 0.5 + 0.6 * rng.normal(size=(200, 1))
    found = instances.kliep(features.Data(xs, None, xt))
    true = scipy.stats.norm.pdf(xs[:, 0], 0.5, 0.6) / scipy.stats.norm.pdf(xs[:, 0])
    assert np.corrcoef(found.weights, true)[0, 1] > 0.95


@pytest.mark.parametrize("counts", [(6000, 3000), (2000, 6000)])
def test_density_ratio_is_that_of_two_gaussians(counts):
    """Of one covariance: log p_t / p_s is linear, 2 m'x for means -m and m."""
    rng, mean = np.random.default_rng(0), np.array([0.3, -0.4])
    xs, xt = rng.normal(size=(counts[0], 2)) - mean, rng.normal(size=(counts[1], 2)) + mean
    found = instances.density_ratio(features.Data(xs, None, xt), c=1e6)
    true = np.exp(2 * xs @ mean)
    np.testing.assert_allclose(np.log(found.weights), np.log(true / true.mean()), atol=0.25)
    assert np.average(xs, axis=0, weights=found.weights) == pytest.approx(mean, abs=0.05)  # towards the target


def test_tradaboost_weights_are_those_of_a_loop_by_hand():
    xs, ys, xt, yt = two_domains(n=60, m=40, classes=2, shift=1.5, seed=3)
    rng = np.random.default_rng(0)
    xs, xt = xs / 5 + rng.normal(size=xs.shape), xt / 4 + 0.7 * rng.normal(size=xt.shape)
    m, rounds, n = 30, 6, 60
    few = xt[:m]
    found = classic.adapt("tradaboost", xs, ys, xt, classifier="logistic", shots=(few, yt[:m]), rounds=rounds)
    rows, labels, w = np.concatenate([xs, few]), np.append(ys, yt[:m]), np.ones(n + m)
    beta, models, betas = 1 / (1 + np.sqrt(2 * np.log(n) / rounds)), [], []
    for t in range(rounds):
        model = LogisticRegression(max_iter=10_000).fit(rows, labels, w / w.mean())
        wrong = (model.predict(rows) != labels).astype(float)
        error = np.sum(w[n:] * wrong[n:]) / np.sum(w[n:])
        assert found.facts["errors"][t] == pytest.approx(error, abs=1e-12)
        beta_t = max(error, 1e-10) / (1 - max(error, 1e-10))
        w = np.append(w[:n] * beta ** wrong[:n], w[n:] * beta_t ** -wrong[n:])
        models.append(model), betas.append(beta_t)
    assert any(error > 0 for error in found.facts["errors"])
    np.testing.assert_allclose(found.weights, w[:n] / w[:n].mean(), rtol=1e-12)
    last = range(math.ceil(rounds / 2) - 1, rounds)
    ones = sum(-np.log(betas[t]) * (models[t].predict(xt) == labels.max()) for t in last)
    half = sum(-np.log(betas[t]) for t in last) / 2
    np.testing.assert_array_equal(found.predict(xt) == labels.max(), ones > half)


def test_classifiers_are_those_of_scikit_learn_and_count_an_example_by_its_weight():
    xs, ys, xt, _ = two_domains()
    np.testing.assert_array_equal(classifiers.nearest(xs, ys)(xt), KNeighborsClassifier(1).fit(xs, ys).predict(xt))
    w = np.random.default_rng(0).integers(0, 3, len(xs)).astype(float)
    twice = np.repeat(np.arange(len(xs)), w.astype(int))
    for name, model in (("svm", SVC(kernel="linear")), ("logistic", LogisticRegression(max_iter=10_000))):
        found = classifiers.CLASSIFIERS[name](xs, ys, w)(xt)
        np.testing.assert_array_equal(found, model.fit(xs[twice], ys[twice]).predict(xt))


@pytest.mark.thin(26)
@pytest.mark.parametrize("name", list(classic.METHODS))
@pytest.mark.parametrize("case", ["float32", "one class", "one row a class", "constant column", "wide", "long"])
def test_every_method_bears_odd_data(name, case):
    shape = {"one row a class": (4, 5, 7), "wide": (12, 9, 60), "long": (90, 70, 2)}.get(case, (25, 18, 7))
    xs, ys, xt, yt = two_domains(*shape)
    if case == "float32":
        xs, xt = xs.astype(np.float32), xt.astype(np.float32)
    if case == "one class":
        ys = np.full(len(ys), 7)
    if case == "constant column":
        xs[:, 1] = xt[:, 1] = 3.0
    shots = {"shots": (xt[:4], ys[:4])} if name == "tradaboost" else {}
    kind = "logistic" if name in instances.METHODS else "1nn"
    found = classic.adapt(name, xs, ys, xt, classifier=kind, **shots)
    predicted = found.predict(xt)
    assert predicted.shape == yt.shape and set(predicted) <= set(ys)
    assert found.source.dtype == found.target.dtype == np.float64
    assert np.isfinite(found.source).all() and np.isfinite(found.target).all()
    assert found.source.shape[1] == found.target.shape[1] and len(found.source) == len(xs)
    np.testing.assert_array_equal(found.predict(xt[:3]), predicted[:3])
    if found.weights is not None:
        assert found.weights.mean() == pytest.approx(1) and (found.weights >= 0).all()


@pytest.mark.parametrize("name", FEATURES)
def test_equal_domains_lose_nothing(name):
    xs, ys, _, _ = two_domains(n=60)
    assert (classic.adapt(name, xs, ys, xs).predict(xs) == ys).mean() > 0.95


def test_adapting_helps_where_the_target_is_shifted():
    xs, ys, xt, yt = two_domains(n=120, m=100, shift=2.5, seed=5)
    accuracy = {
        name: (classic.adapt(name, xs, ys, xt).predict(xt) == yt).mean() for name in ("none", "jda", "sa", "ot_da")
    }
    assert all(accuracy[name] > accuracy["none"] + 0.05 for name in ("jda", "sa", "ot_da")), accuracy


def test_every_problem_of_a_call_is_in_one_message():
    xs, ys, xt, _ = two_domains()
    bad = xt.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError) as caught:
        classic.adapt("tca", xs, ys[:-1] * 0.5, bad[:, :6], classifier="1n", k=0, strenght=2.0, shots=(xt, ys))
    for part in (
        "tca: k = 0, expected an integer of at least 1",
        "no parameter 'strenght' (did you mean 'strength'?)",
        "no classifier '1n' (did you mean '1nn'?)",
        "labels of source are float64 [44], expected integers [45]",
        "1 of 31 rows of target are not finite",
        "target has 6 columns, source 7",
        "tca takes no shots",
    ):
        assert part in str(caught.value), part
    with pytest.raises(ValueError, match=r"no classic method 'tka' \(did you mean 'tca'\?\)"):
        classic.adapt("tka", xs, ys, xt)
    with pytest.raises(ValueError, match="kmm weights examples, which 1nn cannot use; take svm or logistic"):
        classic.adapt("kmm", xs, ys, xt)
    with pytest.raises(ValueError, match="tradaboost needs shots"):
        classic.adapt("tradaboost", xs, ys, xt, classifier="svm")
    with pytest.raises(ValueError, match=r"target is float64 \[7\], expected numbers"):
        classic.adapt("pca", xs, ys, xt[0])
    with pytest.raises(ValueError, match="no direction of variance"):
        classic.adapt("gfk", xs, ys, np.ones((4, 7)))
    with pytest.raises(ValueError, match=r"expected rows \[N, 7\]"):
        classic.adapt("pca", xs, ys, xt).predict(xt[:, :5])
    with pytest.raises(ValueError, match=r"no scaling 'z-score' \(did you mean 'zscore'\?\)"):
        classic.scale(xs, ("z-score",))


def test_the_target_s_labels_are_no_argument_of_any_method():
    assert tl_jax.adapt_features is classic.adapt
    assert not {field for field in features.Data._fields if "label" in field} - {"labels"}
    xs, ys, xt, _ = two_domains()
    assert classic.adapt("pca", xs, ys, xt, k=500).facts["components"] == 7  # at most the rank


def test_scalings_leave_what_has_no_scale():
    x = np.array([[1.0, 3.0, 2.0], [0.0, 0.0, 2.0], [2.0, 2.0, 2.0]])
    np.testing.assert_allclose(classic.scale(x, ("row_sum",))[0], [1 / 6, 1 / 2, 1 / 3])
    z = classic.scale(x.astype(np.float32), ("zscore",))
    assert z.dtype == np.float64 and (z[:, 2] == 0).all()
    np.testing.assert_allclose(z[:, :2].std(axis=0), 1)
    assert (classic.scale(np.zeros((2, 3)), ("row_l2", "row_sum", "zscore")) == 0).all()
