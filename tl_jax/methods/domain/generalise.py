"""Terms for several labelled source domains and no target: what holds in every domain is to hold in a new one.

Plain ERM on all domains is the task's own term. The weights that the methods were published with stand at each term;
one that changes at a step is a schedule of the term's weight, `("step", {"first": 1.0, "value": 100.0, "at": 0.1})`.
"""

import jax
import jax.numpy as jnp

from tl_jax.methods.domain.common import Features
from tl_jax.methods.domain.discrepancy import squared_distances
from tl_jax.methods.domain.several import NEEDS, Decay, Positive, kernel_means, matmul, risks, shares, source_shares
from tl_jax.methods.term import MAIN, Context, Result, Start, Term, task_losses

GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


def residuals(context: Context) -> jax.Array:
    """The derivative of each example's loss by its logits [B, K]: p - target where that is a cross-entropy."""
    out = context.outputs[MAIN]

    def total(logits):
        return task_losses(context._replace(outputs={MAIN: {**out, "logits": logits}})).sum()

    return jax.grad(total)(out["logits"])


def invariance(slopes: jax.Array, domain: jax.Array, domains: int) -> jax.Array:
    """The mean over domains of (mean of every second slope) * (mean of the others), of slopes [B]."""
    member = jax.nn.one_hot(domain, domains, axis=0)
    place = jnp.sum(member * (jnp.cumsum(member, axis=1) - 1), axis=0)  # of a row among those of its domain
    halves = [shares(jnp.where(place % 2 == half, domain, -1), domains) for half in (0, 1)]
    return jnp.mean(matmul(halves[0], slopes) * matmul(halves[1], slopes))


def irm() -> Term:
    """IRM: one classifier is optimal in every domain (Arjovsky et al. 2019, IRMv1, appendix D).

    The mean over domains of the squared derivative of the risk by a factor w = 1 on the logits z, of one example
    sum_k (dloss / dz_k) z_k; of a cross-entropy sum_k p_k z_k - z_y. The square is without bias as the product of the
    means over every second row of the domain and over the others. It may be negative. A batch needs two rows a domain.
    Weight, DomainBed's: 1, from step 500 of 5,000 on 100, where the optimizer starts anew.
    """

    def loss(context: Context) -> Result:
        slopes = jnp.sum(residuals(context) * context.outputs[MAIN]["logits"], axis=-1)
        return Result(invariance(slopes, context.batch[MAIN]["domain"], context.facts[MAIN].domains))

    return Term(loss, needs=NEEDS)


def vrex() -> Term:
    """V-REx: the variance of the risks of the domains (Krueger et al. 2021, eq. 8; population variance).

    Weight, DomainBed's: 1, from step 500 of 5,000 on 10, where the optimizer starts anew.
    """
    return Term(lambda context: Result(jnp.var(risks(context))), needs=NEEDS)


def groupdro(eta: Positive = 0.01) -> Term:
    """GroupDRO, in place of the task's own term: the worst domain (Sagawa et al. 2020, alg. 1).

    sum_d q_d risk_d. Each step first multiplies q_d by exp(eta risk_d) and divides by the sum. Memory: q [D], at first
    equal. Logs: the largest q. Default eta: DomainBed's.
    """

    def loss(context: Context) -> Result:
        own = risks(context)
        q = context.memory * jnp.exp(eta * jax.lax.stop_gradient(own))
        q = q / q.sum()
        return Result(jnp.dot(q, own), {"largest": q.max()}, memory=q)

    def init(start: Start):
        domains = start.facts[MAIN].domains
        return {}, jnp.full(domains, 1 / domains)

    return Term(loss, init=init, logs=("largest",), needs=NEEDS, replaces_task=True)


def spread(x: jax.Array) -> jax.Array:
    """The mean over all pairs of rows i < j of mean_k (x_ik - x_jk)^2, of [D, ...]."""
    return 2 * jnp.var(x, axis=0, ddof=1).mean()


