"""Transferability scores: published values, the papers' definitions by loops, invariances, and what is degenerate."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn.datasets
import sklearn.linear_model
import sklearn.mixture
import sklearn.neighbors

from tl_jax.methods import scores

N, CLASSES = 60, 3
LABELS = np.arange(N) % CLASSES


def golden_input():
    """Features [60, 8], whose sum is 7.8312675825, and probabilities [60, 5]."""
    i, j, k, y = np.arange(N)[:, None], np.arange(8), np.arange(5), LABELS[:, None]
    features = np.sin(0.7 * i + 1.3 * j) + 0.5 * np.cos(0.11 * i * (j + 1)) + 0.3 * np.cos(2 * y + j)
    logits = np.sin(0.9 * i + 0.5 * k) + 0.5 * np.cos(y - k)
    return features, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


FEATURES, PROBABILITIES = golden_input()
ALL = list(scores.SCORES)
GOLDEN = {  # logme: of iterations that stop early, which agree to 4e-6, see below
    "leep": (-1.0581586783, 1e-9),
    "nce": (-0.9026235435, 1e-9),
    "logme": (-0.84949, 1e-5),
    "h_score": (0.9039771602, 1e-9),
    "h_score_reg": (0.7788493564, 1e-9),
    "transrate": (0.1362809884, 1e-9),
}


@pytest.fixture(scope="module")
def found():
    return scores.compute(ALL, FEATURES, PROBABILITIES, LABELS)


@pytest.mark.parametrize("name", GOLDEN)
def test_published_implementations_give_these_values(found, name):
    assert FEATURES.sum() == pytest.approx(7.8312675825, abs=1e-9)
    value, within = GOLDEN[name]
    assert found[name] == pytest.approx(value, abs=within)
    assert name != "logme" or found[name] >= value  # it is the maximum of what they approach


def by_loops_leep(p, y):
    count, classes, sources = len(y), sorted(set(y.tolist())), range(p.shape[1])
    joint = {(c, z): sum(p[i, z] for i in range(count) if y[i] == c) / count for c in classes for z in sources}
    mass = {z: sum(joint[c, z] for c in classes) for z in sources}
    each = [math.log(sum(p[i, z] * joint[y[i], z] / mass[z] for z in sources if mass[z])) for i in range(count)]
    return sum(each) / count


def by_loops_nce(p, y):
    z, total = [max(range(p.shape[1]), key=lambda k: row[k]) for row in p], 0.0
    pairs = list(zip(z, y.tolist(), strict=True))
    for pair in set(pairs):
        total += pairs.count(pair) / len(y) * math.log(pairs.count(pair) / z.count(pair[0]))
    return total


def by_loops_h_score(f, y):
    means = np.stack([f[y == c].mean(axis=0) for c in y])
    return np.trace(np.linalg.pinv(np.cov(f, rowvar=False)) @ np.cov(means, rowvar=False))


def by_loops_h_score_reg(f, y):
    """The shrinkage of Ledoit & Wolf 2004, lemma 3.2 to 3.4: d^2, b^2 and their ratio."""
    x = f - f.mean(axis=0)
    (n, d), sample = x.shape, x.T @ x / len(x)
    mu = np.trace(sample) / d
    distance = ((sample - mu * np.eye(d)) ** 2).sum() / d
    noise = sum(((np.outer(row, row) - sample) ** 2).sum() / d for row in x) / n**2
    alpha = min(noise, distance) / distance
    means = np.stack([f[y == c].mean(axis=0) for c in y])
    shrunk = alpha * mu * np.eye(d) + (1 - alpha) * sample
    return np.trace(np.linalg.inv(shrunk) @ np.cov(means, rowvar=False)) * (1 - alpha)


def by_loops_transrate(f, y):
    def rate(z):
        return np.linalg.slogdet(np.eye(z.shape[1]) + z.T @ z / (len(z) * 1e-4))[1] / 2

    x = f - f.mean(axis=0)
    return rate(x) - sum(rate(x[y == c]) for c in set(y.tolist())) / len(set(y.tolist()))


def by_loops_parc(f, y):
    eye, a, b = np.eye(y.max() + 1), [], []
    for i in range(len(y)):
        for j in range(i):
            a.append(1 - np.corrcoef(f[i], f[j])[0, 1])
            b.append(1 - np.corrcoef(eye[y[i]], eye[y[j]])[0, 1])
    return scipy.stats.spearmanr(a, np.round(b, 9)).statistic


def by_loops_knn(f, y):
    right = 0
    for i in range(len(y)):
        cosine = [f[i] @ f[j] / np.linalg.norm(f[i]) / np.linalg.norm(f[j]) for j in range(len(y))]
        near = sorted((j for j in range(len(y)) if j != i), key=lambda j: -cosine[j])[:5]
        right += np.bincount(y[near]).argmax() == y[i]
    return right / len(y)


def left_out_ridge(f, targets):
    """The predictions of scikit-learn's ridge fitted N times, with the penalty of the least squared error."""
    x, best = (f - f.mean(axis=0)) / f.std(axis=0), None
    for alpha in 10.0 ** np.arange(-2, 6):
        predicted = np.empty_like(targets)
        for i in range(len(x)):
            others = np.arange(len(x)) != i
            predicted[i] = sklearn.linear_model.Ridge(alpha).fit(x[others], targets[others]).predict(x[i : i + 1])[0]
        error = ((targets - predicted) ** 2).sum()
        best = min(best or (np.inf,), (error, alpha, predicted), key=lambda each: each[0])
    return best[2]


