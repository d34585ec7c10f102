"""What the answers to unlabelled examples should be like: certain, of many classes, not confused."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp

from tl_jax.core import checks
from tl_jax.methods.domain.common import CLASSES, WHOLE, Target
from tl_jax.methods.term import Context, Result, Term

LOGS = ("confidence", "classes")


def mcc(temperature: Annotated[float, checks.number(0, above=True)] = 2.5, target: Target = "target") -> Term:
    """MCC: the confusion between classes within a batch of the target (Jin et al. 2020, eq. 2-7).

    With q = softmax(z / temperature), w = B (1 + exp(-H(q))) / sum without gradient, C = q^T diag(w) q and its rows
    divided by their sums: (sum C - tr C) / K. Small batches of many classes collapse. Default: the paper's.
    """

    def loss(context: Context) -> Result:
        logits = context.outputs[target]["logits"].astype(jnp.float32)
        return Result(confusion(logits, temperature), summary(logits))

    return Term(loss, on=(target,), logs=LOGS, needs=frozenset({CLASSES, WHOLE}))


def bnm(target: Target = "target") -> Term:
    """BNM: -|P|_* / B, the nuclear norm of the probabilities [B, K] of the target (Cui et al. 2020, eq. 9)."""

    def loss(context: Context) -> Result:
        logits = context.outputs[target]["logits"].astype(jnp.float32)
        return Result(-nuclear_norm(jax.nn.softmax(logits)) / len(logits), summary(logits))

    return Term(loss, on=(target,), logs=LOGS, needs=frozenset({CLASSES, WHOLE}))


def entropy(target: Target = "target") -> Term:
    """Entropy minimisation: the mean entropy of the answers to the target (Grandvalet & Bengio 2005, eq. 6)."""

    def loss(context: Context) -> Result:
        logits = context.outputs[target]["logits"].astype(jnp.float32)
        return Result(entropy_of(logits).mean(), summary(logits))

    return Term(loss, on=(target,), logs=LOGS, needs=frozenset({CLASSES}))


def infomax(target: Target = "target") -> Term:
    """Information maximisation: mean H(p) - H(mean p) on the target (Shi & Sha 2012; Liang et al. 2020, eq. 3).

    Certain answers of many classes: minus the mutual information of example and answer.
    """

    def loss(context: Context) -> Result:
        logits = context.outputs[target]["logits"].astype(jnp.float32)
        return Result(information(logits), summary(logits))

    return Term(loss, on=(target,), logs=LOGS, needs=frozenset({CLASSES, WHOLE}))


def confusion(logits: jax.Array, temperature: float) -> jax.Array:
    """The loss of `mcc` for logits [B, K]."""
    z = logits / temperature
    q, w = jax.nn.softmax(z), jax.lax.stop_gradient(1 + jnp.exp(-entropy_of(z)))
    c = jnp.matmul((q * (w / w.mean())[:, None]).T, q, precision="highest")
    c = c / c.sum(axis=1, keepdims=True)
    return (c.sum() - jnp.trace(c)) / len(c)


def nuclear_norm(x: jax.Array) -> jax.Array:
    """The sum of the singular values of x; its gradient is U V^T, also where singular values coincide."""
    u, _, v = jnp.linalg.svd(jax.lax.stop_gradient(x), full_matrices=False)
    return jnp.sum(jnp.matmul(u, v, precision="highest") * x)


def entropy_of(logits: jax.Array) -> jax.Array:
    """The entropy of softmax(logits) in nats, [B]."""
    return -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)


def information(logits: jax.Array) -> jax.Array:
    """mean H(p) - H(mean p) in nats, for p = softmax(logits) [B, K]."""
    mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - math.log(len(logits))
    return entropy_of(logits).mean() + jnp.sum(jnp.exp(mean) * mean)


def summary(logits: jax.Array) -> dict[str, jax.Array]:
    """What collapses first: the mean confidence, and how many classes are predicted, exp(H(mean p)) of 1 .. K."""
    p = jax.nn.softmax(logits)
    mean = p.mean(axis=0)
    return {"confidence": p.max(axis=-1).mean(), "classes": jnp.exp(-jnp.sum(mean * jnp.log(mean + 1e-12)))}
