"""Selectors: goldens of the closed-form input, scikit-learn and written-out sums, and what degenerate input gives."""

import numpy as np
import pytest
import scipy.stats
import threadpoolctl
from sklearn import cluster, linear_model, metrics

from tl_jax.methods import selectors
from tl_jax.methods.domain.measure import separation
from tl_jax.methods.selectors import SELECTORS, Candidate

INDEX = np.arange(60)
LABELS = INDEX % 3
LOGITS = np.sin(0.9 * INDEX[:, None] + 0.5 * np.arange(5)) + 0.5 * np.cos(LABELS[:, None] - np.arange(5))
P = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
X = np.sin(0.7 * INDEX[:, None] + 1.3 * np.arange(8)) + 0.5 * np.cos(0.11 * INDEX[:, None] * np.arange(1, 9))
X = X + 0.3 * np.cos(2 * LABELS[:, None] + np.arange(8))
S, T = slice(0, 30), slice(30, 60)
LOSSES, WEIGHTS = -np.log(P[S][np.arange(30), LABELS[S]]), 1 + 0.5 * np.sin(INDEX[S])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (selectors.infomax(P[T]), 0.1060406063),
        (selectors.bnm(P[T]), 0.1383348396),
        (selectors.snd(P[T]), 2.6565981697),
        (selectors.iwcv_risk(LOSSES, WEIGHTS), 1.3540927006),
        (selectors.dev_risk(LOSSES, WEIGHTS), 1.3237936913),
        (selectors.entropy(P), -1.483523642),
    ],
    ids=["infomax", "bnm", "snd", "iwcv", "dev", "entropy"],
)
def test_scores_of_the_closed_form_input_have_their_known_values(found, expected):
    assert found == pytest.approx(expected, abs=1e-9)


def test_corr_c_rankme_and_mixval_are_their_sums_written_out():
    p, gram = P[T], np.zeros((5, 5))
    for row in p:
        gram += np.outer(row, row)
    assert selectors.corr_c(p) == pytest.approx(-sum(gram[k, k] for k in range(5)) / np.sqrt((gram**2).sum()), abs=1e-9)
    values = np.sqrt(np.linalg.eigvalsh(X[T].T @ X[T]))
    share = values / values.sum()
    assert selectors.rankme(X[T]) == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=1e-9)
    mixed = np.roll(p, 1, axis=0)
    assert selectors.mixval(p, mixed) == np.mean([a.argmax() == b.argmax() for a, b in zip(p, mixed, strict=True)])


def test_class_ami_is_that_of_scikit_learn():
    found = cluster.KMeans(5, n_init=10, random_state=0).fit_predict(X[T])
    assert selectors.class_ami(P[T], X[T]) == metrics.adjusted_mutual_info_score(P[T].argmax(1), found)


def test_the_density_ratio_is_that_of_two_gaussians_whose_ratio_is_known():
    rng = np.random.default_rng(0)
    source, target = rng.normal(0, 1, (4000, 1)), rng.normal(0.7, 1, (2000, 1))
    x = np.linspace(-1.5, 2, 15)[:, None]
    expected = scipy.stats.norm.pdf(x[:, 0], 0.7) / scipy.stats.norm.pdf(x[:, 0])
    np.testing.assert_allclose(selectors.density_ratio(source, target, x), expected, rtol=0.12)
    mean, std = np.concatenate([source, target]).mean(), np.concatenate([source, target]).std()
    fitted = linear_model.LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(
        (np.concatenate([source, target]) - mean) / std, [0] * 4000 + [1] * 2000
    )
    p = fitted.predict_proba((x - mean) / std)
    np.testing.assert_allclose(selectors.density_ratio(source, target, x), 2 * p[:, 1] / p[:, 0], rtol=1e-6)


@pytest.mark.parametrize("fit", [lambda a, b: selectors.density_ratio(a, b, a), lambda a, b: separation({0: a, 1: b})])
def test_classifiers_of_domains_are_fitted_on_one_thread(fit, monkeypatch):
    """Runs beside each other otherwise wait for each other's threads: twenty times the seconds on busy cores."""
    seen, theirs = [], linear_model.LogisticRegression.fit

    def spy(self, *args):
        seen.append({pool["num_threads"] for pool in threadpoolctl.threadpool_info()})
        return theirs(self, *args)

    monkeypatch.setattr(linear_model.LogisticRegression, "fit", spy)
    rng = np.random.default_rng(0)
    with threadpoolctl.threadpool_limits(2):
        fit(rng.normal(size=(9, 3)), rng.normal(size=(8, 3)) + 1)
    assert seen and set().union(*seen) == {1}


