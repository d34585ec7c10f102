"""The head: a list of layers, pairs (name, {parameter: value}), and the last dense layer behind them, in float32.

Its parameters are head/dense{i}/... and head/norm{i}/... for layer i and head/out/...; without layers head/....
The layer prompts is the last dense one itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core import checks
from tl_jax.core.card import COMPARING
from tl_jax.models import layers

XAVIER = nn.initializers.xavier_uniform()  # Glorot & Bengio 2010, equation 16
HEAD_INIT = {"zeros": nn.initializers.zeros, "lecun": nn.initializers.lecun_normal(), "xavier": XAVIER}
HE = nn.initializers.he_normal()  # He et al. 2015, arXiv:1502.01852, equation 10
GIVES_LOGITS = "prompts"  # a layer that takes the place of the last dense one
DISTILLED = "distilled_logits"  # of DeiT's distillation token, in `out`
READS_MAP = ("pool", "flatten", "by_pixel")  # layers that take the output of the last cut before pre_logits

Layers = Sequence[tuple[str, Mapping[str, Any]]]


def _dense(head, i, x, train, features: Annotated[int, checks.integer(1, 2**14)] = 256):
    return nn.Dense(features, kernel_init=HE, name=f"dense{i}")(x)


def _dropout(head, i, x, train, rate: Annotated[float, checks.number(0, 1, below=True)] = 0.5):
    return nn.Dropout(rate, deterministic=not train)(x)


def _pool(head, i, x, train):
    """The mean over all positions, of pixels [B, H, W, C] or tokens [B, N, C] (the class token is one of them)."""
    if x.ndim < 3:
        raise ValueError(f"model.head begins with pool, but the backbone's output {x.shape} has no positions")
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))


def _by_pixel(head, i, x, train):
    """Keeps the positions, so that the layers behind act on each; a logit is the mean of its positive parts."""
    if x.ndim < 3:
        raise ValueError(f"model.head begins with by_pixel, but the backbone's output {x.shape} has no positions")
    return x


def _l2_norm(head, i, x, train):
    """Rows of length one; the gradient of a row of zeros is finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _cache(
    head,
    i,
    x,
    train,
    size: Annotated[int, checks.integer(1, 2**20)] = 1,
    beta: Annotated[float, checks.number(0, above=True)] = 5.5,
):
    """[x, exp(-beta (1 - x k))] with `size` keys k, [B, E] -> [B, E + size] (Zhang et al. 2022, arXiv:2207.09519)."""
    near = nn.Dense(size, use_bias=False, kernel_init=HE, name=f"keys{i}")(x)
    return jnp.concatenate([x, jnp.exp(beta * (near - 1))], axis=-1)


def _prompts(
    head,
    i,
    x,
    train,
    tower: Annotated[str, checks.TEXT] = "",
    context: Annotated[int, checks.integer(1, 77)] = 16,
    first: Annotated[int, checks.integer(0, 1)] = 1,
    length: Annotated[int, checks.integer(1, 77)] = 77,
):
    from tl_jax.models.clip_text import Prompts  # whose module needs this one

    return Prompts(tower, head.num_classes, context, first, length, name=f"prompts{i}")(x)


def _two(x: jax.Array) -> list[jax.Array]:
    """The features of the two texts of an example, [B, 2 D] -> [B, D] twice."""
    return jnp.split(x, 2, axis=-1)


def _cosine(head, i, x, train):
    """The cosine of the angle between the features of two texts, [B, 1]; 0 where one of them has no tokens."""
    a, b = _two(x)
    squares = (jnp.square(each).sum(axis=-1, keepdims=True) for each in (a, b))
    scale = [jax.lax.rsqrt(jnp.maximum(square, 1e-24)) for square in squares]
    return (a * b).sum(axis=-1, keepdims=True) * scale[0] * scale[1]


def _compare(head, i, x, train):
    """Two texts u and v as (u, v, |u - v|), [B, 3 D] (Reimers & Gurevych 2019, arXiv:1908.10084, section 3)."""
    u, v = _two(x)
    return jnp.concatenate([u, v, jnp.abs(u - v)], axis=-1)


# (the Head, position in the list, x, train, parameters) -> x
LAYERS: dict[str, Callable[..., jax.Array]] = {
    "dense": _dense,
    "square": lambda head, i, x, train: _dense(head, i, x, train, x.shape[-1]),  # as wide as what it reads
    "tanh": lambda head, i, x, train: jnp.tanh(x),
    "relu": lambda head, i, x, train: nn.relu(x),
    "gelu": lambda head, i, x, train: layers.gelu(x),
    "batch_norm": lambda head, i, x, train: layers.batch_norm(head, f"norm{i}", train)(x),
    "layer_norm": lambda head, i, x, train: nn.LayerNorm(epsilon=1e-5, name=f"norm{i}")(x),  # torch's epsilon
    "dropout": _dropout,
    "pool": _pool,
    "flatten": lambda head, i, x, train: x.reshape(x.shape[0], -1),
    "by_pixel": _by_pixel,
    "l2_norm": _l2_norm,
    "cache": _cache,
    "prompts": _prompts,
    "cosine": _cosine,
    "compare": _compare,
}


