"""MixStyle (Zhou et al. 2021): in training the styles of examples, statistics of their channels, are mixed at cuts."""

import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tl_jax.models.variant import Model


def mix_styles(x: jax.Array, key: jax.Array, p: float, alpha: float, domain: jax.Array | None = None) -> jax.Array:
    """With probability p, x [B, ..., C] in the style of a mixture of its own and its partner's (equations 4 to 6).

    A style is the mean and the deviation of each channel over the positions (population, epsilon 1e-6), without
    gradient; the weight of the own one is ~ Beta(alpha, alpha), one an example. The partners are a random permutation,
    or, with domain [B], random examples of other domains, where there are any.
    """
    coin, weight_key, partner_key = jax.random.split(key, 3)
    y, axes = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
    mean, variance = (jax.lax.stop_gradient(f(y, axis=axes, keepdims=True)) for f in (jnp.mean, jnp.var))
    deviation = jnp.sqrt(variance + 1e-6)
    if domain is None:
        partner = jax.random.permutation(partner_key, len(x))
    else:
        draws = jax.random.uniform(partner_key, (len(x), len(x)))
        partner = jnp.argmax(draws + (domain[:, None] != domain[None]), axis=1)
    weight = jax.random.beta(weight_key, alpha, alpha, (len(x), *(1,) * (x.ndim - 1)))
    new_mean, new_deviation = (weight * own + (1 - weight) * own[partner] for own in (mean, deviation))
    mixed = (y - mean) / deviation * new_deviation + new_mean
    return jnp.where(jax.random.bernoulli(coin, p), mixed.astype(x.dtype), x)


def apply(
    model: Model, variables: Mapping[str, Any], x: jax.Array, style: Mapping[str, Any], domain: jax.Array | None, *,
    start: str | None, stop: str | None = None, mutable: Collection[str] = (), rngs: Mapping[str, jax.Array],
):  # fmt: skip
    """`model.apply` in training, in pieces: the output of each cut of style["after"] is mixed, that of `start` too.

    style: p, alpha, after, and partner: "random" or "other_domain".
    """
    cuts, out, updates = list(model.cuts), {}, {}
    first, last = cuts.index(start) if start else 0, cuts.index(stop) + 1 if stop else len(cuts)
    domain = domain if style["partner"] == "other_domain" else None

    def run(x, start, stop):
        call = {"train": True, "start": start, "stop": stop, "mutable": list(mutable), "rngs": rngs}
        (x, found), changed = model.apply({**variables, **updates}, x, **call)
        out.update(found)
        updates.update(changed)
        return x

    for cut in (name for name in cuts[first:last] if name in style["after"]):
        x = x if cut == start else run(x, start, cut)
        key = jax.random.fold_in(rngs["dropout"], zlib.crc32(f"mixstyle/{cut}".encode()))
        x = out[cut] = mix_styles(x, key, style["p"], style["alpha"], domain)
        start = cut
    x = x if stop and stop == start else run(x, start, stop)
    return ((x, out), updates) if mutable else (x, out)