def test_ensv_scores_each_against_the_mean_of_the_pool():
    pool = [P[T], np.roll(P[T], 1, axis=1), P[T] * 0.9 + 0.02]
    together = (sum(pool) / 3).argmax(1)
    assert selectors.ensv(pool) == [(p.argmax(1) == together).mean() for p in pool]


def candidate(logits=LOGITS, features=X, count=30, labels=LABELS):
    """Source: the first rows; target: those after them."""
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    s, t = slice(0, count), slice(30, 30 + count)
    return Candidate(log_p[t], features[t], log_p[t][::-1], log_p[s], labels[s], features[s], features[s])


def test_each_selector_reads_no_more_than_it_says():
    full = candidate()
    for name, selector in SELECTORS.items():
        fields = {field: getattr(full, field) for field in selector.fields}
        bare = Candidate(full.log_target, full.target_features, **fields)
        assert selector.scores([bare]) == selector.scores([full]), name
        assert (selector.reads == "source") == ("source_labels" in selector.fields), name


def test_a_candidate_has_one_density_ratio_for_all_that_read_it(monkeypatch):
    calls, ratio, one = [], selectors.density_ratio, candidate()
    monkeypatch.setattr(selectors, "density_ratio", lambda *arrays: (calls.append(1), ratio(*arrays))[1])
    found = [SELECTORS[name].scores([one]) for name in ("iwcv", "dev")]
    weights = ratio(X[S], X[T], X[S])
    assert len(calls) == 1
    np.testing.assert_allclose(found, [[-risk(LOSSES, weights)] for risk in (selectors.iwcv_risk, selectors.dev_risk)])


DEGENERATE = {
    "one class is predicted": candidate(np.full((60, 5), -200.0) + 400 * (np.arange(5) == 2)),
    "one example": candidate(count=1),
    "zero variance": candidate(np.zeros((60, 5)), np.ones((60, 8))),
    "features of zeros": candidate(features=np.zeros((60, 8))),
    "domains apart": candidate(features=X + 1e6 * (INDEX[:, None] >= 30)),
    "two classes": candidate(LOGITS[:, :2], labels=LABELS % 2),
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.filterwarnings("error")
def test_degenerate_input_gives_a_defined_score(kind):
    for name, selector in SELECTORS.items():
        scores = selector.scores([DEGENERATE[kind], DEGENERATE[kind]])
        assert np.isfinite(scores).all() and len(scores) == 2, name


def test_collapse_onto_one_class_is_what_entropy_rewards_and_infomax_does_not():
    collapsed, sound = DEGENERATE["one class is predicted"], candidate(5 * LOGITS)
    order = {name: SELECTORS[name].scores([collapsed, sound]) for name in ("entropy", "snd", "infomax", "bnm")}
    assert {name: bool(a > b) for name, (a, b) in order.items()} == {
        "entropy": True, "snd": True, "infomax": False, "bnm": False
    }  # fmt: skip


def test_source_risk_of_several_domains_is_the_mean_of_theirs():
    log_p, labels = np.log(P[:10]), P[:10].argmax(1)
    labels[:3] = (labels[:3] + 1) % 5
    domains = np.array([0] * 2 + [1] * 8)
    assert selectors.source_risk(log_p, labels) == pytest.approx(0.7)
    assert selectors.source_risk(log_p, labels, domains) == pytest.approx((0 + 7 / 8) / 2)


def test_the_weighted_spearman_is_a_weighted_pearson_of_ranks():
    scores, values = [0.1, 0.4, 0.4, 0.9, 0.2], [0.3, 0.5, 0.6, 0.55, 0.1]
    a, b = (scipy.stats.rankdata(x) / 5 for x in (scores, values))
    w = np.maximum(a, b) ** 2
    w /= w.sum()
    a, b = a - (w * a).sum(), b - (w * b).sum()
    expected = (w * a * b).sum() / np.sqrt((w * a * a).sum() * (w * b * b).sum())
    assert selectors.weighted_spearman(scores, values) == pytest.approx(expected, abs=1e-12)
    assert selectors.weighted_spearman(scores, values, power=0) == pytest.approx(
        scipy.stats.spearmanr(scores, values).statistic
    )
    assert selectors.weighted_spearman([1, 2, 3], [3, 2, 1]) < 0 < selectors.weighted_spearman([1, 2, 3], [1, 2, 3])
    assert selectors.weighted_spearman([1, 1], [1, 2]) is None and selectors.weighted_spearman([1], [1]) is None


def test_neighbours_are_all_other_examples_however_many_rows_are_made_at_a_time(monkeypatch):
    p = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    whole = selectors.snd(p)
    monkeypatch.setattr(selectors, "ROWS", 7)
    assert selectors.snd(p) == pytest.approx(whole, abs=1e-12)