def problems(pairs: Any) -> list[str]:
    """What is wrong with the list of layers; one sentence for each."""
    if not isinstance(pairs, list | tuple):
        return [f"{pairs!r} is no sequence of pairs (name, {{parameter: value}})"]
    found = []
    for i, pair in enumerate(pairs):
        found += checks.pairs_problems("head layer", [pair], LAYERS)
        if i and isinstance(pair, list | tuple) and pair and pair[0] in READS_MAP:
            rule = "it reads the backbone's feature map, so it must be the first layer"
            found.append(f"{pair[0]} is layer {i} of the head; {rule}")
        if i + 1 < len(pairs) and isinstance(pair, list | tuple) and pair and pair[0] == GIVES_LOGITS:
            found.append(f"{GIVES_LOGITS} is layer {i} of the head; it gives the logits, so it must be the last layer")
        if i and isinstance(pair, list | tuple) and pair and pair[0] in COMPARING:
            found.append(f"{pair[0]} is layer {i} of the head; it compares two texts, so it must be the first layer")
    return found


def check(pairs: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The layers as plain pairs; raises one ValueError that lists everything invalid."""
    checks.refuse("model.head is invalid", problems(pairs))
    return tuple((name, dict(args)) for name, args in pairs)


class Head(nn.Module):
    """The layers and the last dense one, [B, ...] -> (what the last dense layer reads [B, E], logits [B, K])."""

    num_classes: int
    layers: Layers
    dropout: float
    head_init: str
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        # A mean of bfloat16 that XLA fuses with a convolution may be NaN, see resnet.py.
        x = jax.lax.optimization_barrier(x).astype(jnp.float32)
        for i, (name, args) in enumerate(self.layers):
            read, x = x, LAYERS[name](self, i, x, train, **args)
        if self.layers and name == GIVES_LOGITS:
            return read, x
        y = nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x
        cosine = bool(self.layers) and self.layers[-1][0] == "cosine"  # begins as the output itself
        init = nn.initializers.ones if cosine else HEAD_INIT[self.head_init]
        logits = nn.Dense(self.num_classes, kernel_init=init, name="out")(y)
        if logits.ndim > 2:  # by_pixel
            positions = tuple(range(1, logits.ndim - 1))
            # Unlike that of relu, the gradient of maximum is not zero where a new layer of zeros begins.
            x, logits = x.mean(axis=positions), jnp.maximum(logits, 0).mean(axis=positions)
        return x, logits


class Heads(nn.Module):
    """The heads of DeiT's class and distillation tokens (Touvron et al. 2021, section 4): [B, 2 D] -> [B, K] twice.

    The leaves of the first are head/kernel and head/bias, those of the second head/dist/...
    """

    outputs: int
    init: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        own, distilled = jnp.split(x, 2, axis=-1)
        kernel = self.param("kernel", self.init, (own.shape[-1], self.outputs), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.outputs,), jnp.float32)
        return own @ kernel + bias[None], nn.Dense(self.outputs, kernel_init=self.init, name="dist")(distilled)


def texts_of(model: nn.Module) -> int:
    """The texts of an example that a network of text encodes by themselves: two where its head compares them."""
    return 2 if model.num_classes and model.head and model.head[0][0] in COMPARING else 1


def reads(model: nn.Module) -> str:
    """The cut that the head of `model` reads: pre_logits, or the one before it where pool or flatten comes first."""
    mapped = model.num_classes and model.head and model.head[0][0] in READS_MAP
    return model.cuts[-2] if mapped or getattr(model, "decodes", False) else model.cuts[-1]


def classify(
    module: nn.Module, x: jax.Array, out: dict[str, jax.Array], train: bool, start: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the head inside a network: (logits, out with "embedding" and "logits").

    x: the input, which is the cut `start`; out: of the cuts behind it. ValueError where the head reads an earlier one.
    """
    cut = reads(module)
    if cut != module.cuts[-1] and (hasattr(module, "pooling") or hasattr(module, "parts")):
        raise ValueError(f"model.head begins with {module.head[0][0]}: networks of text pool their tokens themselves, "
                         "and a fusion joins features, not maps")  # fmt: skip
    if texts_of(module) > 1 and not hasattr(module, "pooling"):
        raise ValueError(f"model.head begins with {module.head[0][0]}, which compares two texts: this network has none")
    if cut not in out and start != cut:
        begins = f"start={start!r}, but the head begins with {module.head[0][0]}"
        raise ValueError(f"{begins}, which reads the output of {cut!r}: start at {cut!r} or before it")
    x = out.get(cut, x)
    if module.num_classes == 0:
        embedding = logits = x
    elif module.head:
        policy = layers.Policy(jnp.float32, *module.policy[1:5])  # the epsilon is not the backbone's
        head = Head(module.num_classes, module.head, module.dropout, module.head_init, policy, name="head")
        embedding, logits = head(x, train)
    else:
        embedding = x
        x = nn.Dropout(module.dropout, deterministic=not train)(x) if module.dropout else x
        init = HEAD_INIT[module.head_init]
        if getattr(module, "distilled", False):
            logits, distilled = Heads(module.num_classes, init, name="head")(x)
            logits, out = logits if train else (logits + distilled) / 2, {**out, DISTILLED: distilled}
        else:
            logits = nn.Dense(module.num_classes, kernel_init=init, name="head")(x)
    return logits, {**out, "embedding": embedding, "logits": logits}
