"""Terms for several labelled source domains and an unlabelled target.

A row of the stream `train` says in its field "domain" where it comes from; its place in the batch says nothing.
"""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core import checks
from tl_jax.methods.domain.common import WHOLE, Features, Strength, Target, both
from tl_jax.methods.domain.discrepancy import FACTORS, gaussian, squared_distances
from tl_jax.methods.term import MAIN, Context, Network, Result, Start, Term, reverse, task_losses
from tl_jax.models import mlp

Positive = Annotated[float, checks.number(0, above=True)]
Decay = Annotated[float, checks.number(0, 1, below=True)]
NEEDS = frozenset({"domains", WHOLE})  # the mean over a domain is no mean over pieces of a batch
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def shares(domain: jax.Array, domains: int) -> jax.Array:
    """The matrix [D, B] that makes of rows [B, ...] the mean of each domain; zeros for a domain without a row."""
    member = jax.nn.one_hot(domain, domains, axis=0)
    return member / jnp.maximum(member.sum(axis=1, keepdims=True), 1.0)


def source_shares(context: Context) -> jax.Array:
    """`shares` of the stream `train`."""
    return shares(context.batch[MAIN]["domain"], context.facts[MAIN].domains)


def risks(context: Context) -> jax.Array:
    """The task's mean loss in each source domain, [D]."""
    return matmul(source_shares(context), task_losses(context))


def kernel_means(kernel: jax.Array, share: jax.Array) -> jax.Array:
    """The mean of a kernel [B, B] for each pair of domains, [D, D]; an example with itself counts."""
    return matmul(matmul(share, kernel), share.T)


def moment_distance(source: jax.Array, share: jax.Array, target: jax.Array, moments: int) -> jax.Array:
    """Sum over k of mean_i |E x_i^k - E x_T^k| + mean_{i<j} |E x_i^k - E x_j^k|; share: of the rows of source."""
    i, j = np.triu_indices(len(share), 1)
    total = 0.0
    for k in range(1, moments + 1):
        of_sources, of_target = matmul(share, source**k), jnp.mean(target**k, axis=0, keepdims=True)
        total += _norm(of_sources - of_target).mean() + _norm(of_sources[i] - of_sources[j]).mean()
    return total


