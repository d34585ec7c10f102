"""Convolutions as XLA runs them fastest on a CPU; on every other device they are XLA's own.

XLA reaches a CPU's peak in matrix products but not in every convolution, and each pass over activations that have left
the cache costs as much as the arithmetic. So a 3x3 convolution of stride 1 becomes sixteen matrix products with
2.25 times fewer multiplications (Winograd's F(2x2, 3x3); Lavin and Gray 2016, arXiv:1509.09308, section 4.1), a few
images at a time. Everything here is float32 and equal to the plain convolution to about 1e-6 of the largest value.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

CHUNK_BYTES = 2**24  # of temporary arrays: half of a common last-level cache
LAYOUT = ("NHWC", "HWIO", "NHWC")
KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])  # G of the paper


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """Square convolution padded by size // 2: [B, H, W, C], [size, size, C / groups, F] -> [B, H/s, W/s, F]."""
    size, _, channels, features = kernel.shape
    if size == 1 and groups == 1:  # a matmul over channels: up to 2.6x faster than XLA's convolution on CPU
        return pointwise(x[:, ::stride, ::stride], kernel[0, 0])
    if (size, stride, groups) == (3, 1, 1) and min(channels, features) >= 64 and by_hand(x.dtype):
        return winograd(x, kernel)
    return plain(x, kernel, stride, groups)


def by_hand(dtype: jnp.dtype) -> bool:
    """Whether the forms of this file are used: float32 on one CPU device.

    Several devices on one CPU are simulated ones, and a loop over parts of a batch that is cut over devices would move
    it between them.
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and dtype == jnp.float32


def plain(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """XLA's convolution."""
    padding = [(kernel.shape[0] // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT, feature_group_count=groups
    )


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., C] by [C, F]."""
    return _pointwise(x, kernel) if by_hand(x.dtype) else x @ kernel


@jax.custom_vjp
def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _pointwise_backward(saved, dy):
    x, kernel = saved
    return dy @ kernel.T, _outer(x, dy)


_pointwise.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _pointwise_backward)


def _outer(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The sum over all pixels of x^T dy: [..., C], [..., F] -> [C, F].

    Long sums are cut into parts, and the shorter side stands first: together twice as fast at 50,000 pixels.
    """
    if x.shape[-1] > dy.shape[-1]:
        return _outer(dy, x).T
    pixels = x.size // x.shape[-1]
    parts = max((n for n in range(1, 17) if pixels % n == 0 and pixels // n >= 12000), default=1)
    x, dy = (a.reshape(parts, -1, a.shape[-1]) for a in (x, dy))
    return jax.lax.dot_general(x, dy, (((1,), (1,)), ((0,), (0,)))).sum(0)


@jax.custom_vjp
def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution of stride 1: [B, H, W, C], [3, 3, C, F] -> [B, H, W, F]."""
    return _winograd(x, _transform(KERNEL, kernel))


def _winograd_forward(x, kernel):
    return winograd(x, kernel), (x, kernel)


def _winograd_backward(saved, dy):
    """The gradient of the input is the convolution with the kernel turned around, whose transform is a permutation."""
    x, kernel = saved
    turned = _transform(KERNEL, kernel)[:, jnp.array([3, 1, 2, 0])][jnp.array([3, 1, 2, 0])]
    return _winograd(dy, turned, transposed=True), _winograd_kernel_gradient(x, dy)


winograd.defvjp(_winograd_forward, _winograd_backward)


def _winograd(x: jax.Array, weights: jax.Array, transposed: bool = False) -> jax.Array:
    """Transformed weights [4, 4, C, F], or [4, 4, F, C] if `transposed`."""
    features = weights.shape[2 if transposed else 3]
    weights = [[weights[i, j].T if transposed else weights[i, j] for j in range(4)] for i in range(4)]

    def part(x):
        batch, height, width, _ = x.shape
        tiles = _tiles(x)
        products = [[tiles[j][i] @ weights[i][j] for i in range(4)] for j in range(4)]
        rows = [_back([products[j][i] for j in range(4)]) for i in range(4)]
        y = [_back([rows[i][j] for i in range(4)]) for j in range(2)]  # y[column][row] of every 2x2 tile
        y = jnp.stack([jnp.stack([y[0][i], y[1][i]], axis=3) for i in range(2)], axis=2)
        return y.reshape(batch, height + height % 2, width + width % 2, features)[:, :height, :width]

    return _by_chunks(part, features, x)


def _winograd_kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    def part(x, dy):
        height, width = dy.shape[1:3]
        dy = jnp.pad(dy, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        tiles = _tiles(x)
        spread = [_back_transposed([dy[:, i::2, j::2] for j in range(2)]) for i in range(2)]
        spread = [_back_transposed([spread[i][j] for i in range(2)]) for j in range(4)]
        return [_outer(tiles[j][i], spread[j][i]) for i in range(4) for j in range(4)]

    sums = jnp.stack(_sum_of_chunks(part, x, dy))
    return _transform(KERNEL.T, sums.reshape(4, 4, *sums.shape[1:]))


def _tiles(x: jax.Array) -> list[list[jax.Array]]:
    """The 4x4 input tiles of every 2x2 tile of the output, transformed: [column][row] of [B, H/2, W/2, C]."""
    height, width = ((n + 1) // 2 for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (1, 1 + x.shape[1] % 2), (1, 1 + x.shape[2] % 2), (0, 0)))
    rows = [[x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for j in range(4)] for i in range(4)]
    rows = [_forth(row) for row in rows]
    return [_forth([rows[i][j] for i in range(4)]) for j in range(4)]


def _forth(d):  # B^T d, equation 10 of the paper, as are the others
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _back(m):  # A^T m
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _back_transposed(y):  # A y
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _transform(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """M x M^T over the first two axes, as one matrix product: two fused loops over a large kernel are far slower."""
    y = jnp.asarray(np.kron(matrix, matrix), x.dtype) @ x.reshape(matrix.shape[1] ** 2, -1)
    return y.reshape(len(matrix), len(matrix), *x.shape[2:])


def _chunks(x: jax.Array, features: int) -> int:
    """The smallest number of equal parts of the batch whose transformed tiles, in and out, stay within CHUNK_BYTES."""
    batch, height, width, channels = x.shape
    bytes_of_one = 16 * ((height + 1) // 2) * ((width + 1) // 2) * (channels + features) * x.dtype.itemsize
    parts = (n for n in range(1, batch + 1) if batch % n == 0)
    return next(n for n in parts if n == batch or batch // n * bytes_of_one <= CHUNK_BYTES)


def _split(x: jax.Array, parts: int) -> jax.Array:
    return x.reshape(parts, -1, *x.shape[1:])


def _by_chunks(function: Callable, features: int, x: jax.Array) -> jax.Array:
    parts = _chunks(x, features)
    if parts == 1:
        return function(x)
    y = jax.lax.map(function, _split(x, parts))
    return y.reshape(-1, *y.shape[2:])


def _sum_of_chunks(function: Callable, x: jax.Array, dy: jax.Array) -> list[jax.Array]:
    parts = _chunks(x, dy.shape[-1])
    if parts == 1:
        return function(x, dy)
    x, dy = _split(x, parts), _split(dy, parts)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, x[0], dy[0]))
    add = lambda sums, part: (jax.tree.map(jnp.add, sums, function(*part)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, (x, dy))[0]
