"""Attention of heads over tokens, as each machine computes it fastest: by XLA, on a CPU in parts, or by cuDNN."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from tl_jax.models.kernels import convolve

UNREAD = -1e30  # added to a score whose token is not read: finite, for where no token is read


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    attention: str = "xla",
    bias: Any = None,
    mask: Any = None,
    causal: bool = False,
    kept: Any = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias) v of each head, [B, N, H, D]; the softmax is float32, the matmuls have q's type.

    attention: "xla", or "cudnn" for its fused kernel where there is one, see `unfused`, which has no bias [B, H, N, N].
    mask: bool [B, N], the tokens that are read; what is at the others changes no number, if it is finite. What those
    give themselves means nothing. causal: a token reads itself and those before it. kept: bool [B, H, N, N], where the
    softmax is not replaced by zero, which cuDNN cannot do.
    """
    if attention == "cudnn" and kept is None and not unfused(q.dtype, q.shape[-1]):
        return _attend_fused(q, k, v, None, causal) if mask is None else _attend_fused_masked(q, k, v, mask, causal)
    if mask is not None or causal:
        bias = _with_unread(bias, q.shape[1], mask, causal)
    if convolve.on_cpu() and q.dtype == jnp.float32:
        return _attend_on_cpu(q, k, v, bias, kept)
    scores = _scores(q, k) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    weights = jax.nn.softmax(scores)
    weights = weights if kept is None else jnp.where(kept, weights, 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def _with_unread(bias: Any, tokens: int, mask: Any, causal: bool) -> jax.Array:
    """The bias, of any sizes 1 but the last, with UNREAD for the tokens that are not read."""
    read = jnp.ones((1, 1, 1, tokens), bool) if mask is None else mask[:, None, None]
    unread = jnp.where(read & jnp.tril(jnp.ones((1, 1, tokens, tokens), bool)) if causal else read, 0.0, UNREAD)
    return unread if bias is None else bias + unread


def _attend_on_cpu(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any, kept: Any) -> jax.Array:
    """With heads before tokens: XLA's matmuls over strided rows take four times as long at 197 tokens.

    Scores of more than 2^16 numbers a head are made and summed up in two to six parts of the keys, which takes 0.7 to
    0.9 of the time, and not of thousands of tokens.
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q / math.sqrt(q.shape[-1]), k, v))
    tokens = k.shape[2]
    count = -(-q.shape[2] * tokens // 2**16)
    cut = isinstance(tokens, int) and count <= 6  # an export of texts is traced for any number of tokens
    ends = [tokens * i // count for i in range(count + 1)] if cut else [0, tokens]
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    scores = [jnp.einsum("bhqd,bhkd->bhqk", q, k[:, :, part]) for part in parts]
    if bias is not None:
        scores = [its + bias[..., part] for its, part in zip(scores, parts, strict=True)]
    largest = functools.reduce(jnp.maximum, (its.max(-1, keepdims=True) for its in scores))
    weights = [jnp.exp(its - jax.lax.stop_gradient(largest)) for its in scores]
    sums = sum(its.sum(-1, keepdims=True) for its in weights)
    if kept is not None:
        weights = [jnp.where(kept[..., part], its, 0) for its, part in zip(weights, parts, strict=True)]
    products = (jnp.einsum("bhqk,bhkd->bhqd", its, v[:, :, part]) for its, part in zip(weights, parts, strict=True))
    return jnp.swapaxes(sum(products) / sums, 1, 2)


def unfused(dtype: Any, size: int) -> str:
    """Why cuDNN's fused attention of heads with `size` values cannot be had here; "" where it can."""
    if jax.default_backend() != "gpu":
        return "there is no GPU"
    capability = str(getattr(jax.devices()[0], "compute_capability", "8.0"))
    if not capability[0].isdigit() or float(capability) < 8:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, this is {capability}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in half precision alone, not in {jnp.dtype(dtype).name}"
    return "" if size % 8 == 0 and size <= 128 else f"a head has {size} values: more than 128, or no multiple of 8"


def _attend_fused_masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, causal: bool) -> jax.Array:
    """By cuDNN where all padding stands behind the tokens, which it can be told; else as without it."""
    lengths = mask.sum(axis=1, dtype=jnp.int32)
    behind = jnp.all(mask == (jnp.arange(mask.shape[1])[None] < lengths[:, None]))
    # A softmax over no token is NaN: an example without any reads its first place.
    fused = functools.partial(_attend_fused, lengths=jnp.maximum(lengths, 1), causal=causal)
    x = jax.lax.cond(behind, fused, functools.partial(attend, mask=mask, causal=causal), q, k, v)
    return jnp.where(mask[..., None, None], x, 0)  # it promises nothing of the other places


def _attend_fused(q: jax.Array, k: jax.Array, v: jax.Array, lengths: Any = None, causal: bool = False) -> jax.Array:
    """By cuDNN, lengths: of each example, int32 [B].

    jax refuses its gradient for odd numbers of tokens, so these get one more, which is masked.
    """
    fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=causal)
    batch, tokens = q.shape[:2]
    if tokens % 2 == 0 and lengths is None:
        return fused(q, k, v)
    q, k, v = (jnp.pad(x, ((0, 0), (0, tokens % 2), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full((batch,), tokens, jnp.int32) if lengths is None else lengths
    return fused(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)[:, :tokens]


@jax.custom_vjp
def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q k^T in float32, [B, H, N, N]; its gradient goes back in q's type, or these matmuls too would be float32."""
    return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)


def _scores_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k = saved
    gradient = gradient.astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", gradient, k), jnp.einsum("bhqk,bqhd->bkhd", gradient, q)


_scores.defvjp(lambda q, k: (_scores(q, k), (q, k)), _scores_backward)