def _norm(x: jax.Array) -> jax.Array:
    """|x| of rows; the gradient at 0 is 0."""
    squares = jnp.square(x).sum(axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def m3sda(
    strength: Strength = 5e-4,
    moments: Annotated[int, checks.integer(1, 16)] = 5,
    target: Target = "target",
    features: Features = "embedding",
) -> Term:
    """M3SDA: the moments of features agree among sources, and with the target (Peng et al. 2019, eq. 1 and 8).

    strength * the sum over k = 1 .. moments of mean_i |E x_i^k - E x_T^k| + mean_{i<j} |E x_i^k - E x_j^k|, of raw
    moments and Euclidean norms; features far above 1 have huge ones. The paper adds classifiers in pairs: term `mcd`.
    """

    def loss(context: Context) -> Result:
        source, of_target = both(context, target, features)
        return Result(strength * moment_distance(source, source_shares(context), of_target, moments))

    return Term(loss, on=(MAIN, target), needs=NEEDS)


def mdan(
    gamma: Positive = 10.0,
    mu: Strength = 0.01,
    hard: Annotated[bool, checks.FLAG] = False,
    target: Target = "target",
    features: Features = "embedding",
    width: Annotated[int, checks.integer(1, 2**14)] = 1024,
) -> Term:
    """MDAN, in place of the task's own term: the worst sources count most (Zhao et al. 2018).

    1/gamma log sum_i exp gamma (risk_i + mu d_i), or with `hard` max_i (risk_i + mu d_i) (section 4). d_i is the binary
    cross-entropy of D_i(reverse(f)), its mean over source domain i plus its mean over the target, source = 1. D_i is
    Dense(width)-ReLU-Dense(1), the network and group `discriminator0`, `discriminator1`, ... Logs: the mean accuracy of
    the D_i, and the number of sources that count, 1 / sum w_i^2 of their weights w in the gradient.
    """

    def loss(context: Context) -> Result:
        source, of_target = both(context, target, features)
        share, f = source_shares(context), reverse(jnp.concatenate([source, of_target]), 1.0)
        each, right = [], []
        for i, own in enumerate(share):
            logits = context.forward(f"discriminator{i}", f)[0]["logits"][:, 0]
            of_i = matmul(own, jax.nn.softplus(-logits[: len(source)]))
            each.append(of_i + jax.nn.softplus(logits[len(source) :]).mean())
            hits = matmul(own, (logits[: len(source)] > 0).astype(jnp.float32))
            right.append((hits + (logits[len(source) :] <= 0).mean()) / 2)
        bounds = risks(context) + mu * jnp.stack(each)
        weights = bounds == bounds.max() if hard else jax.nn.softmax(gamma * bounds)
        value = bounds.max() if hard else jax.nn.logsumexp(gamma * bounds) / gamma
        return Result(value, {"accuracy": jnp.stack(right).mean(), "effective": _effective(weights)})

    def init(start: Start):
        module, networks = mlp.MLP(num_classes=1, widths=(width,), head_init="lecun"), {}
        for i in range(start.facts[MAIN].domains):
            key, x = jax.random.fold_in(start.key, i), jnp.zeros((1, start.shapes[features][-1]))
            networks[f"discriminator{i}"] = Network(module, None, jax.jit(module.init)(key, x), f"discriminator{i}")
        return networks, None

    return Term(loss, on=(MAIN, target), init=init, logs=("accuracy", "effective"), needs=NEEDS, replaces_task=True)


def darn(
    tau: Positive = 1.0,
    mu: Strength = 1.0,
    decay: Decay = 0.9,
    target: Target = "target",
    features: Features = "embedding",
) -> Term:
    """Sources weigh the more, the nearer they are; in place of the task's own term.

    sum_i a_i risk_i with the a >= 0, sum a = 1, that minimise the bound sum_i a_i g_i + tau |a| of DARN (Wen, Greiner &
    Schuurmans 2020, section 4): a_i ~ max(nu - g_i, 0), sum_i max(nu - g_i, 0)^2 = tau^2. A large tau weighs all alike,
    a small one chooses. g_i is the moving average (decay; 0 takes this batch, as the authors do) of risk_i + mu d_i.
    The paper's d_i comes from a discriminator; here it is the squared MMD of the features of domain i and the target,
    0 to 2, of the mean of the kernels of the term `mmd`. No gradient goes through a. Memory: the averages [D], from 0,
    so that the weights begin nearly equal. Logs: 1 / sum a_i^2.
    """

    def loss(context: Context) -> Result:
        domains, (source, of_target) = context.facts[MAIN].domains, both(context, target, features)
        domain = jnp.concatenate([context.batch[MAIN]["domain"], jnp.full(len(of_target), domains)])
        x = jax.lax.stop_gradient(jnp.concatenate([source, of_target]))
        kernel = gaussian(squared_distances(x), FACTORS) / len(FACTORS)
        mean = kernel_means(kernel, shares(domain, domains + 1))
        discrepancy = (jnp.diag(mean) - 2 * mean[-1] + mean[-1, -1])[:-1]
        own = risks(context)
        average = decay * context.memory + (1 - decay) * (jax.lax.stop_gradient(own) + mu * discrepancy)
        weights = least_bound(average, tau)
        return Result(jnp.dot(weights, own), {"effective": _effective(weights)}, memory=average)

    def init(start: Start):
        return {}, jnp.zeros(start.facts[MAIN].domains)

    return Term(loss, on=(MAIN, target), init=init, logs=("effective",), needs=NEEDS, replaces_task=True)


def least_bound(g: jax.Array, tau: float) -> jax.Array:
    """The a >= 0, sum a = 1, that minimise sum a_i g_i + tau |a|, [D]."""
    g = g - g.min()
    chosen = jnp.square(jnp.maximum(g[:, None] - g[None], 0.0)).sum(axis=1) < tau**2  # those that nu is above
    count = chosen.sum()
    mean = jnp.sum(g * chosen) / count
    variance = jnp.sum(jnp.square(g - mean) * chosen) / count
    a = jnp.maximum(mean + jnp.sqrt(jnp.maximum(tau**2 / count - variance, 0.0)) - g, 0.0)
    return a / a.sum()


def _effective(weights: jax.Array) -> jax.Array:
    weights = weights / weights.sum()
    return 1 / jnp.square(weights).sum()
