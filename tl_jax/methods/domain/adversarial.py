"""A discriminator of the domains, whose gradient reaches the features reversed."""

import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from tl_jax.core import checks
from tl_jax.methods import schedules
from tl_jax.methods.domain.common import (
    CLASSES,
    RAMP,
    WHOLE,
    Features,
    Reversal,
    Strength,
    Target,
    both,
    mean_of_domains,
)  # fmt: skip
from tl_jax.methods.domain.outputs import entropy_of
from tl_jax.methods.penalties import squared_singular_values
from tl_jax.methods.term import MAIN, MODEL, Context, Network, Result, Start, Term, reverse
from tl_jax.models import mlp

Width = Annotated[int, checks.integer(1, 2**14)]


def dann(
    strength: Reversal = RAMP, target: Target = "target", features: Features = "embedding", width: Width = 1024
) -> Term:
    """DANN: features that a discriminator D of the domains cannot use (Ganin et al. 2016, section 4).

    Mean over source and target, with equal weight, of the binary cross-entropy of D(reverse(f)), source = 1. D is
    Dense(width)-BatchNorm-ReLU twice and one output (TLLib's; the paper's differ by data set), the network
    `discriminator`, trained in the group of that name. Its BatchNorm normalises source and target together. strength:
    of the reversal, a number or a schedule over the phase, the paper's 2 / (1 + exp(-alpha p)) - 1 by default. target:
    the stream of unlabelled examples.
    """
    name, factor = "discriminator", schedules.make(strength)

    def loss(context: Context) -> Result:
        f = jnp.concatenate(both(context, target, features))
        out, statistics = context.forward(name, reverse(f, factor(context.progress)), train=True, key=context.key)
        mean, accuracy = domain_loss(out["logits"][:, 0], len(context.outputs[MAIN][features]))
        return Result(mean, {"accuracy": accuracy, "strength": factor(context.progress)}, batch_stats=statistics)

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        return {name: _discriminator(start, name, start.shapes[features][-1], width)}, None

    return Term(loss, on=(MAIN, target), init=init, logs=("accuracy", "strength"), needs=frozenset({WHOLE}))


def cdan(
    strength: Reversal = RAMP,
    weights: Annotated[str, checks.one_of("joint", "per_domain", "none")] = "joint",
    target: Target = "target",
    features: Features = "embedding",
    width: Width = 1024,
    largest: Annotated[int, checks.integer(0)] = 4096,
    random: Annotated[int, checks.integer(1, 2**14)] = 1024,
) -> Term:
    """CDAN: DANN's game on the outer product of features and probabilities (Long et al. 2018, eq. 4-8).

    D reads reverse(vec(p f^T)), p = softmax without gradient; where D K > `largest` (the paper's 4096) it reads
    (f R_f) * (p R_p) / sqrt(random), with fixed normal R_f [D, random], R_p [K, random] that are the term's memory.

    weights: w = 1 + exp(-H(p)) of each example (CDAN+E). "joint" divides by the mean over both domains and stops the
    gradient of w (TLLib). "per_domain" divides by the mean of each domain, and the gradient of w is reversed too (the
    authors' code). "none": CDAN. D, strength and target as in `dann`, the network is `conditional_discriminator`.
    """
    name, factor = "conditional_discriminator", schedules.make(strength)

    def loss(context: Context) -> Result:
        f, z = (jnp.concatenate(both(context, target, output)) for output in (features, "logits"))
        source, k = len(context.outputs[MAIN][features]), factor(context.progress)
        h = outer(f, jax.lax.stop_gradient(jax.nn.softmax(z)), context.memory)
        out, statistics = context.forward(name, reverse(h, k), train=True, key=context.key)
        w = None if weights == "none" else certainty(z, source, weights, k)
        mean, accuracy = domain_loss(out["logits"][:, 0], source, w)
        return Result(mean, {"accuracy": accuracy, "strength": k}, batch_stats=statistics)

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        shapes, keys, maps = (start.shapes[features][-1], start.task.outputs), jax.random.split(start.key), None
        if (size := math.prod(shapes)) > largest:
            maps = [jax.random.normal(key, (n, random)) for key, n in zip(keys, shapes, strict=True)]
            maps, size = dict(zip(("features", "classes"), maps, strict=True)), random
        return {name: _discriminator(start, name, size, width)}, maps

    needs = frozenset({CLASSES, WHOLE})
    return Term(loss, on=(MAIN, target), init=init, logs=("accuracy", "strength"), needs=needs)


