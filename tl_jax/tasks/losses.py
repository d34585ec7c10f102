"""How each task is trained: encodings of labels and per-example losses, as pure functions of arrays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core.options import LANGUAGE
from tl_jax.tasks import decoding
from tl_jax.tasks.binary import threshold_of
from tl_jax.tasks.task import Spec


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each example, [B], from logits [B, K] and target distributions [B, K]; always in float32."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Labels [B] as distributions [B, K]: `(1 - smoothing) * onehot + smoothing / K` (Szegedy et al. 2016, sec. 7)."""
    return (1.0 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def binary_cross_entropy(logits: jax.Array, targets: jax.Array, pos_weight: jax.Array | float) -> jax.Array:
    """-(w t log p + (1 - t) log(1 - p)) with p = sigmoid(logits) and w = pos_weight, elementwise; always in float32."""
    x = logits.astype(jnp.float32)
    return jnp.broadcast_to(pos_weight, x.shape) * targets * jax.nn.softplus(-x) + (1.0 - targets) * jax.nn.softplus(x)


def smooth_binary(labels: jax.Array, smoothing: float) -> jax.Array:
    """Labels 0 and 1 as probabilities of the positive, `(1 - smoothing) * label + smoothing / 2`."""
    return (1.0 - smoothing) * labels.astype(jnp.float32) + smoothing / 2


def each_once(labels: jax.Array) -> jax.Array:
    return jnp.ones(labels.shape[0], jnp.float32)


def _keep(outputs):
    return {"logits": outputs["logits"].astype(jnp.float32)}


Trained = tuple[int, Callable, Callable, Callable, Callable]  # outputs, encode, loss, running, keep of a Task


def classification(spec: Spec, smoothing: float, class_weight: tuple[float, ...]) -> Trained:
    """Cross-entropy, weighted by class: loss_i = w_i CE_i, w_i the mean weight under the (smoothed, mixed) target."""
    weights, classes = jnp.asarray(class_weight, jnp.float32), len(spec.class_names)

    def loss(outputs, targets):
        each = cross_entropy(outputs["logits"], targets)
        return each * jnp.dot(targets, weights, precision="highest") if class_weight else each

    def running(outputs, labels):
        return {"accuracy": (jnp.argmax(outputs["logits"], axis=-1) == labels).astype(jnp.float32)}

    return classes, lambda labels: smooth_labels(labels, classes, smoothing), loss, running, _keep


def binary(spec: Spec, smoothing: float, pos_weight: tuple[float, ...]) -> Trained:
    """Binary cross-entropy of logits [B] or [B, 1], its positives weighted by `pos_weight`."""
    weight, threshold = (pos_weight or (1.0,))[0], threshold_of(spec)
    positive_from = float(np.log(threshold) - np.log1p(-threshold))

    def keep(outputs):
        return {"logits": outputs["logits"].reshape(outputs["logits"].shape[0]).astype(jnp.float32)}

    def loss(outputs, targets):
        return binary_cross_entropy(keep(outputs)["logits"], targets, weight)

    def running(outputs, labels):
        return {"accuracy": ((keep(outputs)["logits"] >= positive_from) == labels).astype(jnp.float32)}

    return 1, lambda labels: smooth_binary(labels, smoothing), loss, running, keep


def multilabel(spec: Spec, smoothing: float, pos_weight: tuple[float, ...]) -> Trained:
    """Binary cross-entropy of each label, its positives weighted by `pos_weight` [K]; the mean over the labels."""
    weights = jnp.asarray(pos_weight, jnp.float32) if pos_weight else 1.0

    def loss(outputs, targets):
        return binary_cross_entropy(outputs["logits"], targets, weights).mean(axis=-1)

    def running(outputs, labels):
        return {"hamming_loss": ((outputs["logits"] > 0) != (labels > 0)).astype(jnp.float32).mean(axis=-1)}

    return len(spec.class_names), lambda labels: smooth_binary(labels, smoothing), loss, running, _keep


def regression(spec: Spec, *_: object) -> Trained:
    """Squared error of the standardised targets, the mean over them."""
    mean, std = (jnp.asarray(x, jnp.float32)[None] for x in (spec.target_mean, spec.target_std))
    targets = len(spec.class_names)

    def keep(outputs):
        return {"values": outputs["logits"].astype(jnp.float32) * std + mean}

    def encode(labels):
        return (labels.reshape(-1, targets).astype(jnp.float32) - mean) / std

    def loss(outputs, encoded):
        return jnp.square(outputs["logits"].astype(jnp.float32) - encoded).mean(axis=-1)

    def running(outputs, labels):
        return {"mae": jnp.abs(keep(outputs)["values"] - labels.reshape(-1, targets)).mean(axis=-1)}

    return targets, encode, loss, running, keep


TRAINED = {"classification": classification, "binary": binary, "multilabel": multilabel, "regression": regression}
TRAINED |= dict.fromkeys(LANGUAGE, decoding.language)
COUNTS = dict.fromkeys(LANGUAGE, decoding.count)  # of the others: each_once
