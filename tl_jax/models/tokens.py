"""What networks of text have in common: tokens in, their mask, and pooling.

The input is int32 [B, L, 2]: of each place the number of the token, -1 where there is none, and its segment, 0 or 1.
Tokens may begin behind padding, and an example may have none. Every cut before pre_logits is [B, L, D + 1]: the vectors
of the tokens, zeros where there is none, and a last column that is 1 where there is one, so that a network that starts
at a cut knows which tokens there are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def mask_of(x: jax.Array) -> jax.Array:
    """bool [B, L]: where there is a token; x: the input, or the output of a cut."""
    return x[..., 0] >= 0 if jnp.issubdtype(x.dtype, jnp.integer) else x[..., -1] > 0


def filled(x: jax.Array, length: int, number: int) -> jax.Array:
    """The input with its tokens first and the token `number` in all places behind them, int32 [B, length, 2]."""
    if isinstance(x.shape[1], int) and x.shape[1] > length:
        raise ValueError(f"texts of {x.shape[1]} tokens, but there are positions for {length}: truncate them")
    x = jnp.pad(x, ((0, 0), (0, length), (0, 0)), constant_values=-1)
    order = jnp.argsort(x[..., 0] < 0, axis=1, stable=True)[:, :length]
    x = jnp.take_along_axis(x, order[..., None], axis=1)
    return jnp.where(x[..., :1] >= 0, x, jnp.array([number, 0], x.dtype))


def packed(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The output of a cut, [B, L, D + 1], from vectors [B, L, D]."""
    there = mask[..., None].astype(x.dtype)
    return jnp.concatenate([x * there, there], axis=-1)


def pool(x: jax.Array, mask: jax.Array, pooling: str) -> jax.Array:
    """Vectors [B, L, D] to float32 [B, D], of the tokens that there are; zeros where there are none.

    cls: the first token. mean, max: of all tokens. last: the last token, such as the end of text of CLIP and GPT-2.
    """
    x, weight = x.astype(jnp.float32), mask.astype(jnp.float32)
    any_token = weight.max(axis=1, keepdims=True)
    if pooling == "mean":
        return jnp.einsum("bld,bl->bd", x, weight) / jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
    if pooling == "max":
        return jnp.where(any_token > 0, jnp.where(mask[..., None], x, -jnp.inf).max(axis=1), 0.0)
    return one(x, place(mask, pooling))[:, 0] * any_token


def place(mask: jax.Array, pooling: str) -> jax.Array:
    """The place of the token that "cls" or "last" is, int [B]; mask: bool [B, L]."""
    return mask.argmax(axis=1) if pooling == "cls" else mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)


def one(x: jax.Array, place: jax.Array) -> jax.Array:
    """Of each example what is at its place [B]: [B, L, ...] -> [B, 1, ...]."""
    return jnp.take_along_axis(x, jnp.expand_dims(place, range(1, x.ndim)), axis=1)


def run_parts(
    parts: dict[str, Callable], x: jax.Array, start: str | None, stop: str | None, texts: int = 1
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `layers.run_parts`, of parts (x, mask) -> x: the first reads the input, the last pools, others [B, L, D].

    texts: of an example, which lie behind one another, [B, texts * L, ...], and are encoded each by itself; pre_logits
    are [B, texts * D].
    """
    if texts > 1:
        batch = x.shape[0]
        y, out = run_parts(parts, x.reshape(texts * batch, x.shape[1] // texts, *x.shape[2:]), start, stop)
        y, out = jax.tree.map(lambda y: y.reshape(batch, texts * y.shape[1], *y.shape[2:]), (y, out))
        return y, out
    names, mask, out = list(parts), mask_of(x), {}
    for argument, name in {"start": start, "stop": stop}.items():
        if name is not None and name not in names:
            raise ValueError(f"{argument}={name!r} is no cut of this model; its cuts: {names}")
    first, last = 0 if start is None else names.index(start) + 1, len(names) if stop is None else names.index(stop) + 1
    x = x[..., :-1] if 0 < first < len(names) else x
    for name in names[first:last]:
        x = parts[name](x, mask)
        out[name] = x if name == names[-1] else packed(x, mask)
    return (out[stop] if stop is not None else x), out
