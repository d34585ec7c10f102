"""Numbers that change over a phase: weights of terms, strengths of reversals. Progress runs from 0 to 1."""

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from tl_jax.core import checks

Number = Annotated[float, checks.number()]


def constant(value: Number = 1.0) -> Callable:
    """The same value throughout."""
    return lambda progress: value


def linear(start: Number = 0.0, stop: Number = 1.0) -> Callable:
    """A line from start to stop."""
    return lambda progress: start + (stop - start) * progress


def sigmoid(alpha: Number = 10.0, high: Number = 1.0) -> Callable:
    """high * (2 / (1 + exp(-alpha p)) - 1): from 0 towards high (Ganin et al. 2016, section 5.2.2)."""
    return lambda progress: high * (2.0 / (1.0 + jnp.exp(-alpha * progress)) - 1.0)


def step(value: Number = 1.0, at: Annotated[float, checks.number(0, 1)] = 0.5, first: Number = 0.0) -> Callable:
    """`first` up to a share `at` of the phase, then `value`."""
    return lambda progress: jnp.where(jnp.asarray(progress) < at, first, value)


SCHEDULES: dict[str, Callable] = {"constant": constant, "linear": linear, "sigmoid": sigmoid, "step": step}


def problems(what: str, value: Any) -> list[str]:
    """What is wrong with a number or a pair (name, {parameter: value})."""
    if checks.number().fits(value):
        return []
    if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str):
        return [f"{what}: {problem}" for problem in checks.call_problems("schedule", *value, SCHEDULES)]
    return [f"{what} = {value!r}: expected a number or (schedule, {{parameter: value}}), of {', '.join(SCHEDULES)}"]


CHECK = checks.Check(lambda value: not problems("", value), f"a number or a pair (one of {', '.join(SCHEDULES)}, {{}})")


def parts(value: Any) -> tuple[str, dict[str, Any]]:
    """The name of the schedule and its numbers, of a number or a pair."""
    name, numbers = value if isinstance(value, list | tuple) else ("constant", {"value": float(value)})
    return name, dict(numbers)


def make(value: Any) -> Callable[[jax.Array], Any]:
    """A function of the progress, from a number or a pair (name, {parameter: value})."""
    name, numbers = parts(value)
    return SCHEDULES[name](**numbers)
