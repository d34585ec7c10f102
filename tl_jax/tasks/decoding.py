"""Losses of tokens: vectors decoded by the table of embeddings, a few positions at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tl_jax.core.fields import LABEL
from tl_jax.tasks.task import Spec

CHUNK = 1024  # tokens whose logits are held at a time


def token_losses(
    hidden: jax.Array, table: jax.Array, bias: jax.Array | None, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(-log p(token), whether it is the most probable one), float32 [B, P]; zeros where there is no token.

    hidden: [B, P, D]; table: [V, D]; bias: [V]; tokens: int32 [B, P], below 0 where there is none. Logits are float32,
    of CHUNK tokens at a time, and made again in the backward pass: [B, P, V] is never held.
    """
    batch, count = tokens.shape
    size = min(count, max(1, CHUNK // batch))
    more = -count % size
    hidden = jnp.pad(hidden, ((0, 0), (0, more), (0, 0)))
    tokens = jnp.pad(tokens, ((0, 0), (0, more)), constant_values=-1)

    @jax.checkpoint
    def of_chunk(pair):
        x, wanted = pair
        logits = jnp.einsum("bpd,vd->bpv", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
        logits = logits if bias is None else logits + bias[None, None]
        there = wanted >= 0
        own = jnp.take_along_axis(logits, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
        nll = jnp.where(there, jax.nn.logsumexp(logits, axis=-1) - own, 0.0)
        return nll, (there & (jnp.argmax(logits, axis=-1) == wanted)).astype(jnp.float32)

    chunks = [jnp.swapaxes(x.reshape(batch, -1, size, *x.shape[2:]), 0, 1) for x in (hidden, tokens)]
    found = jax.lax.map(of_chunk, tuple(chunks))
    return tuple(jnp.swapaxes(x, 0, 1).reshape(batch, -1)[:, :count] for x in found)


def count(labels: jax.Array) -> jax.Array:
    """The tokens of each example that count, float32 [B]; labels as for `_losses`."""
    return (_tokens(labels) >= 0).sum(axis=1).astype(jnp.float32)


def _tokens(labels: jax.Array) -> jax.Array:
    return labels[..., 1] if labels.ndim == 3 else labels


def _losses(outputs, labels) -> tuple[jax.Array, jax.Array]:
    """Of labels [B, L], the token of each position, or [B, P, 2], position and token: those vectors alone."""
    hidden = outputs["hidden"]
    if labels.ndim == 3:
        hidden = jnp.take_along_axis(hidden, jnp.maximum(labels[..., :1], 0), axis=1)
    return token_losses(hidden, outputs["table"], outputs.get("token_bias"), _tokens(labels))


def language(spec: Spec, *_: object) -> tuple[int, Callable, Callable, Callable, Callable]:
    """Cross-entropy of the tokens of an example, their sum; what is kept is {sum, tokens, correct ones}, [B, 3]."""

    def keep(outputs):
        labels = outputs[LABEL]
        nll, correct = _losses(outputs, labels)
        return {"tokens": jnp.stack([nll.sum(axis=1), count(labels), correct.sum(axis=1)], axis=1)}

    def loss(outputs, labels):
        return _losses(outputs, labels)[0].sum(axis=1)

    return 0, lambda labels: labels, loss, lambda outputs, labels: {}, keep
