"""Contrastive learning of two inputs of an example: what belongs together is alike, what does not is not."""

import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from tl_jax.core import checks
from tl_jax.core.fields import INDEX
from tl_jax.methods.term import MAIN, MODEL, Context, Network, Result, Start, Term

NAME = "contrastive"  # of the network that holds the temperature and the projection
MOST = 100.0  # that similarities are multiplied by (Radford et al. 2021, section 2.5)
Temperature = Annotated[float, checks.number(0)]


def contrastive(
    network: Annotated[str, checks.TEXT] = "text",
    loss: Annotated[str, checks.one_of("softmax", "sigmoid")] = "softmax",
    temperature: Temperature = 0.0,
    bias: Annotated[float, checks.number()] = -10.0,
    width: Annotated[int, checks.integer(0, 2**14)] = 0,
) -> Term:
    """The features of the model and of a further network on another input of the same examples are drawn together.

    Both are divided by their lengths; s is the matrix [B, B] of their products over the temperature. softmax: the mean
    of the cross-entropies of rows and columns of s with the diagonal (Radford et al. 2021, arXiv:2103.00020, figure
    3). sigmoid: -1/B sum_ij log sigmoid(z_ij (s_ij + bias)), z = 1 on the diagonal and -1 elsewhere (Zhai et al. 2023,
    arXiv:2303.15343, equation 1). temperature: where it begins, 0 for the papers' 0.07 and 0.1; it is learned, as is
    the bias, in the group `contrastive`. width: that a learned matrix projects both to; 0: where the two have different
    widths, the model's features are projected to the network's. network: of config.networks, trained in its `group`.
    Two pairs i and j that share an input, such as two captions of an image or two images with one text, are left out
    of both sums by s_ij = s_ji = -inf: exp(s_ij) = 0 and log sigmoid(-s_ij - bias) = 0, as their gradients are.
    """
    begin = temperature or (0.07 if loss == "softmax" else 0.1)

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        if network not in start.outputs:
            return {}, None  # named by terms.initialise
        ours, theirs = start.shapes["pre_logits"][-1], start.outputs[network]["pre_logits"][-1]
        sizes = {"model": (ours, width), "other": (theirs, width)} if width else {}
        sizes = {"model": (ours, theirs)} if not width and ours != theirs else sizes
        params: dict[str, Any] = {"scale": jnp.asarray(-math.log(begin), jnp.float32)}
        params |= {"bias": jnp.asarray(bias, jnp.float32)} if loss == "sigmoid" else {}
        for i, (name, shape) in enumerate(sizes.items()):
            key = jax.random.fold_in(start.key, i)
            params[name] = {"kernel": jax.random.normal(key, shape, jnp.float32) * shape[0] ** -0.5}
        numbers = [jnp.asarray(start.numbered(name)) for name in (MODEL, network)]
        return {NAME: Network(None, None, {"params": params}, group=NAME)}, jnp.stack(numbers, 1)

    def value(context: Context) -> Result:
        params = context.params[NAME]
        other = context.forward(network, MAIN)[0]
        a, b = embeddings(params, context.outputs[MAIN]["pre_logits"], other["pre_logits"])
        scale = jnp.exp(jnp.minimum(params["scale"], math.log(MOST)))
        s = strangers(scale * a @ b.T, context.memory[context.batch[MAIN][INDEX]])
        matched = (s.argmax(axis=1) == jnp.arange(len(s))).mean(dtype=jnp.float32)
        found = softmax_loss(s) if loss == "softmax" else sigmoid_loss(s + params["bias"])
        return Result(found, {"matched": matched, "temperature": 1 / scale})

    return Term(
        value, init=init, logs=("matched", "temperature"), reads=(network,), takes=lambda *_: ("pre_logits",),
        needs=frozenset({"whole_batch"}), pairs=network,
    )  # fmt: skip


def embeddings(params: Any, model: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features [N, D] of the model and of the other network as vectors of length 1 in one space.

    params: of the network NAME.
    """
    found = []
    for name, x in (("model", model), ("other", other)):
        x = x.astype(jnp.float32)
        x = x @ params[name]["kernel"] if name in params else x
        found.append(x * jax.lax.rsqrt(jnp.maximum((x * x).sum(axis=-1, keepdims=True), 1e-24)))
    return found[0], found[1]


def strangers(s: jax.Array, numbers: jax.Array) -> jax.Array:
    """s [B, B] with -inf where two pairs share an input.

    numbers: int [B, 2], of the two inputs of each pair; equal inputs have one number.
    """
    shared = (numbers[:, None] == numbers[None]).any(axis=2) & ~jnp.eye(len(s), dtype=bool)
    return jnp.where(shared, -jnp.inf, s)


def softmax_loss(s: jax.Array) -> jax.Array:
    """The mean cross-entropy of rows and columns of s [B, B] with the diagonal."""
    own = jnp.diagonal(s)
    rows, columns = (jax.nn.logsumexp(s, axis=axis) - own for axis in (1, 0))
    return (rows.mean() + columns.mean()) / 2


def sigmoid_loss(s: jax.Array) -> jax.Array:
    """-1/B sum_ij log sigmoid(z_ij s_ij) of s [B, B], z = 1 on the diagonal and -1 elsewhere."""
    z = 2 * jnp.eye(len(s)) - 1
    return -jax.nn.log_sigmoid(z * s).sum() / len(s)