def by_loops_probe(f, y):
    return (left_out_ridge(f, np.eye(y.max() + 1)[y]).argmax(axis=1) == y).mean()


DEFINITIONS = {
    "leep": by_loops_leep, "nce": by_loops_nce, "h_score": by_loops_h_score, "h_score_reg": by_loops_h_score_reg,
    "transrate": by_loops_transrate, "parc": by_loops_parc, "knn": by_loops_knn, "probe": by_loops_probe,
}  # fmt: skip


def cases():
    """The published input, and one with classes of 1 to 30 examples and source classes that nothing falls on."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2, 3], [30, 12, 5, 1]))
    logits = rng.standard_normal((48, 7)) * 3 + 2 * np.eye(7)[labels]
    p = np.exp(logits)
    p[:, 5] = 0
    uneven = rng.standard_normal((48, 6)) @ rng.standard_normal((6, 6)) + np.eye(6)[labels], p / p.sum(1)[:, None]
    return {"published": (FEATURES, PROBABILITIES, LABELS), "uneven": (*uneven, labels)}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("case", cases())
def test_a_score_is_what_its_paper_defines(case, name):
    features, p, labels = cases()[case]
    value = scores.compute([name], features, p, labels)[name]
    read = p if scores.SCORES[name].reads == "probabilities" else features
    assert value == pytest.approx(DEFINITIONS[name](read, labels), abs=1e-9)


def log_evidence(features, y, log_alpha, log_beta):
    """log N(y; 0, I / beta + F F^T / alpha), without any of the identities that make it cheap."""
    cov = np.eye(len(y)) * math.exp(-log_beta) + features @ features.T * math.exp(-log_alpha)
    return scipy.stats.multivariate_normal(np.zeros(len(y)), cov, allow_singular=True).logpdf(y)


def fixed_point(features, y, rounds=2000):
    """alpha and beta by the iteration of You et al. 2021, algorithm 1, until neither changes, or so many rounds."""
    (count, _), alpha, beta = features.shape, 1.0, 1.0
    eigenvalues, vectors = np.linalg.eigh(features.T @ features)
    for _ in range(rounds):
        gamma = sum(beta * s / (alpha + beta * s) for s in eigenvalues)
        m = beta * vectors @ ((vectors.T @ features.T @ y) / (alpha + beta * eigenvalues))
        new = gamma / (m @ m), (count - gamma) / ((features @ m - y) ** 2).sum()
        done, (alpha, beta) = np.allclose(new, (alpha, beta), rtol=1e-14), new
        if done:
            break
    return alpha, beta


WIDE = np.random.default_rng(3).standard_normal((20, 33)) * 0.8 ** np.arange(33)  # fewer examples than features
WIDE[:, :3] += 2 * np.eye(3)[LABELS[:20]]


@pytest.mark.parametrize("features", [FEATURES, WIDE], ids=["N>D", "N<D"])
def test_logme_is_the_maximum_of_the_evidence_where_the_iteration_ends(features):
    labels = LABELS[: len(features)]
    iterated, direct = [], []
    for c in range(CLASSES):
        y = (labels == c).astype(float)
        alpha, beta = fixed_point(features, y)
        iterated.append(log_evidence(features, y, math.log(alpha), math.log(beta)) / len(y))
        begin = np.log([alpha, beta]) + [0.3, -0.2]
        least = scipy.optimize.minimize(
            lambda at, y=y: -log_evidence(features, y, *at), begin, method="Nelder-Mead",
            options={"xatol": 1e-7, "fatol": 1e-12},
        )  # fmt: skip
        direct.append(-least.fun / len(y))
    value = scores.logme(features, labels)
    assert value == pytest.approx(np.mean(iterated), abs=1e-9) and value == pytest.approx(np.mean(direct), abs=1e-9)


def test_the_published_logme_is_that_of_eight_rounds_of_the_iteration():
    """Its end is 8.6e-6 higher, which is what `logme` gives."""

    def after(rounds):
        ys = [(c == LABELS).astype(float) for c in range(CLASSES)]
        points = [np.log(fixed_point(FEATURES, y, rounds)) for y in ys]
        return np.mean([log_evidence(FEATURES, y, *at) / N for y, at in zip(ys, points, strict=True)])

    assert after(8) == pytest.approx(GOLDEN["logme"][0], abs=5e-6)
    assert after(2000) == pytest.approx(-0.8494814387, abs=1e-9) == scores.logme(FEATURES, LABELS)


def test_nleep_is_leep_on_the_posteriors_of_a_mixture(found):
    """The components are scikit-learn's; what they make of the examples is computed by hand."""
    x = FEATURES - FEATURES.mean(axis=0)
    x = x / np.sqrt((x**2).mean())
    left, s, right = np.linalg.svd(x, full_matrices=False)
    kept = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.8)) + 1
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    x = (left * s * signs)[:, :kept]
    mixture = sklearn.mixture.GaussianMixture(5 * CLASSES, random_state=0).fit(x)
    parts = zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True)
    p = np.stack([w * scipy.stats.multivariate_normal(m, c).pdf(x) for w, m, c in parts], axis=1)
    assert found["nleep"] == pytest.approx(by_loops_leep(p / p.sum(axis=1, keepdims=True), LABELS), abs=1e-6)


