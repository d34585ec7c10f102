"""Terms that make two domains look alike to the network."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from tl_jax.core import checks
from tl_jax.methods import schedules
from tl_jax.methods.term import MAIN, Context, Network, Result, Start, Term, reverse
from tl_jax.models import mlp


def dann(
    strength: Annotated[Any, schedules.CHECK] = ("sigmoid", {"alpha": 10.0}),
    target: Annotated[str, checks.TEXT] = "target",
    features: Annotated[str, checks.one_of("embedding", "pre_logits")] = "embedding",
    width: Annotated[int, checks.integer(1, 2**14)] = 1024,
) -> Term:
    """DANN: features that a discriminator D of the domains cannot use (Ganin et al. 2016, section 4).

    Mean over source and target, with equal weight, of the binary cross-entropy of D(reverse(f)), source = 1. D is
    Dense(width)-BatchNorm-ReLU twice and one output (TLLib's; the paper's differ by data set), the network
    `discriminator`, trained in the group of that name. strength: of the reversal, a number or a schedule over the
    phase, the paper's 2 / (1 + exp(-alpha p)) - 1 by default. target: the stream of unlabelled examples.
    """
    name, factor = "discriminator", schedules.make(strength)

    def loss(context: Context) -> Result:
        f = jnp.concatenate([context.outputs[stream][features].astype(jnp.float32) for stream in (MAIN, target)])
        source = len(context.outputs[MAIN][features])
        reversed_f = reverse(f, factor(context.progress))
        out, statistics = context.forward(name, reversed_f, train=True, key=context.key)
        logits = out["logits"][:, 0]
        is_source = jnp.arange(len(f)) < source
        sign = jnp.where(is_source, 1.0, -1.0)
        each = jax.nn.softplus(-sign * logits)
        right = ((logits > 0) == is_source).astype(jnp.float32)
        mean, accuracy = ((x[:source].mean() + x[source:].mean()) / 2 for x in (each, right))
        return Result(mean, {"accuracy": accuracy, "strength": factor(context.progress)}, batch_stats=statistics)

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        module = mlp.MLP(num_classes=1, widths=(width, width), norm=True, head_init="lecun")
        variables = jax.jit(module.init)(start.key, jnp.zeros((1, start.shapes[features][-1])))
        return {name: Network(module, None, variables, group=name)}, None

    return Term(loss, on=(MAIN, target), init=init, logs=("accuracy", "strength"))
