"""Per-example losses and encodings of labels: pure functions of arrays."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each example, [B], from logits [B, K] and target distributions [B, K]; always in float32."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Labels [B] as distributions [B, K]: `(1 - smoothing) * onehot + smoothing / K` (Szegedy et al. 2016, sec. 7)."""
    return (1.0 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def binary_cross_entropy(logits: jax.Array, targets: jax.Array, pos_weight: jax.Array | float = 1.0) -> jax.Array:
    """-(w t log p + (1 - t) log(1 - p)) with p = sigmoid(logits), elementwise; always in float32.

    pos_weight: the weight w of a positive, a number or one for each of the last axis.
    """
    x = logits.astype(jnp.float32)
    return pos_weight * targets * jax.nn.softplus(-x) + (1.0 - targets) * jax.nn.softplus(x)


def smooth_binary(labels: jax.Array, smoothing: float) -> jax.Array:
    """Labels 0 and 1 as probabilities of the positive, `(1 - smoothing) * label + smoothing / 2`."""
    return (1.0 - smoothing) * labels.astype(jnp.float32) + smoothing / 2


def each_once(labels: jax.Array) -> jax.Array:
    """One for each example, [B]."""
    return jnp.ones(labels.shape[0], jnp.float32)
