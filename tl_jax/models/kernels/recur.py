"""The loop of a recurrent layer over time, with a gradient that is one matmul for the whole text.

The gradient that jax makes of the loop adds up that of the kernel step by step, which on a CPU takes 1.2 to 1.5 times
as long for the whole.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

State = tuple[jax.Array, ...]  # [B, H] each, float32; the first is the output


class Cell(NamedTuple):
    """step: (state, what the input gives, what the state gives; [B, gates H] each) -> the next state."""

    step: Callable[[State, jax.Array, jax.Array], State]
    gates: int
    states: int


def _lstm(state: State, x: jax.Array, h: jax.Array) -> State:
    """c' = f c + i g, h' = o tanh(c'), the gates i f g o (Gers et al. 2000, with a forget gate)."""
    i, f, g, o = jnp.split(x + h, 4, axis=-1)
    memory = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(memory), memory


def _gru(state: State, x: jax.Array, h: jax.Array) -> State:
    """h' = (1 - z) n + z h, the gates r z n; r acts behind the matmul, on its bias too, as in cuDNN and torch."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = jnp.split(x, 3, axis=-1), jnp.split(h, 3, axis=-1)
    new = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
    keep = jax.nn.sigmoid(x_z + h_z)
    return ((1 - keep) * new + keep * state[0],)


CELLS = {"lstm": Cell(_lstm, 4, 2), "gru": Cell(_gru, 3, 1)}


def _step(cell: str, state: State, x: jax.Array, h: jax.Array, mask: jax.Array) -> State:
    """The next state where there is a token, else the same."""
    new = CELLS[cell].step(state, x, h)
    return tuple(jnp.where(mask[:, None], a, b) for a, b in zip(new, state, strict=True))


def _start(cell: str, x: jax.Array, kernel: jax.Array) -> State:
    return (jnp.zeros((x.shape[1], kernel.shape[0]), jnp.float32),) * CELLS[cell].states


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in the type of b, summed up in float32."""
    return jnp.matmul(a.astype(b.dtype), b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def states(cell: str, x: jax.Array, mask: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The states h [L, B, H] of all steps, float32, from zeros before the first.

    x: of each step what its input gives, float32 [L, B, gates H]. mask: [L, B], false where the state stays as it was.
    kernel [H, gates H], in the type of the matmul, and bias: of the state.
    """
    return _forward(cell, x, mask, kernel, bias)[0]


def _forward(cell, x, mask, kernel, bias):
    def step(state, inputs):
        x, mask = inputs
        h = _times(state[0], kernel) + bias[None]
        new = _step(cell, state, x, h, mask)
        return new, (new[0], state, h)

    _, (out, before, h) = jax.lax.scan(step, _start(cell, x, kernel), (x, mask))
    return out, (x, mask, kernel, before, h)


def _backward(cell, saved, gradient):
    x, mask, kernel, before, h = saved

    def step(later, inputs):
        gradient, x, mask, state, h = inputs
        _, pull = jax.vjp(lambda state, x, h: _step(cell, state, x, h, mask), state, x, h)
        own, dx, dh = pull((later[0] + gradient, *later[1:]))
        return (own[0] + _times(dh, kernel.T), *own[1:]), (dx, dh)

    _, (dx, dh) = jax.lax.scan(step, _start(cell, x, kernel), (gradient, x, mask, before, h), reverse=True)
    rows, dh = before[0].reshape(-1, kernel.shape[0]), dh.reshape(-1, kernel.shape[1])
    return dx, None, _times(rows.T, dh.astype(kernel.dtype)).astype(kernel.dtype), dh.sum(0)


states.defvjp(_forward, _backward)
