"""Mixing of a batch with its mirror image: pure functions of a key, inputs and encoded labels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


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


def make_mix(alpha_mixup: float, alpha_cutmix: float) -> Callable | None:
    """mix(key, {field: inputs}, targets) -> both mixed; None where nothing is mixed; with both, each step draws one.

    The parameters are those of the Beta distributions (0: off). Several fields are views of the same examples: all are
    mixed by the same numbers.
    """
    if not (alpha_mixup or alpha_cutmix):
        return None

    def one(key, x, targets):
        choice_key, mix_key = jax.random.split(key)
        if alpha_mixup and alpha_cutmix:
            both = [lambda *args: mixup(*args, alpha_mixup), lambda *args: cutmix(*args, alpha_cutmix)]
            return jax.lax.switch(jax.random.bernoulli(choice_key).astype(jnp.int32), both, mix_key, x, targets)
        return mixup(mix_key, x, targets, alpha_mixup) if alpha_mixup else cutmix(mix_key, x, targets, alpha_cutmix)

    def mix(key, inputs, targets):
        mixed = {field: one(key, x, targets) for field, x in inputs.items()}
        return {field: x for field, (x, _) in mixed.items()}, next(iter(mixed.values()))[1]

    return mix
