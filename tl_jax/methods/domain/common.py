"""What the terms on domains share: their arguments, the features of streams, and heads on them."""

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from tl_jax.core import checks, trees
from tl_jax.methods import schedules
from tl_jax.methods.term import MAIN, MODEL, Context

Strength = Annotated[float, checks.number(0)]
Reversal = Annotated[Any, checks.Check(
    lambda value: schedules.CHECK.fits(value) and min(schedules.parts(value)[1].values(), default=0) >= 0,
    f"{schedules.CHECK.expected}, nothing below 0, which would turn the reversal round",
)]  # fmt: skip
Target = Annotated[str, checks.TEXT]
Features = Annotated[str, checks.one_of("embedding", "pre_logits")]
RAMP = ("sigmoid", {"alpha": 10.0})  # of a reversal: 2 / (1 + exp(-10 p)) - 1 (Ganin et al. 2016, section 5.2.2)
WHOLE, CLASSES = "whole_batch", "classes"  # names of training.terms.NEEDS
HEAD_READS = "pre_logits"


def both(context: Context, target: str, name: str) -> tuple[jax.Array, jax.Array]:
    """An output of the model for the streams `train` and `target`, float32."""
    return tuple(context.outputs[stream][name].astype(jnp.float32) for stream in (MAIN, target))


def mean_of_domains(x: jax.Array, source: int) -> jax.Array:
    """The mean of x [S + T] with the same weight for its first `source` rows as for the others."""
    return (x[:source].mean() + x[source:].mean()) / 2


def head_logits(
    context: Context, network: str, features: Sequence[jax.Array], key: jax.Array
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """What a head answers in train mode to features of several streams: (logits of each, updated statistics).

    Its BatchNorm normalises the streams together or one by one, as the run's norm_batches says.
    """
    call = {"train": True, "start": HEAD_READS}
    if context.joint:
        out, statistics = context.forward(network, jnp.concatenate(features), key=key, **call)
        ends = [sum(map(len, features[: i + 1])) for i in range(len(features) - 1)]
        return jnp.split(out["logits"], ends), statistics
    logits, statistics, variables = [], {}, None
    for i, x in enumerate(features):
        out, statistics = context.forward(network, x, key=jax.random.fold_in(key, i), variables=variables, **call)
        logits.append(out["logits"])
        updated = trees.unflatten(statistics)
        variables = {"batch_stats": updated if network == MODEL else updated.get(network, {})}
    return logits, statistics
