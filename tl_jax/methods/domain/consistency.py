"""Answers that stay the same under another view of an unlabelled example."""

from typing import Annotated

import jax
import jax.numpy as jnp

from tl_jax.core import checks
from tl_jax.methods.domain.common import CLASSES, WHOLE, Strength, Target
from tl_jax.methods.term import AVERAGE, MODEL, Context, Outputs, Result, Term
from tl_jax.tasks.losses import cross_entropy

Probability = Annotated[float, checks.number(0, 1)]
View = Annotated[str, checks.TEXT]
STRONG = "image:strong"


def fixmatch(threshold: Probability = 0.9, target: Target = "target", view: View = STRONG) -> Term:
    """FixMatch on the target: confident answers to the weak view teach the strong one (Sohn et al. 2020, eq. 4).

    mean over all of 1[max p > threshold] CE(strong view, argmax p), p without gradient from the training pass. view:
    the field of the stream with the strong view, which passes the model by itself and moves its running statistics.
    Default threshold: TLLib's; the paper's is 0.95. TLLib normalises the weak view by itself too: per_stream.
    """

    def loss(context: Context) -> Result:
        weak = jax.lax.stop_gradient(jax.nn.softmax(context.outputs[target]["logits"].astype(jnp.float32)))
        strong, statistics = _second_pass(context, target, view)
        value, confident = pseudo_label_loss(strong["logits"], weak, threshold)
        return Result(value, {"confident": confident}, batch_stats=statistics)

    return Term(loss, on=(target,), logs=("confident",), reads=(MODEL,), needs=frozenset({CLASSES}))


def self_ensembling(
    strength: Strength = 3.0,
    balance: Strength = 0.01,
    threshold: Probability = 0.8,
    target: Target = "target",
    view: View = STRONG,
) -> Term:
    """Self-ensembling: the moving average teaches the network on the target (French, Mackiewicz & Fisher 2018).

    strength * mean 1[max q > threshold] |p - q|^2 + balance * share of confident examples * b, with q the answer of the
    moving average (parameters and BatchNorm statistics) to what the training pass saw, in eval mode and without
    gradient, p that of the network to another view of it, and b the binary cross-entropy of mean p with 1/K, the mean
    over K classes. view: the field of the stream that the network sees. Defaults: TLLib's, with ema = 0.99.
    """

    def loss(context: Context) -> Result:
        teacher, _ = context.forward(AVERAGE, target)
        student, statistics = _second_pass(context, target, view)
        p, q = (jax.nn.softmax(out["logits"].astype(jnp.float32)) for out in (student, teacher))
        distance, confident = consistency(p, q, threshold)
        even = balance * confident * uniformity(p.mean(axis=0))
        return Result(strength * distance + even, {"confident": confident, "balance": even}, batch_stats=statistics)

    needs = frozenset({CLASSES, "average", *([WHOLE] if balance else [])})
    return Term(loss, on=(target,), logs=("confident", "balance"), reads=(MODEL,), needs=needs)


def balance(target: Target = "target") -> Term:
    """Classes in equal numbers on the target: -mean over classes of log(mean p + 1e-6) (Saito et al. 2018, app. B)."""

    def loss(context: Context) -> Result:
        return Result(imbalance(context.outputs[target]["logits"].astype(jnp.float32)))

    return Term(loss, on=(target,), needs=frozenset({CLASSES, WHOLE}))


def pseudo_label_loss(logits: jax.Array, p: jax.Array, threshold: float) -> tuple[jax.Array, jax.Array]:
    """The loss of `fixmatch` for logits [B, K] of the strong view and p of the weak one, and the share it counts."""
    mask = (p.max(axis=-1) > threshold).astype(p.dtype)
    answers = jax.nn.one_hot(jnp.argmax(p, axis=-1), p.shape[-1], dtype=p.dtype)
    return (mask * cross_entropy(logits, answers)).mean(), mask.mean()


def consistency(p: jax.Array, q: jax.Array, threshold: float) -> tuple[jax.Array, jax.Array]:
    """mean 1[max q > threshold] |p - q|^2 for p, q [B, K], q without gradient, and the share that counts."""
    q = jax.lax.stop_gradient(q)
    mask = (q.max(axis=-1) > threshold).astype(q.dtype)
    return (mask * jnp.square(p - q).sum(axis=-1)).mean(), mask.mean()


def uniformity(mean: jax.Array) -> jax.Array:
    """The binary cross-entropy of mean probabilities [K] with 1/K, the mean over classes."""
    share = 1 / len(mean)
    return -jnp.mean(share * jnp.log(mean + 1e-12) + (1 - share) * jnp.log1p(-jnp.minimum(mean, 1 - 1e-6)))


def imbalance(logits: jax.Array) -> jax.Array:
    """The loss of `balance` for logits [B, K]: log K where the mean of softmax(logits) is uniform, else more."""
    return -jnp.log(jax.nn.softmax(logits).mean(axis=0) + 1e-6).mean()


def _second_pass(context: Context, target: str, view: str) -> tuple[Outputs, dict[str, jax.Array]]:
    """The model on another view of a stream in train mode, with the statistics that the training pass left."""
    fields = context.batch[target]
    if view not in fields:
        raise ValueError(
            f"the stream {target!r} has the fields {sorted(fields)} and no {view!r}, expected a second view of it: "
            f"make it by streams.{target}.strong, or name another field by `view`"
        )
    return context.forward(
        MODEL, fields[view], train=True, key=context.key, variables={"batch_stats": context.batch_stats}
    )