def test_knn_on_digits_is_what_scikit_learn_counts():
    digits = sklearn.datasets.load_digits()
    features, labels = digits.data[:600] / 16, digits.target[:600]
    search = sklearn.neighbors.NearestNeighbors(metric="cosine", algorithm="brute").fit(features)
    near = labels[search.kneighbors(n_neighbors=5, return_distance=False)]
    votes = np.stack([(near == c).sum(axis=1) for c in range(10)], axis=1)
    assert scores.knn(features, labels) == pytest.approx((votes.argmax(axis=1) == labels).mean())


def test_targets_and_labels_are_scored_by_logme_and_a_probe():
    rng = np.random.default_rng(1)
    y = FEATURES @ rng.standard_normal((8, 2)) * (3, 50) + rng.standard_normal((N, 2)) * (1, 400) + (100, -7)
    names = scores.names_for("targets")
    assert names == ["logme", "probe"] == scores.names_for("multilabel")
    found = scores.compute(names, FEATURES, None, y)
    z = (y - y.mean(axis=0)) / y.std(axis=0)
    points = [fixed_point(FEATURES, column) for column in z.T]
    each = [log_evidence(FEATURES, c, *np.log(at)) / N for c, at in zip(z.T, points, strict=True)]
    assert found["logme"] == pytest.approx(np.mean(each), abs=1e-9)
    explained = 1 - ((left_out_ridge(FEATURES, z) - z) ** 2).mean(axis=0)
    assert found["probe"] == pytest.approx(explained.mean(), abs=1e-9) and 0.2 < found["probe"] < 0.9
    assert found == pytest.approx(scores.compute(names, FEATURES, None, 1000 * y - 3), abs=1e-9)
    several = np.stack([LABELS == 0, LABELS == 1, np.zeros(N, bool)], axis=1).astype(np.int32)  # none has the last
    found = scores.compute(names, FEATURES, None, several)
    ys = several[:, :2].astype(float)
    each = [log_evidence(FEATURES, c, *np.log(fixed_point(FEATURES, c))) / N for c in ys.T]
    assert found["logme"] == pytest.approx(np.mean(each), abs=1e-9)
    explained = 1 - ((left_out_ridge(FEATURES, ys) - ys) ** 2).mean(axis=0) / ys.var(axis=0)
    assert found["probe"] == pytest.approx(explained.mean(), abs=1e-9)


