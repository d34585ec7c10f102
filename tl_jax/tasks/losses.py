"""Per-example losses and batch mixing: pure functions of arrays and keys."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each example, [B], from logits [B, K] and target distributions [B, K]; always in float32."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Labels [B] as distributions [B, K]: `(1 - smoothing) * onehot + smoothing / K` (Szegedy et al. 2016, sec. 7)."""
    return (1.0 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def mixup(key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with its mirror in the batch by one weight ~ Beta(alpha, alpha) (Zhang et al. 2018, eq. 1)."""
    weight = jax.random.beta(key, alpha, alpha)
    return _blend(images, weight), _blend(targets, weight)


def cutmix(key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Pastes a box of the mirrored batch into each image; targets mix by the area left (Yun et al. 2019, eq. 1-2).

    The box has a fraction `1 - Beta(alpha, alpha)` of the image before it is clipped at the border; the targets use the
    clipped area, as the authors' code does.
    """
    weight_key, centre_key = jax.random.split(key)
    height, width = images.shape[1:3]
    side = jnp.sqrt(1.0 - jax.random.beta(weight_key, alpha, alpha))
    rows = _box(centre_key, height, side, 0)
    columns = _box(centre_key, width, side, 1)
    box = (rows[:, None] & columns[None, :])[None, :, :, None]
    return jnp.where(box, images[::-1], images), _blend(targets, 1.0 - box.mean())


def _blend(batch: jax.Array, weight: jax.Array) -> jax.Array:
    return weight * batch + (1.0 - weight) * batch[::-1]


def _box(key: jax.Array, length: int, side: jax.Array, axis: int) -> jax.Array:
    centre = jax.random.randint(jax.random.fold_in(key, axis), (), 0, length)
    half = (side * length).astype(jnp.int32) // 2
    position = jnp.arange(length)
    return (position >= centre - half) & (position < centre + half)
