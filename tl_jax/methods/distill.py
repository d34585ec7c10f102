"""Distillation as terms."""

from typing import Annotated

import jax
import jax.numpy as jnp

from tl_jax.core import checks
from tl_jax.methods.term import MAIN, Context, Result, Term


def kd(
    temperature: Annotated[float, checks.number(0, above=True)] = 4.0,
    teacher: Annotated[str, checks.TEXT] = "teacher",
) -> Term:
    """Knowledge distillation: T^2 KL(softmax(teacher / T) || softmax(student / T)) (Hinton et al. 2015, section 2).

    Mean over the batch. teacher: a frozen network of config.networks with the same classes in the same order.
    """

    def loss(context: Context) -> Result:
        student = context.outputs[MAIN]["logits"].astype(jnp.float32)
        answers, _ = context.forward(teacher, MAIN)
        target = jax.lax.stop_gradient(answers["logits"].astype(jnp.float32))
        if target.shape != student.shape:
            found = f"the logits of {teacher!r} are {target.shape[1:]}, those of the model {student.shape[1:]}"
            raise ValueError(f"kd: {found}; expected the same classes in the same order")
        p, q = jax.nn.log_softmax(target / temperature), jax.nn.log_softmax(student / temperature)
        agree = (student.argmax(axis=-1) == target.argmax(axis=-1)).mean(dtype=jnp.float32)
        return Result(temperature**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean(), {"agreement": agree})

    return Term(loss, logs=("agreement",), reads=(teacher,), needs=frozenset({"classes"}))
