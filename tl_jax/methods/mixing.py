"""Mixing of a batch with its mirror image: pure functions of a key, inputs and encoded labels."""

import functools
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
    side = jnp.sqrt(1.0 - jax.random.beta(weight_key, alpha, alpha))
    rows, columns = (_interval(jax.random.fold_in(centre_key, i), images.shape[1 + i], side) for i in range(2))
    box = (rows[:, None] & columns[None, :])[None, :, :, None]
    return jnp.where(box, images[::-1], images), _blend(targets, 1.0 - box.mean())


def _blend(batch: jax.Array, weight: jax.Array) -> jax.Array:
    return weight * batch + (1.0 - weight) * batch[::-1]


def _interval(key: jax.Array, length: int, side: jax.Array) -> jax.Array:
    centre = jax.random.randint(key, (), 0, length)
    half = (side * length).astype(jnp.int32) // 2
    position = jnp.arange(length)
    return (position >= centre - half) & (position < centre + half)


def make_mix(alpha_mixup: float, alpha_cutmix: float) -> Callable | None:
    """mix(key, {field: inputs}, targets) -> both mixed; None where both alphas are 0. With both, each step samples one.

    The fields are views of the same examples, so all are mixed by the same numbers.
    """
    chosen = [functools.partial(f, alpha=a) for f, a in ((mixup, alpha_mixup), (cutmix, alpha_cutmix)) if a]
    if not chosen:
        return None

    def one(key, x, targets):
        choice_key, mix_key = jax.random.split(key)
        if len(chosen) == 1:
            return chosen[0](mix_key, x, targets)
        return jax.lax.switch(jax.random.bernoulli(choice_key).astype(jnp.int32), chosen, mix_key, x, targets)

    def mix(key, inputs, targets):
        mixed = {field: one(key, x, targets) for field, x in inputs.items()}
        return {field: x for field, (x, _) in mixed.items()}, next(iter(mixed.values()))[1]

    return mix
