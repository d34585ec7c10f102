"""Co-tuning (You et al. 2020) as a term, against SciPy, scikit-learn and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from sklearn.model_selection import StratifiedKFold
from small_network import (
    CLASSES,
    WIDTHS,
    begun,
    groups_of,
    initialised,
    make_context,
    make_data,
    make_params,
    make_start,
    make_task,
    numpy_network,
    one,
)


def source_task(size=90, sources=6, seed=3):
    """A start whose source head has `sources` classes, and its probabilities in float64."""
    rng = np.random.default_rng(seed)
    head = {"kernel": 3 * rng.standard_normal((WIDTHS[1], sources)), "bias": rng.standard_normal(sources)}
    head = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), head)
    images, labels = make_data(size)
    logits = numpy_network(make_params(), images)["pre_logits"] @ np.float64(head["kernel"]) + np.float64(head["bias"])
    return make_start(source_head=head, data=(images, labels)), logits, labels


def fit_by_scipy(probabilities, labels, strength):
    """Multinomial logistic regression without intercept, 1/2 ||w||^2 + C * summed loss, to high accuracy."""
    onehot, shape = np.eye(CLASSES)[labels], (probabilities.shape[1], CLASSES)

    def objective(flat):
        w = flat.reshape(shape)
        log_p = scipy.special.log_softmax(probabilities @ w, axis=1)
        value = 0.5 * (w**2).sum() - strength * (onehot * log_p).sum()
        return value, (w + strength * probabilities.T @ (np.exp(log_p) - onehot)).ravel()

    options = {"maxiter": 20_000, "maxfun": 20_000, "gtol": 1e-9, "ftol": 1e-15}
    found = scipy.optimize.minimize(objective, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(shape)


def test_co_tuning_inverts_a_fitted_p_of_target_given_source():
    start, logits, labels = source_task()
    rows = np.asarray(begun(one("co_tuning", temperature=2.0), start)[1])
    probabilities = scipy.special.softmax(logits / 2, axis=1)

    def held_out(fit, test, strength):
        weights = fit_by_scipy(probabilities[fit], labels[fit], strength)
        log_p = scipy.special.log_softmax(probabilities[test] @ weights, axis=1)
        return -log_p[np.arange(len(test)), labels[test]].mean()

    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(probabilities, labels))
    log_losses = {c: np.mean([held_out(*fold, c) for fold in folds]) for c in (1.0, 10.0, 100.0, 1e3, 1e4)}
    best = min(log_losses, key=log_losses.get)
    target_given_source = scipy.special.softmax(fit_by_scipy(probabilities, labels, best), axis=1)
    expected = np.zeros((CLASSES, 6))
    for target in range(CLASSES):
        for source in range(6):
            expected[target, source] = target_given_source[source, target] * probabilities[:, source].mean()
        expected[target] /= expected[target].sum()
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(rows, expected, atol=2e-3)  # as near as scikit-learn stops to its optimum
    assert np.abs(rows - rows[0]).max() > 0.2


def test_co_tuning_direct_averages_the_probabilities_of_each_class():
    start, logits, labels = source_task()
    rows = np.asarray(begun(one("co_tuning", approach="direct"), start._replace(task=make_task(CLASSES + 1)))[1])
    probabilities = scipy.special.softmax(logits, axis=1)
    for target in range(CLASSES):
        np.testing.assert_allclose(rows[target], probabilities[labels == target].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(rows[CLASSES], probabilities.mean(axis=0), atol=1e-5)  # no example of this class
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1], [0, 2, 0, 2, 2]])
def test_co_tuning_bears_single_examples_and_missing_classes(labels):
    start, _, _ = source_task()
    images = make_data()[0][:5]
    start = start._replace(batches=lambda stream: iter([(images, np.array(labels))]))
    rows = begun(one("co_tuning", examples=2), start)[1]
    assert rows.shape == (CLASSES, 6) and np.isfinite(rows).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, rtol=1e-6)


def test_co_tuning_loss_and_gradient_equal_pytorch():
    torch = pytest.importorskip("torch")
    start, _, _ = source_task()
    term, params = one("co_tuning", strength=1.7), make_params(1)
    extra, relationship = begun(term, start)
    assert groups_of(term, start) == {"source_head/bias": "head", "source_head/kernel": "head"}
    images, labels = make_data(seed=5)
    context = make_context({**params, **extra}, images, labels, relationship)
    mixed = 0.7 * context.encoded["train"] + 0.3 * context.encoded["train"][::-1]

    def loss(head):
        changed = context._replace(params={**context.params, "source_head": head}, encoded={"train": mixed})
        return term.loss(changed).loss

    value, grads = jax.jit(jax.value_and_grad(loss))(extra["source_head"])
    head = {name: torch.tensor(np.float64(leaf), requires_grad=True) for name, leaf in extra["source_head"].items()}
    features = torch.tensor(numpy_network(params, images)["pre_logits"])
    goal = torch.tensor(np.float64(mixed)) @ torch.tensor(np.float64(relationship))
    reference = 1.7 * torch.nn.functional.cross_entropy(features @ head["kernel"] + head["bias"], goal)
    reference.backward()
    assert float(value) == pytest.approx(float(reference.detach()), rel=1e-5)
    for name in head:
        np.testing.assert_allclose(grads[name], head[name].grad.numpy(), atol=1e-5)


def test_co_tuning_names_what_is_missing():
    with pytest.raises(ValueError, match="a file without its head"):
        initialised(one("co_tuning"), make_start())
    with pytest.raises(ValueError, match="takes 9 features, but the network has 4"):
        initialised(one("co_tuning"), make_start(source_head={"kernel": jnp.ones((9, 2)), "bias": jnp.zeros(2)}))