def test_names_of_classes_order_of_examples_and_rotations_change_nothing(found):
    rng = np.random.default_rng(0)
    order, renamed = rng.permutation(N), np.array([7, 2, 4])[LABELS]
    again = scores.compute(ALL, FEATURES[order], PROBABILITIES[order], renamed[order])
    stable = [name for name in ALL if name != "nleep"]  # whose mixture begins from random examples
    assert {x: again[x] for x in stable} == pytest.approx({x: found[x] for x in stable}, abs=1e-9)
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    for name in ("logme", "h_score", "h_score_reg", "transrate", "knn"):
        turned = scores.compute([name], FEATURES @ rotation, None, LABELS)[name]
        assert turned == pytest.approx(found[name], abs=1e-9), name
    for name in ("logme", "nleep", "h_score", "h_score_reg", "parc", "knn", "probe"):  # not transrate
        for factor in (1e-3, 1e4):
            scaled = scores.compute([name], factor * FEATURES, None, LABELS)[name]
            assert scaled == pytest.approx(found[name], abs=1e-6), name


def test_features_that_separate_score_higher_than_noise():
    rng = np.random.default_rng(0)
    labels, noise = np.arange(90) % 3, rng.standard_normal((90, 20))
    logits = {"good": 3 * np.eye(5)[labels], "bad": np.zeros((90, 5))}
    p = {name: np.exp(x + rng.standard_normal((90, 5))) for name, x in logits.items()}
    p = {name: x / x.sum(axis=1, keepdims=True) for name, x in p.items()}
    good = scores.compute(ALL, noise + 6 * np.eye(20)[labels], p["good"], labels)
    bad = scores.compute(ALL, noise, p["bad"], labels)
    assert all(good[name] > bad[name] for name in ALL), (good, bad)


RNG = np.random.default_rng(0)
DEGENERATE = {
    "constant features": (np.full((7, 40), 0.1), np.arange(7) % 2),
    "zeros": (np.zeros((6, 4)), np.arange(6) % 2),
    "duplicates": (np.repeat(RNG.standard_normal((2, 40)), 4, axis=0), np.arange(8) // 4),
    "duplicates of another class": (np.repeat(RNG.standard_normal((4, 9)), 2, axis=0), np.arange(8) % 2),
    "a class of one": (RNG.standard_normal((9, 40)), np.array([0] * 8 + [5])),
    "classes of one": (RNG.standard_normal((5, 3)), np.arange(5)),
    "two examples": (RNG.standard_normal((2, 3)), np.arange(2)),
    "one feature": (RNG.standard_normal((9, 1)), np.arange(9) % 3),
    "one constant feature among others": (np.c_[RNG.standard_normal((30, 3)), np.ones(30)], np.arange(30) % 3),
    "the labels themselves": (np.eye(3)[np.arange(30) % 3], np.arange(30) % 3),
    "large": (1e15 * RNG.standard_normal((20, 5)), np.arange(20) % 2),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", DEGENERATE)
def test_what_is_degenerate_has_finite_scores(case):
    features, labels = DEGENERATE[case]
    p = np.zeros((len(labels), 4))
    p[:, 0] = 1.0  # a classifier that is sure of one class
    found = scores.compute(ALL, features, p, labels)
    assert all(math.isfinite(value) for value in found.values()), found
    entropy = scipy.stats.entropy(np.unique(labels, return_counts=True)[1])
    assert found["leep"] == pytest.approx(-entropy) and found["nce"] == pytest.approx(-entropy)


def test_what_cannot_be_scored_is_one_message():
    bad, p = FEATURES.copy(), PROBABILITIES.copy()
    bad[3, 1], p[0] = np.nan, 0.9
    with pytest.raises(ValueError, match=r"features of 1 examples are not finite, such as \[3\]") as error:
        scores.compute(ALL, bad, p, LABELS)
    assert "do not sum to 1" in str(error.value)
    with pytest.raises(ValueError, match=r"all 60 examples have the same label; expected two that differ"):
        scores.compute(ALL, FEATURES, None, np.zeros(N, int))
    with pytest.raises(ValueError, match=r"all 60 examples have the same label"):
        scores.compute(["logme"], FEATURES, None, np.ones((N, 2)))
    with pytest.raises(ValueError, match=r"expected \[N, D\] for 3 labels"):
        scores.compute(ALL, FEATURES, None, np.arange(3))
    with pytest.raises(ValueError, match=r"'lep' \(did you mean 'leep'\?\)"):
        scores.names_for("classes", ["lep", "knn"])
    with pytest.raises(ValueError, match=r"'knn': it takes labels of the kinds classes, found targets"):
        scores.names_for("targets", ["knn"])
    assert scores.compute(["leep", "knn"], FEATURES, None, LABELS)["leep"] is None
