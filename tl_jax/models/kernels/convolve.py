"""Convolutions as XLA runs them fastest on a CPU; on every other device they are XLA's own.

A 3x3 convolution of stride 1 becomes sixteen matrix products with 2.25 times fewer multiplications (Winograd's
F(2x2, 3x3); Lavin and Gray 2016, arXiv:1509.09308, section 4.1), a few images at a time so that they stay in the cache.
A depthwise convolution becomes a sum of shifted images, 8 to 40 times as fast as XLA's own. Everything is
float32 and equal to the plain convolution to about 1e-6 of the largest value.
"""

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Pads = tuple[tuple[int, int], tuple[int, int]]  # rows above and below, columns left and right
CHUNK_BYTES = 2**24  # of temporary arrays: half of a common last-level cache
_platform = contextvars.ContextVar("platform", default=None)  # see traced_for
KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])  # G of the paper


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1, pads: Pads | None = None) -> jax.Array:
    """Convolution of [B, H, W, C] with [height, width, C / groups, F]; pads: zeros around, None: half the kernel."""
    size, width, channels, features = kernel.shape
    half = ((size // 2, size // 2), (width // 2, width // 2))
    if groups == x.shape[-1] == features and by_hand(x.dtype):
        return depthwise(x, kernel, stride, pads or half)
    if size != width or pads not in (None, half):
        return plain(x, kernel, stride, groups, pads or half)
    # A matmul is up to 2.6x faster than XLA's convolution on CPU. On a GPU, XLA (jaxlib 0.10.2) ends the process with a
    # failed check where it fuses the slice of a stride into a matmul.
    if size == 1 and groups == 1 and (stride == 1 or on_cpu()):
        return pointwise(x[:, ::stride, ::stride], kernel[0, 0])
    if (size, stride, groups) == (3, 1, 1) and min(channels, features) >= 64 and by_hand(x.dtype):
        # The transformed kernel has sixteen numbers for nine: for few pixels it takes up to 9 times as long.
        if isinstance(x.shape[0], int) and x.size // channels <= min(channels, features):
            return valid(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), kernel)
        return winograd(x, kernel)
    if stride == 2 and groups == 1 and 3 in (size, channels) and by_hand(x.dtype):
        return strided(x, kernel)
    return plain(x, kernel, stride, groups)


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What the block traces is for one device of this platform, whatever this machine has."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def on_cpu() -> bool:
    """Whether what is traced now will run on a CPU."""
    return (_platform.get() or jax.default_backend()) == "cpu"


def by_hand(dtype: jnp.dtype) -> bool:
    """Whether the forms of this file are used: float32 on one CPU device; over several, their loops would move data."""
    return on_cpu() and (_platform.get() is not None or jax.device_count() == 1) and dtype == jnp.float32


def plain(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1, pads: Pads | None = None) -> jax.Array:
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
    pads = pads or tuple((side // 2, side // 2) for side in kernel.shape[:2])
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, **layout)


def valid(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Square convolution without padding: [B, H, W, C], [size, size, C, F] -> [B, H - size + 1, W - size + 1, F].

    One matrix product over all patches where `by_hand`, 2 to 15 times as fast for the few channels of small networks.
    """
    size, _, channels, features = kernel.shape
    if not by_hand(x.dtype):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    height, width = (side - size + 1 for side in x.shape[1:3])
    patches = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return pointwise(jnp.concatenate(patches, axis=-1), kernel.reshape(size * size * channels, features))


def apart(x: jax.Array) -> jax.Array:
    """x, which where `by_hand` is computed by itself and not as a part of what reads it.

    Else XLA (jaxlib 0.10.2) gives YNNPACK a product together with the norm or gate before it, and that with a piece of
    a depthwise convolution. Needs the compiler options of runtime/sharding.py, without which it does nothing.
    """
    return jax.lax.optimization_barrier(x) if by_hand(x.dtype) else x


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., C] by [C, F]."""
    return _pointwise(x, kernel) if by_hand(x.dtype) else x @ kernel


@jax.custom_vjp
def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return apart(x) @ kernel


_pointwise.defvjp(
    lambda x, kernel: (apart(x) @ kernel, (x, kernel)), lambda saved, dy: (dy @ saved[1].T, _outer(saved[0], dy))
)


def _outer(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The sum over all pixels of x^T dy: [..., C], [..., F] -> [C, F]."""
    if x.shape[-1] > dy.shape[-1]:  # the shorter side first, and long sums in parts: twice as fast at 50,000 pixels
        return _outer(dy, x).T
    pixels = x.size // x.shape[-1]
    parts = max((n for n in range(1, 17) if pixels % n == 0 and pixels // n >= 12000), default=1)
    x, dy = (a.reshape(parts, -1, a.shape[-1]) for a in (x, dy))
    return jax.lax.dot_general(x, dy, (((1,), (1,)), ((0,), (0,)))).sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """Convolution of every channel by itself, as a sum of shifted images: [B, H, W, C] with [height, width, 1, C]."""
    return _shifted(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel, stride)


def _depthwise_backward(stride, pads, saved, dy):
    x, kernel = saved
    borders = []
    for side, out, size, (before, _) in zip(x.shape[1:3], dy.shape[1:3], kernel.shape[:2], pads, strict=True):
        low, spread = size - 1 - before, (out - 1) * stride + 1
        borders.append((low, side + size - 1 - low - spread, stride - 1))
    spread = jax.lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *borders, (0, 0, 0)))
    dx = _shifted(spread, kernel[::-1, ::-1], 1)
    piece = functools.partial(_depthwise_kernel_gradient, shape=kernel.shape, stride=stride, pads=pads)
    return dx, _sum_of_chunks(piece, 12 * (x[0].size + dy[0].size) * x.dtype.itemsize, x, dy)


depthwise.defvjp(lambda x, kernel, stride, pads: (depthwise(x, kernel, stride, pads), (x, kernel)), _depthwise_backward)


def _shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Depthwise convolution of what is padded already."""
    height, width = ((n - size) // stride * stride + 1 for n, size in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    places = itertools.product(*map(range, kernel.shape[:2]))
    return sum(x[:, i : i + height : stride, j : j + width : stride] * kernel[i : i + 1, j : j + 1] for i, j in places)


def _depthwise_kernel_gradient(x: jax.Array, dy: jax.Array, shape, stride: int, pads: Pads, rows: int = 7) -> jax.Array:
    """For every row of the kernel sums over `rows` rows of dy, then over pixels by a product with ones."""
    size, columns, _, channels = shape
    high, wide = dy.shape[1:3]
    groups = -(-high // rows)  # of rows; the last is filled with zeros
    last, step, right = (groups - 1) * rows * stride, rows * stride, (wide - 1) * stride
    dy = jnp.pad(dy, ((0, 0), (0, groups * rows - high), (0, 0), (0, 0)))
    (top, _), sides = pads
    below = last + (rows - 1) * stride + size - top - x.shape[1]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, below, 0), (*sides, 0), (0, 0, 0)))

    def of_row(i):
        own = jax.lax.dynamic_slice_in_dim(x, i, last + (rows - 1) * stride + 1, 1)
        starts = [(own[:, r * stride : r * stride + last + 1 : step], dy[:, r::rows]) for r in range(rows)]
        products = [sum(x[:, :, j : j + right + 1 : stride] * dy for x, dy in starts) for j in range(columns)]
        products = jnp.stack(products, axis=3).reshape(-1, columns * channels)
        return jnp.ones(products.shape[:1], x.dtype) @ products

    return jax.lax.map(of_row, jnp.arange(size)).reshape(shape)


@jax.custom_vjp
def strided(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of stride 2, as one matrix product per few images."""
    weights = kernel.reshape(-1, kernel.shape[-1])
    return _by_chunks(lambda x: _patches(x, len(kernel)) @ weights, _patch_bytes(x, kernel), x)


def _strided_backward(saved, dy):
    x, kernel = saved

    def dx_piece(dy):
        return _unpatched([[dy @ kernel[i, j].T for j in range(3)] for i in range(3)], *x.shape[1:3])

    size = _patch_bytes(x, kernel)
    gradient = _sum_of_chunks(lambda x, dy: _outer(_patches(x, len(kernel)), dy), size, x, dy)
    if len(kernel) == 3:
        dx = _by_chunks(dx_piece, size, dy)
    else:  # the stem's: nothing reads the gradient of images, and XLA drops it
        dx = jax.linear_transpose(lambda x: plain(x, kernel, 2), x)(dy)[0]
    return dx, gradient.reshape(kernel.shape)


strided.defvjp(lambda x, kernel: (strided(x, kernel), (x, kernel)), _strided_backward)


def _patch_bytes(x: jax.Array, kernel: jax.Array) -> int:
    return x[0].size // 4 * kernel.shape[0] ** 2 * x.dtype.itemsize


def _patches(x: jax.Array, size: int) -> jax.Array:
    """What every output pixel of a stride-2 convolution sees: [B, H, W, C] -> [B, H/2, W/2, size * size * C]."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), *((size // 2,) * 2,) * 2, (0, 0)))
    x = jnp.concatenate([x[:, :, j : j + width : 2] for j in range(size)], axis=-1)
    x = jax.lax.optimization_barrier(x)  # or every number is fetched through two concatenations
    return jnp.concatenate([x[:, i : i + height : 2] for i in range(size)], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def norm(x: jax.Array, scale: jax.Array, bias: jax.Array, shortcut: jax.Array | None, relu: bool, epsilon: float):
    """BatchNorm by the batch's statistics, plus `shortcut`, then relu: the result, and mean and biased variance [C].

    The gradient is of the result alone (Ioffe and Szegedy 2015, section 3), with half the passes over the activations.
    """
    return _norm_forward(x, scale, bias, shortcut, relu, epsilon)[0]


_mean = functools.partial(jnp.mean, axis=(0, 1, 2))
_channels = functools.partial(jnp.expand_dims, axis=(0, 1, 2))


def _norm_forward(x, scale, bias, shortcut, relu, epsilon):
    mean, square = _mean(x), _mean(x * x)
    var = jnp.maximum(square - mean * mean, 0)
    inverse = jax.lax.rsqrt(var + epsilon)
    y = (x - _channels(mean)) * _channels(scale * inverse) + _channels(bias)
    y = y if shortcut is None else y + shortcut
    y = jnp.maximum(y, 0) if relu else y
    return (y, mean, var), (x, y if relu else None, mean, inverse, scale, shortcut is None)


def _norm_backward(relu, epsilon, saved, gradients):
    x, y, mean, inverse, scale, alone = saved
    dy = jnp.where(y > 0, gradients[0], 0) if relu else gradients[0]
    normed = (x - _channels(mean)) * _channels(inverse)
    by_bias, by_scale = _mean(dy), _mean(dy * normed)  # per pixel
    dx = (dy - _channels(by_bias) - normed * _channels(by_scale)) * _channels(scale * inverse)
    pixels = x.size // x.shape[-1]
    return dx, by_scale * pixels, by_bias * pixels, None if alone else dy


norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2 and a border of -inf, whose gradient goes to the first of equal maxima."""
    return _by_chunks(lambda x: _maximum(x)[0], 4 * x[0].size, x)


def _max_pool_forward(x):
    y, winner = _by_chunks(_maximum, 4 * x[0].size, x)
    return y, (winner, x.shape[1:3])


def _max_pool_backward(saved, dy):
    winner, size = saved

    def piece(winner, dy):
        return _unpatched([[jnp.where(winner == 3 * i + j, dy, 0) for j in range(3)] for i in range(3)], *size)

    return (_by_chunks(piece, 32 * winner[0].size, winner, dy),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _maximum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maxima and which of the nine each is, row by row."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    y, winner = x[:, :height:2, :width:2], jnp.zeros((), jnp.int8)
    for k in range(1, 9):
        other = x[:, k // 3 : k // 3 + height : 2, k % 3 : k % 3 + width : 2]
        winner = jnp.where(other > y, jnp.int8(k), winner)
        y = jnp.maximum(y, other)
    return y, winner


def _unpatched(windows: list[list[jax.Array]], height: int, width: int) -> jax.Array:
    """Sums 3x3 windows of stride 2 where they overlap, [row][column] of [B, h, w, C], to [B, height, width, C]."""
    return _interleave(*(_interleave(*row, axis=2) for row in windows), axis=1)[:, :height, :width]


def _interleave(left: jax.Array, centre: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Sums windows of three with stride 2 and one pixel of padding: from [n] thrice to [2 n]."""
    first, others = jnp.split(left, [1], axis=axis)
    next_left = jnp.concatenate([others, jnp.zeros_like(first)], axis=axis)
    both = jnp.stack([centre, right + next_left], axis=axis + 1)
    return both.reshape(*centre.shape[:axis], -1, *centre.shape[axis + 1 :])


@jax.custom_vjp
def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution of stride 1: [B, H, W, C], [3, 3, C, F] -> [B, H, W, F]."""
    return _winograd(x, _transform(KERNEL, kernel))


def _winograd_backward(saved, dy):
    x, kernel = saved
    return _winograd(dy, _transform(KERNEL, kernel), turned=True), _winograd_kernel_gradient(x, dy)


winograd.defvjp(lambda x, kernel: (winograd(x, kernel), (x, kernel)), _winograd_backward)


def _winograd(x: jax.Array, weights: jax.Array, turned: bool = False) -> jax.Array:
    """With transformed weights [4, 4, C, F]; `turned`: of the kernel turned around, from F to C."""
    features = weights.shape[2 if turned else 3]
    order = (3, 1, 2, 0) if turned else (0, 1, 2, 3)
    weights = [[weights[i, j].T if turned else weights[i, j] for j in order] for i in order]

    def piece(x):
        batch, height, width, _ = x.shape
        tiles = _tiles(x)
        products = [[tiles[j][i] @ weights[i][j] for i in range(4)] for j in range(4)]
        rows = [_back([products[j][i] for j in range(4)]) for i in range(4)]
        y = [_back([rows[i][j] for i in range(4)]) for j in range(2)]  # y[column][row] of every 2x2 tile
        y = jnp.stack([jnp.stack([y[0][i], y[1][i]], axis=3) for i in range(2)], axis=2)
        return y.reshape(batch, height + height % 2, width + width % 2, features)[:, :height, :width]

    return _by_chunks(piece, _tile_bytes(x, features), x)


def _winograd_kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    def piece(x, dy):
        height, width = dy.shape[1:3]
        dy = jnp.pad(dy, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        tiles = _tiles(x)
        spread = [_back_transposed([dy[:, i::2, j::2] for j in range(2)]) for i in range(2)]
        spread = [_back_transposed([spread[i][j] for i in range(2)]) for j in range(4)]
        return [_outer(tiles[j][i], spread[j][i]) for i in range(4) for j in range(4)]

    sums = jnp.stack(_sum_of_chunks(piece, _tile_bytes(x, dy.shape[-1]), x, dy))
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


def _tile_bytes(x: jax.Array, features: int) -> int:
    _, height, width, channels = x.shape
    return 16 * ((height + 1) // 2) * ((width + 1) // 2) * (channels + features) * x.dtype.itemsize


def _transform(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """M x M^T over the first two axes, as one matrix product: two are far slower for a large kernel."""
    y = jnp.asarray(np.kron(matrix, matrix), x.dtype) @ x.reshape(matrix.shape[1] ** 2, -1)
    return y.reshape(len(matrix), len(matrix), *x.shape[2:])


def _by_chunks(function: Callable, bytes_of_one: int, *arrays: jax.Array) -> Any:
    if (count := _chunk_count(arrays[0].shape[0], bytes_of_one)) == 1:
        return function(*arrays)
    chunks = tuple(x.reshape(count, -1, *x.shape[1:]) for x in arrays)
    y = jax.lax.map(lambda chunk: function(*chunk), chunks)
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), y)


def _sum_of_chunks(function: Callable, bytes_of_one: int, *arrays: jax.Array) -> Any:
    if (count := _chunk_count(arrays[0].shape[0], bytes_of_one)) == 1:
        return function(*arrays)
    chunks = tuple(x.reshape(count, -1, *x.shape[1:]) for x in arrays)
    shapes = jax.eval_shape(function, *(x[0] for x in chunks))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(lambda sums, chunk: (jax.tree.map(jnp.add, sums, function(*chunk)), None), zeros, chunks)[0]


def _chunk_count(batch: int, bytes_of_one: int) -> int:
    """The smallest number of equal chunks whose temporary arrays stay within CHUNK_BYTES; 1 for a symbolic batch."""
    if not isinstance(batch, int):
        return 1
    counts = (n for n in range(1, batch + 1) if batch % n == 0)
    return next(n for n in counts if n == batch or batch // n * bytes_of_one <= CHUNK_BYTES)
