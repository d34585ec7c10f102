"""Distances between the distributions of two domains: of kernel means, and of covariances."""

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from tl_jax.core import checks
from tl_jax.methods.domain.common import CLASSES, WHOLE, Features, Target, both
from tl_jax.methods.precompute import linear
from tl_jax.methods.term import MAIN, Context, Network, Result, Start, Term, reverse

Estimate = Annotated[str, checks.one_of("unbiased", "biased", "linear")]
_NUMBERS = checks.sequence(checks.number(0, above=True), "a sequence of numbers above 0, at least one")
Factors = Annotated[Sequence[float], checks.Check(lambda x: _NUMBERS.fits(x) and len(x) > 0, _NUMBERS.expected)]
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0)


def mmd(
    factors: Factors = FACTORS, estimate: Estimate = "unbiased", target: Target = "target",
    features: Features = "embedding",
) -> Term:  # fmt: skip
    """DAN: the squared maximum mean discrepancy of the features under several kernels (Long et al. 2015, eq. 1-4).

    k(x, y) = sum over `factors` c of exp(-|x - y|^2 / (2 c m)), m the mean squared distance within the batch, without
    gradient. estimate: "unbiased" sums over all pairs of different examples, and can be negative; "biased" counts an
    example with itself; "linear" compares neighbours, row i and i + 1, in the time of B (the paper's eq. 6, TLLib's
    default), and needs batches of one size. TLLib logs a value that is larger by 2 / (B - 1).
    """

    def loss(context: Context) -> Result:
        x, source = _rows(context, target, estimate, features)
        distances = squared_distances(x)
        value = discrepancy(gaussian(distances, factors), source, estimate)
        return Result(value, {"mean_distance": distances.mean()})

    return Term(loss, on=(MAIN, target), logs=("mean_distance",), needs=frozenset({WHOLE}))


def jan(
    adversarial: Annotated[bool, checks.FLAG] = False,
    factors: Factors = FACTORS,
    sigma: Annotated[float, checks.number(0, above=True)] = 0.92,
    estimate: Estimate = "unbiased",
    target: Target = "target",
    features: Features = "embedding",
) -> Term:
    """JAN: the discrepancy of the joint distribution of features and probabilities (Long et al. 2017, eq. 9-11).

    The kernel is the product of that of `mmd` on the features and exp(-|p - q|^2 / (2 sigma^2)) on softmax(logits).
    adversarial (JAN-A): both pass a linear map, the identity at first, that raises the discrepancy while the features
    lower it: reverse(W reverse(z) + b). The maps are the network `theta`, trained in the group of that name; TLLib
    gives it a tenth of the rate. estimate: as in `mmd`.
    """
    name = "theta"

    def loss(context: Context) -> Result:
        x, source = _rows(context, target, estimate, features)
        p = jax.nn.softmax(_rows(context, target, estimate, "logits")[0])
        if adversarial:
            maps = context.params[name]
            x, p = (reverse(linear(reverse(z, 1.0), maps[of]), 1.0) for z, of in ((x, "features"), (p, "classes")))
        kernel = gaussian(squared_distances(x), factors) * jnp.exp(-squared_distances(p) / (2 * sigma**2))
        return Result(discrepancy(kernel, source, estimate))

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        sizes = {"features": start.shapes[features][-1], "classes": start.task.outputs}
        maps = {of: {"kernel": jnp.eye(size), "bias": jnp.zeros(size)} for of, size in sizes.items()}
        return {name: Network(None, None, {"params": maps}, group=name)} if adversarial else {}, None

    return Term(loss, on=(MAIN, target), init=init, needs=frozenset({CLASSES, WHOLE}))


def coral(
    means: Annotated[bool, checks.FLAG] = False, target: Target = "target", features: Features = "embedding"
) -> Term:
    """Deep CORAL: |C_s - C_t|_F^2 / (4 D^2) of the covariances of the features (Sun & Saenko 2016, eq. 1-3).

    means: in its place mean((mu_s - mu_t)^2) + mean((C_s - C_t)^2), 4 times the scale and a further summand, as TLLib
    and DomainBed have it. Covariances divide by B - 1, so a batch needs two examples of each domain.
    """

    def loss(context: Context) -> Result:
        x, y = both(context, target, features)
        _check_sizes("coral", (len(x), len(y)))
        return Result(covariance_distance(x, y, means))

    return Term(loss, on=(MAIN, target), needs=frozenset({WHOLE}))


def squared_distances(x: jax.Array) -> jax.Array:
    """|x_i - x_j|^2 of all rows of x [N, D], [N, N]."""
    return jnp.sum(jnp.square(x[:, None] - x[None]), axis=-1)


def gaussian(distances: jax.Array, factors: Sequence[float]) -> jax.Array:
    """The sum of Gaussian kernels of squared distances whose variances are `factors` times their mean."""
    mean = jax.lax.stop_gradient(distances.mean())
    mean = jnp.where(mean > 0, mean, 1.0)  # rows that are all equal
    return sum(jnp.exp(-distances / (2 * factor * mean)) for factor in factors)


def discrepancy(kernel: jax.Array, source: int, estimate: str) -> jax.Array:
    """The squared MMD of the first `source` rows and the others, from the kernel of all, [N, N].

    Gretton et al. 2012, JMLR: eq. 3 (unbiased), 5 (biased) and lemma 14 (linear, over overlapping pairs).
    """
    within, across = (kernel[:source, :source], kernel[source:, source:]), kernel[:source, source:]
    _check_sizes("a discrepancy", across.shape, same=estimate == "linear")
    if estimate == "linear":  # entry (i, i + 1), the last with the first
        near = [jnp.diagonal(jnp.roll(k, -1, axis=1)).mean() for k in (*within, across, across.T)]
        return near[0] + near[1] - near[2] - near[3]
    if estimate == "unbiased":
        ours = [(k.sum() - jnp.trace(k)) / (len(k) * (len(k) - 1)) for k in within]
    else:
        ours = [k.mean() for k in within]
    return ours[0] + ours[1] - 2 * across.mean()


def covariance_distance(x: jax.Array, y: jax.Array, means: bool) -> jax.Array:
    """The loss of `coral` for features [S, D] and [T, D]."""
    centred = [z - z.mean(axis=0, keepdims=True) for z in (x, y)]
    one, other = (jnp.matmul(z.T, z, precision="highest") / (len(z) - 1) for z in centred)
    if means:
        return jnp.square(x.mean(axis=0) - y.mean(axis=0)).mean() + jnp.square(one - other).mean()
    return jnp.square(one - other).sum() / (4 * x.shape[-1] ** 2)


def _rows(context: Context, target: str, estimate: str, name: str) -> tuple[jax.Array, int]:
    """An output of both streams as one array, and the number of rows of the source.

    Rows of several domains lie one domain after the other; "linear", which compares neighbours, takes them at random.
    """
    arrays = list(both(context, target, name))
    for i, stream in enumerate((MAIN, target)):
        if estimate == "linear" and context.facts[stream].domains > 1:
            arrays[i] = jax.random.permutation(jax.random.fold_in(context.key, i), arrays[i])
    return jnp.concatenate(arrays), len(arrays[0])


def _check_sizes(what: str, sizes: tuple[int, int], same: bool = False) -> None:
    if min(sizes) < 2 or (same and sizes[0] != sizes[1]):
        expected = "two batches of one size for estimate = 'linear'" if same else "at least 2 of each"
        raise ValueError(f"{what} of {sizes[0]} and {sizes[1]} examples, expected {expected}: change batch_size")
