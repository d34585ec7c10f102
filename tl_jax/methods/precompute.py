"""What some penalties compute from the training data at the start of a phase."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core import messages
from tl_jax.methods.term import MAIN, MODEL, Start
from tl_jax.tasks import losses

CHUNK = 32  # examples at once
INVERSE_STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4)  # sklearn's C; probabilities are small features, so they are large


def linear(features: jax.Array, head: Mapping[str, jax.Array]) -> jax.Array:
    return features.astype(jnp.float32) @ head["kernel"] + head["bias"][None]


def attention(without: np.ndarray, temperature: float, standardize: bool) -> jax.Array:
    """DELTA's weights of the channels, [C]: the softmax of the mean loss without each, [C], or of its increase."""
    increase = without - without.mean()
    if standardize and (spread := without.std()) > 0:
        increase = increase / spread
    return jax.nn.softmax(jnp.asarray(increase / temperature, jnp.float32))


def choose_cuts(known: Sequence[str], cuts: Sequence[str]) -> list[str]:
    """The cuts of DELTA among the network's own, in order: those named, or the last before pre_logits."""
    known = [cut for cut in known if cut != "pre_logits"]
    if unknown := [cut for cut in cuts if cut not in known]:
        lacking = f"the network has no {unknown}{messages.nearest(unknown[0], known)}"
        raise ValueError(f"delta with cuts={list(cuts)}: {lacking}; its cuts before pre_logits: {known}")
    return list(dict.fromkeys(cuts)) or known[-1:]


def losses_without(start: Start, network: str, cuts: Sequence[str], examples: int) -> dict[str, np.ndarray]:
    """The mean loss of a logistic regression on pre_logits with each channel of each cut at zero: {cut: [C]}."""
    images, labels = sample(start.batches(MAIN), examples)
    forward = jax.jit(lambda variables, x: start.apply(network, variables, x, stop="pre_logits"))

    @functools.partial(jax.jit, static_argnums=0)
    def without(cut, variables, x, labels, head):  # -> [C], sums over the examples; x is the output of the cut
        targets = jax.nn.one_hot(labels, head["bias"].size)

        def loss_without(channel):
            keep = (jnp.arange(x.shape[-1]) != channel).astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
            out = start.apply(network, variables, x * keep, start=cut, stop="pre_logits")
            return losses.cross_entropy(linear(out["pre_logits"], head), targets).sum()

        return jax.lax.map(loss_without, jnp.arange(x.shape[-1]))

    features = np.concatenate([forward(start.variables, x)["pre_logits"] for x, _ in _chunks(images, labels)])
    head, classes = _fit_classifier(features, labels)
    totals = dict.fromkeys(cuts, 0.0)
    for x, y in _chunks(images, np.searchsorted(classes, labels)):
        out = forward(start.variables, x)
        for cut in cuts:
            totals[cut] = totals[cut] + np.asarray(without(cut, start.variables, out[cut], y, head), np.float64)
    return {cut: total / len(labels) for cut, total in totals.items()}


def sample(batches: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `size` examples of a stream, sampled uniformly (a reservoir)."""
    rng, kept = np.random.default_rng(0), []
    pairs = (pair for images, labels in batches for pair in zip(images, labels, strict=True))
    for seen, (image, label) in enumerate(pairs):
        slot = seen if seen < size else int(rng.integers(seen + 1))
        if slot < size:
            kept[slot : slot + 1] = [(np.array(image), int(label))]
    images, labels = zip(*kept, strict=True)
    return np.stack(images), np.asarray(labels)


def _chunks(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i in range(0, len(images), CHUNK):
        yield images[i : i + CHUNK].astype(np.float32), labels[i : i + CHUNK]


def _fit_classifier(features: np.ndarray, labels: np.ndarray) -> tuple[dict[str, jax.Array], np.ndarray]:
    """A logistic regression (C = 1) as a linear head {"kernel" [D, T], "bias" [T]}, and the T classes seen."""
    from sklearn.linear_model import LogisticRegression  # slow to import

    model = LogisticRegression(max_iter=10_000).fit(np.asarray(features, np.float64), labels)
    kernel, bias = model.coef_.T, model.intercept_
    if bias.size == 1:  # two classes: sklearn keeps the difference of their logits
        kernel, bias = np.concatenate([0 * kernel, kernel], axis=1), np.concatenate([0 * bias, bias])
    return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}, model.classes_


def checked_source_head(start: Start) -> Mapping[str, jax.Array]:
    """The classifier that the weights were trained with; ValueError where there is none for the network's features."""
    head, width = start.source_head(), start.shapes["pre_logits"][-1]
    if head is None:
        none = "the weights have no classifier (a random start, or a file without its head)"
        raise ValueError(f"co_tuning: {none}; load weights with a head, or take co_tuning out of terms")
    if (expected := head["kernel"].shape[0]) != width:
        found = f"the source head takes {expected} features, but the network has {width}"
        raise ValueError(f"{found}: a layer between them was dropped, so that co_tuning cannot use this head")
    return head


def source_probabilities(start: Start, head: Any, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The loaded network's probabilities over its source classes on every training example, [N, S], and the labels."""

    @jax.jit
    def probabilities(variables, x):
        features = start.apply(MODEL, variables, x, stop="pre_logits")["pre_logits"]
        return jax.nn.softmax(linear(features, head) / temperature)

    batches = start.batches(MAIN)
    pairs = [(np.asarray(probabilities(start.loaded, np.asarray(x, np.float32))), labels) for x, labels in batches]
    return tuple(np.concatenate(arrays) for arrays in zip(*pairs, strict=True))


def reverse(probabilities: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """p(y_s | y_t) by Bayes' rule from a fitted p(y_t | y_s) and the average p(y_s), [T, S] for the T classes seen."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    chosen = np.random.default_rng(0).permutation(len(labels))[:size]
    chosen = np.union1d(chosen, np.unique(labels, return_index=True)[1])  # at least one of every class
    probabilities, labels = probabilities[chosen].astype(np.float64), labels[chosen]
    model = LogisticRegression(C=100.0, fit_intercept=False, max_iter=10_000)
    folds = min(3, np.unique(labels, return_counts=True)[1].min())
    if folds > 1:  # a class with a single example leaves nothing to choose by
        cv = StratifiedKFold(folds, shuffle=True, random_state=0)
        model = GridSearchCV(model, {"C": INVERSE_STRENGTHS}, scoring="neg_log_loss", cv=cv)
    model.fit(probabilities, labels)
    joint = (model.predict_proba(np.eye(probabilities.shape[1])) * probabilities.mean(axis=0)[:, None]).T
    return joint / joint.sum(axis=1, keepdims=True)
