"""Mixing of a batch with its mirror image, or across domains: pure functions of a key, inputs and encoded labels."""

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


def domain_mixup(
    key: jax.Array, images: jax.Array, targets: jax.Array, domain: jax.Array, domains: int, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with one of the next domain in a random ring of all, as DomainBed does (Yan et al. 2020).

    The n-th example of a domain has the n-th of the next one as partner, again from the first one where that is
    smaller; one weight ~ Beta(alpha, alpha) for each domain and the next. domain: int [B], in any order.
    """
    weight_key, ring_key = jax.random.split(key)
    ring = jax.random.permutation(ring_key, domains)
    following = jnp.zeros_like(ring).at[ring].set(jnp.roll(ring, -1))[domain]
    order, counts = jnp.argsort(domain, stable=True), jnp.bincount(domain, length=domains)
    starts = jnp.cumsum(counts) - counts
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order))) - starts[domain]
    partner = order[starts[following] + place % counts[following]]
    weight = jax.random.beta(weight_key, alpha, alpha, (domains,))[domain]
    return tuple(_between(x, x[partner], weight) for x in (images, targets))


def _between(x: jax.Array, partner: jax.Array, weight: jax.Array) -> jax.Array:
    weight = weight.reshape(-1, *(1,) * (x.ndim - 1))
    return weight * x + (1.0 - weight) * partner


def _blend(batch: jax.Array, weight: jax.Array) -> jax.Array:
    return weight * batch + (1.0 - weight) * batch[::-1]


def _interval(key: jax.Array, length: int, side: jax.Array) -> jax.Array:
    centre = jax.random.randint(key, (), 0, length)
    half = (side * length).astype(jnp.int32) // 2
    position = jnp.arange(length)
    return (position >= centre - half) & (position < centre + half)


def make_mix(alpha_mixup: float, alpha_cutmix: float, alpha_domains: float = 0.0, domains: int = 1) -> Callable | None:
    """mix(key, {field: inputs}, targets, domain) -> both mixed; None where all alphas are 0.

    alpha_domains: of `domain_mixup` over `domains`, in place of the others. With mixup and cutmix each step samples
    one. The fields are views of the same examples, so all are mixed by the same numbers.
    """
    chosen = [functools.partial(f, alpha=a) for f, a in ((mixup, alpha_mixup), (cutmix, alpha_cutmix)) if a]
    if not chosen and not alpha_domains:
        return None

    def one(key, x, targets, domain):
        if alpha_domains:
            return domain_mixup(key, x, targets, domain, domains, alpha_domains)
        choice_key, mix_key = jax.random.split(key)
        if len(chosen) == 1:
            return chosen[0](mix_key, x, targets)
        return jax.lax.switch(jax.random.bernoulli(choice_key).astype(jnp.int32), chosen, mix_key, x, targets)

    def mix(key, inputs, targets, domain=None):
        mixed = {field: one(key, x, targets, domain) for field, x in inputs.items()}
        return {field: x for field, (x, _) in mixed.items()}, next(iter(mixed.values()))[1]

    return mix