def coral_between(x: jax.Array, domain: jax.Array, domains: int) -> jax.Array:
    """The mean over pairs of domains of mean((m_i - m_j)^2) + mean((C_i - C_j)^2), of rows [B, F]."""
    share = shares(domain, domains)
    mean, count = matmul(share, x), jnp.sum(share > 0, axis=1)
    centred = x - mean[domain]
    covariances = jax.vmap(lambda own: matmul(centred.T * own[None], centred))(share)
    return spread(mean) + spread(covariances * (count / jnp.maximum(count - 1, 1))[:, None, None])


def mmd_between(x: jax.Array, domain: jax.Array, domains: int) -> jax.Array:
    """The mean over pairs of domains of their squared MMD with the sum of the kernels exp(-gamma d^2), with d = 0."""
    distances = squared_distances(x)
    mean = kernel_means(sum(jnp.exp(-gamma * distances) for gamma in GAMMAS), shares(domain, domains))
    own = jnp.trace(mean)
    return 2 * (own / domains - (mean.sum() - own) / (domains * (domains - 1)))


def coral_domains(features: Features = "embedding") -> Term:
    """CORAL between source domains: their features have equal means and covariances (Sun & Saenko 2016).

    The mean over pairs of domains of mean_k (m_ik - m_jk)^2 + mean_kl (C_ikl - C_jkl)^2, the form of DomainBed. Weight
    1, or of 10^-1 .. 10^1.
    """
    return _between(coral_between, features)


def mmd_domains(features: Features = "embedding") -> Term:
    """MMD between source domains (Li et al. 2018, MMD-AAE, eq. 5, without the autoencoder; the form of DomainBed).

    The mean over pairs of domains of the squared MMD with the sum of seven kernels exp(-gamma d^2), gamma = 0.001 ..
    1000, each pair (x, x) included. Weight 1, or of 10^-1 .. 10^1.
    """
    return _between(mmd_between, features)


def _between(distance, features: str) -> Term:
    def loss(context: Context) -> Result:
        x = context.outputs[MAIN][features].astype(jnp.float32)
        return Result(distance(x, context.batch[MAIN]["domain"], context.facts[MAIN].domains))

    return Term(loss, needs=NEEDS)


def gradient_variances(r: jax.Array, z: jax.Array, share: jax.Array) -> jax.Array:
    """The variance in each domain of r_i z_i^T, [D, K, F], of r [B, K] and z [B, F] of examples i."""

    def variance(own):
        return matmul(r.T**2 * own[None], z**2) - matmul(r.T * own[None], z) ** 2

    return jax.vmap(variance)(share)


def fishr(decay: Decay = 0.95) -> Term:
    """Fishr: gradients of the last layer vary alike in all domains (Rame, Dancette & Cord 2022, eq. 4-5).

    v_d is the variance over the examples of domain d of the gradient by the last dense layer, which of one example is
    r [z, 1]^T, with r the derivative of its loss by the logits and z what the layer reads (before model.dropout). The
    loss is mean_d mean (a_d - mean_d a_d)^2 of a_d = v_d + decay / (1 - decay) * average_d. Memory: the averages
    [D, K, F + 1] of v_d, from 0. Weight, DomainBed's: 0, from step 1,500 of 5,000 on 1000, where the optimizer starts
    anew.
    """

    def loss(context: Context) -> Result:
        z = context.outputs[MAIN]["embedding"].astype(jnp.float32)
        z = jnp.concatenate([z, jnp.ones((len(z), 1))], axis=1)
        v = gradient_variances(residuals(context).astype(jnp.float32), z, source_shares(context))
        average = decay * context.memory + (1 - decay) * v
        return Result(jnp.var(average / (1 - decay), axis=0).mean(), memory=jax.lax.stop_gradient(average))

    def init(start: Start):
        return {}, jnp.zeros((start.facts[MAIN].domains, start.task.outputs, start.shapes["embedding"][-1] + 1))

    return Term(loss, init=init, needs=NEEDS)