def adda(
    strength: Reversal = 1.0,
    reversal: Annotated[bool, checks.FLAG] = False,
    target: Target = "target",
    features: Features = "embedding",
    width: Width = 1024,
) -> Term:
    """ADDA: target features that D cannot tell from those of the source network as it was (Tzeng et al. 2017, eq. 9).

    For a phase after one on the source, with the head frozen by rules, in place of the task's own term. D is told f_s,
    the features of the source by the network as the phase began, in eval mode, from f_t, those of the target: the mean
    binary cross-entropy of D, and for the features strength * that of D(f_t) with the label of the source. reversal:
    instead the gradient of D's loss reversed and multiplied by strength, as in TLLib, which lets it rise to 2. D and
    target as in `dann`; BatchNorm in it normalises both domains together. Memory: a second copy of the model.
    """
    name, factor = "discriminator", schedules.make(strength)

    def loss(context: Context) -> Result:
        k = factor(context.progress)
        then, _ = context.forward(MODEL, MAIN, variables=jax.lax.stop_gradient(context.memory))
        source, moved = then[features].astype(jnp.float32), context.outputs[target][features].astype(jnp.float32)
        seen = reverse(moved, k) if reversal else jax.lax.stop_gradient(moved)
        out, statistics = context.forward(name, jnp.concatenate([source, seen]), train=True, key=context.key)
        mean, accuracy = domain_loss(out["logits"][:, 0], len(source))
        if not reversal:
            fixed = {"params": jax.lax.stop_gradient(context.params[name])}
            pair = jnp.concatenate([source, moved])
            out, _ = context.forward(name, pair, train=True, key=context.key, variables=fixed)
            mean += k * jax.nn.softplus(-out["logits"][len(source) :, 0]).mean()
        return Result(mean, {"accuracy": accuracy, "strength": k}, batch_stats=statistics)

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        return {name: _discriminator(start, name, start.shapes[features][-1], width)}, dict(start.variables)

    def refresh(start: Start) -> dict[str, Any]:
        return {kind: {name: start.variables[kind][name] for name in tree} for kind, tree in start.memory.items()}

    needs, logs = frozenset({WHOLE}), ("accuracy", "strength")
    return Term(
        loss, on=(target,), feeds=(MAIN,), init=init, refresh=refresh, logs=logs, needs=needs, replaces_task=True,
        trained=True,
    )  # fmt: skip


def bsp(
    strength: Strength = 2e-4,
    k: Annotated[int, checks.integer(1)] = 1,
    target: Target = "target",
    features: Features = "embedding",
) -> Term:
    """BSP: strength * the k largest squared singular values of the features [B, D] of each domain, summed.

    To add to `dann` or `cdan`, which raise transferability along few directions alone (Chen et al. 2019, BSP, eq. 6).
    Default: TLLib's; for digits 1e-4.
    """

    def loss(context: Context) -> Result:
        values = [squared_singular_values(f, slice(k)) for f in both(context, target, features)]
        return Result(strength * sum(values), dict(zip(("source", "target"), values, strict=True)))

    return Term(loss, on=(MAIN, target), logs=("source", "target"), needs=frozenset({WHOLE}))


def domain_loss(logits: jax.Array, source: int, weights: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Binary cross-entropy of a discriminator's logits [N], of which the first `source` are 1, and its accuracy."""
    is_source = jnp.arange(len(logits)) < source
    sign = jnp.where(is_source, 1.0, -1.0)
    each = jax.nn.softplus(-sign * logits)
    each = each if weights is None else weights * each
    right = ((logits > 0) == is_source).astype(jnp.float32)
    return mean_of_domains(each, source), mean_of_domains(right, source)


def outer(f: jax.Array, p: jax.Array, maps: dict[str, jax.Array] | None = None) -> jax.Array:
    """vec(p f^T) [B, K D], class by class, or its approximation by the random maps [B, R]."""
    if maps is None:
        return (p[:, :, None] * f[:, None, :]).reshape(len(f), -1)
    of_f, of_p = (jnp.matmul(x, maps[name], precision="highest") for x, name in ((f, "features"), (p, "classes")))
    return of_f * of_p / math.sqrt(of_f.shape[-1])


def certainty(logits: jax.Array, source: int, weights: str, strength: jax.Array | float) -> jax.Array:
    """The weights of CDAN+E [N], with mean 1; see `cdan`."""
    w = 1.0 + jnp.exp(-entropy_of(logits))
    if weights == "joint":
        w = jax.lax.stop_gradient(w)
        return w / mean_of_domains(w, source)
    w = reverse(w, strength)
    return jnp.concatenate([part / jax.lax.stop_gradient(part.mean()) for part in (w[:source], w[source:])])


def _discriminator(start: Start, name: str, inputs: int, width: int) -> Network:
    module = mlp.MLP(num_classes=1, widths=(width, width), norm=True, head_init="lecun")
    return Network(module, None, jax.jit(module.init)(start.key, jnp.zeros((1, inputs))), group=name)
