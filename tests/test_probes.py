"""Probes without gradient against scikit-learn and the normal equations, and what is chosen by which numbers."""

import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import LeaveOneOut, RepeatedStratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from tl_jax.methods import probes


def blobs(count, classes=4, features=6, seed=0, spread=1.5):
    """Overlapping Gaussian classes with features of different scales and offsets."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, features))
    labels = np.arange(count) % classes
    values = centres[labels] + spread * rng.normal(size=(count, features))
    return (10.0 ** np.arange(-2, features - 2) * values + 3).astype(np.float32), labels


TRAIN, VAL, TEST = blobs(60), blobs(40, seed=1), blobs(50, seed=2)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_neighbours_by_cosine_similarity_vote_as_in_scikit_learn(k):
    reference = KNeighborsClassifier(k).fit(normalize(TRAIN[0].astype(np.float64)), TRAIN[1])
    fitted = probes.fit("knn", TRAIN, None, 4, (k,))
    logits = fitted.predict(TEST[0])
    shares = reference.predict_proba(normalize(TEST[0].astype(np.float64)))
    np.testing.assert_array_equal(logits.argmax(1), reference.predict(normalize(TEST[0].astype(np.float64))))
    np.testing.assert_allclose(np.exp(logits), (k * shares + 1 / 4) / (k + 1), rtol=1e-5)
    assert fitted.head is None and logits.dtype == np.float32


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_is_that_of_scikit_learn(classes):
    (features, labels), (unseen, _) = blobs(60, classes), blobs(50, classes, seed=2)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))
    reference.fit(features.astype(np.float64), labels)
    fitted = probes.fit("logistic", (features, labels), None, classes, (0.3,))
    expected = reference.predict_log_proba(unseen.astype(np.float64))
    np.testing.assert_allclose(scipy.special.log_softmax(fitted.predict(unseen), axis=1), expected, atol=1e-4)


def test_ridge_solves_the_normal_equations_for_every_alpha():
    rng = np.random.default_rng(0)
    for count, width in ((30, 5), (8, 20)):  # more examples than features, and fewer
        inputs, targets = rng.normal(2, 3, (count, width)), rng.normal(size=(count, 3))
        for alpha, (kernel, bias, left_out) in probes.ridge(inputs, targets, (0.1, 10.0)):
            centred = inputs - inputs.mean(0)
            expected = np.linalg.solve(centred.T @ centred + alpha * np.eye(width), centred.T @ targets)
            np.testing.assert_allclose(kernel, expected, atol=1e-9)
            np.testing.assert_allclose(bias, targets.mean(0) - inputs.mean(0) @ expected, atol=1e-9)
            each = cross_val_predict(Ridge(alpha), inputs, targets, cv=LeaveOneOut())
            np.testing.assert_allclose(left_out, each, atol=1e-8)


def test_ridge_logits_are_the_scores_at_the_temperature_that_suits_unseen_examples():
    features, labels = TRAIN
    standardised = StandardScaler().fit(features.astype(np.float64))
    onehot = np.eye(4)[labels]
    model = Ridge(7.0).fit(standardised.transform(features.astype(np.float64)), onehot)
    left_out = cross_val_predict(
        Ridge(7.0), standardised.transform(features.astype(np.float64)), onehot, cv=LeaveOneOut()
    )

    def nll(scale):
        return -scipy.special.log_softmax(scale * left_out, axis=1)[np.arange(len(labels)), labels].mean()

    scale = scipy.optimize.minimize_scalar(nll, bracket=(1, 5)).x
    fitted = probes.fit("ridge", TRAIN, None, 4, (7.0,))
    scores = model.predict(standardised.transform(TEST[0].astype(np.float64)))
    np.testing.assert_allclose(fitted.predict(TEST[0]), scale * scores, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(fitted.predict(TEST[0]).argmax(1), scores.argmax(1))


@pytest.mark.parametrize("name", ["logistic", "ridge"])
def test_the_head_takes_raw_features(name):
    fitted = probes.fit(name, TRAIN, VAL, 4)
    logits = TEST[0].astype(np.float64) @ fitted.head["kernel"] + fitted.head["bias"]
    np.testing.assert_allclose(logits, fitted.predict(TEST[0]), atol=1e-5)
    assert fitted.head["kernel"].dtype == fitted.head["bias"].dtype == np.float32


@pytest.mark.parametrize("name", probes.NAMES)
def test_val_alone_chooses_and_every_candidate_is_listed(name):
    fitted = probes.fit(name, TRAIN, VAL, 4)
    rows = []
    for value in probes.GRIDS[name]:
        if name != "knn" or value <= len(TRAIN[1]):
            logits = probes.fit(name, TRAIN, None, 4, (value,)).predict(VAL[0])
            log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
            rows.append((value, (logits.argmax(1) == VAL[1]).mean(), -log_p[np.arange(40), VAL[1]].mean()))
    assert [row["value"] for row in fitted.tried] == [value for value, *_ in rows]
    np.testing.assert_allclose([row["val/accuracy"] for row in fitted.tried], [row[1] for row in rows])
    np.testing.assert_allclose([row["val/nll"] for row in fitted.tried], [row[2] for row in rows], rtol=1e-4)
    assert all(row["converged"] for row in fitted.tried)
    highest = max(accuracy for _, accuracy, _ in rows)
    best = [(nll, value) for value, accuracy, nll in rows if accuracy == highest]
    assert fitted.chosen == min(best)[1]


@pytest.mark.parametrize(("name", "stronger"), [("knn", 2), ("logistic", 0.1), ("ridge", 2)])
def test_among_equals_the_lower_nll_wins_and_then_the_stronger_regularisation(name, stronger):
    def rows(*numbers):
        return [{"value": v, "val/accuracy": a, "val/nll": n} for v, a, n in numbers]

    weaker = 1
    assert probes._choose(name, rows((weaker, 0.9, 0.5), (stronger, 0.9, 0.5))) == stronger
    assert probes._choose(name, rows((weaker, 0.9, 0.4), (stronger, 0.9, 0.5))) == weaker
    assert probes._choose(name, rows((weaker, 0.8, 0.1), (stronger, 0.9, 0.5))) == stronger


@pytest.mark.parametrize("name", probes.NAMES)
def test_a_class_without_train_examples_is_never_predicted_and_costs_a_finite_nll(name):
    fitted = probes.fit(name, TRAIN, None, 6, (1,))
    logits = fitted.predict(TEST[0])
    assert np.isfinite(logits).all() and logits.shape == (50, 6) and logits.argmax(1).max() <= 3
    np.testing.assert_array_equal(logits.argmax(1), probes.fit(name, TRAIN, None, 4, (1,)).predict(TEST[0]).argmax(1))


def test_a_search_that_does_not_converge_is_said_and_not_warned_of(monkeypatch):
    monkeypatch.setattr(probes, "MAX_ITERATIONS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = probes.fit("logistic", TRAIN, None, 4, (1e3,))
    assert fitted.tried == [{"value": 1e3, "val/accuracy": None, "val/nll": None, "converged": False}]


@pytest.mark.thin(1)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_leave_one_out_neighbours_of_the_digits_are_those_of_all_cosine_similarities(k):
    features, labels = load_digits(return_X_y=True)
    similarity = normalize(features) @ normalize(features).T
    np.fill_diagonal(similarity, -1)
    nearest = labels[np.argsort(-similarity, axis=1)[:, :k]]
    expected = np.eye(10)[nearest].sum(axis=1).argmax(axis=1)
    (logits,) = probes.cross_predict("knn", features, labels, LeaveOneOut().split(features), 10, k)
    assert 0.95 < (expected == labels).mean() < 1
    np.testing.assert_array_equal(logits.argmax(1), expected)


def test_one_search_leaves_out_as_many_fits_do():
    features, labels = TRAIN
    features = np.concatenate([features, features[:5], features[:5], features[:5]])  # among its equals, which is it?
    labels = np.concatenate([labels, labels[:5], labels[:5], labels[:5]])
    splits = list(LeaveOneOut().split(features))
    (once,) = probes.cross_predict("knn", features, labels, splits, 4, 2)
    for train, held in splits:
        model = probes.fit("knn", (features[train], labels[train]), None, 4, (2,))
        np.testing.assert_array_equal(once[held], model.predict(features[held]))
    with pytest.raises(ValueError, match=r"found \[75\] neighbours, but train has 74"):
        probes.cross_predict("knn", features, labels, splits, 4, 75)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["logistic", "ridge"])
def test_a_search_can_be_stopped_before_every_candidate(name):
    def ask(allowed):
        asked = []

        def check_stop():
            asked.append(True)
            if len(asked) > allowed:
                raise Stop

        return asked, check_stop

    asked, check_stop = ask(100)
    probes.fit(name, TRAIN, VAL, 4, check_stop=check_stop)
    assert len(asked) >= len(probes.GRIDS[name])
    for allowed in range(len(asked)):
        with pytest.raises(Stop):
            probes.fit(name, TRAIN, VAL, 4, check_stop=ask(allowed)[1])
    splits = list(LeaveOneOut().split(TRAIN[0]))
    with pytest.raises(Stop):
        probes.cross_predict(name, *TRAIN, splits, 4, 1.0, check_stop=ask(5)[1])


@pytest.mark.parametrize("name", ["knn", "logistic", "ridge"])
def test_every_example_is_predicted_by_the_model_that_did_not_see_it_once_a_repeat(name):
    features, labels = TRAIN
    design = list(RepeatedStratifiedKFold(n_splits=3, n_repeats=2, random_state=0).split(features, labels))
    repeats = probes.cross_predict(name, features, labels, iter(design), 4, 1.0)
    assert len(repeats) == 2
    for repeat, logits in enumerate(repeats):
        for train, held in design[3 * repeat : 3 * repeat + 3]:
            model = probes.fit(name, (features[train], labels[train]), None, 4, (1.0,))
            np.testing.assert_array_equal(logits[held], model.predict(features[held]))


def test_designs_that_leak_repeat_or_forget_examples_are_refused():
    features, labels = TRAIN
    first, second = np.arange(30), np.arange(30, 60)

    def cross(*splits):
        return probes.cross_predict("knn", features, labels, splits, 4, 1)

    with pytest.raises(ValueError, match=r"split 0 holds out .*\[30"):
        cross((np.arange(60), second))
    with pytest.raises(ValueError, match="split 1 holds out"):
        cross((first, second), (first, second))
    with pytest.raises(ValueError, match="30 of 60 examples are never held out"):
        cross((first, second))
    with pytest.raises(ValueError, match="60 of 60 examples are never held out"):
        cross()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("knnn", TRAIN, VAL, 4), "did you mean 'knn'"),
        (("knn", TRAIN, None, 4), "no val to choose by; give a val split, or one value"),
        (("ridge", TRAIN, None, 4, (1.0, 2.0)), r"2 values \[1.0, 2.0\] and no val"),
        (("knn", TRAIN, VAL, 4, (5, 61)), r"found \[61\] neighbours, but train has 60"),
        (("knn", TRAIN, VAL, 4, (0, 1.5)), r"found \[0, 1.5\] in the grid, expected whole numbers"),
        (("logistic", TRAIN, VAL, 4, (-1.0,)), r"found \[-1.0\] in the grid"),
        (("ridge", TRAIN, VAL, 3), "expected integers in 0..2"),
        (("ridge", TRAIN, (VAL[0][:, :3], VAL[1]), 4), "train has 6 features, val 3"),
        (("ridge", (np.full((4, 2), np.nan), np.arange(4)), None, 4, (1.0,)), "4 rows of the train features"),
        (("logistic", (TRAIN[0], 0 * TRAIN[1]), None, 4, (1.0,)), r"the one class \[0\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        probes.fit(*arguments)
