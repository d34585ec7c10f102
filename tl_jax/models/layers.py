"""Layers that several families share."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.models.kernels import convolve

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # as in torchvision's and timm's ResNets
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "": lambda x: x,
    "relu": nn.relu,
    "relu6": lambda x: jnp.clip(x, 0, 6),
    "silu": nn.silu,
    "hard_sigmoid": nn.hard_sigmoid,
    "hard_swish": nn.hard_swish,
    "sigmoid": nn.sigmoid,
}


class Policy(NamedTuple):
    """How the layers of a network compute; see `Model` and `ConvNet` in models/variant.py for the fields."""

    dtype: Any
    frozen_norms: tuple[str, ...]
    axis_name: str | None
    fold: bool
    norm_momentum: float
    norm_eps: float = 1e-5
    same: bool = False
    norm_scale: bool = True


def pads_of(padding: str, sizes: Sequence[int], stride: int, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The zeros (before, after) of each axis of an input of `shape` [H, W].

    padding: "half", size // 2 on every side, as in torch; "same", so that ceil(side / stride) values come out, the odd
    one after, as in TensorFlow; "even", what "same" adds to sides that the stride divides; "valid", none.
    """
    if padding == "half":
        return tuple((size // 2, size // 2) for size in sizes)
    if padding == "valid":
        return tuple((0, 0) for _ in sizes)
    if padding == "even":
        shape = (stride, stride)
    sums = (max((-(-side // stride) - 1) * stride + size - side, 0) for size, side in zip(sizes, shape, strict=True))
    return tuple((total // 2, total - total // 2) for total in sums)


class Conv(nn.Module):
    """Convolution [B, H, W, C] -> [B, H', W', F]; size: of a square, or (height, width); padding: see `pads_of`."""

    features: int
    size: int | tuple[int, int]
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32
    padding: str = "half"
    use_bias: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.sizes, x.shape[-1] // self.groups, self.features)
        y = self.run(x, self.param("kernel", HE_FAN_OUT, shape, jnp.float32))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + jnp.expand_dims(bias, (0, 1, 2)).astype(self.dtype)

    def run(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution of x with a kernel, without bias."""
        pads = pads_of(self.padding, self.sizes, self.stride, x.shape[1:3])
        return convolve.conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.groups, pads)


# flax's, [B, ..., C] -> [B, ..., F], with the gradient of its kernel as a CPU computes it fastest.
Dense = functools.partial(nn.Dense, dot_general=lambda x, kernel, *_, **__: convolve.pointwise(x, kernel))


def batch_norm(module: nn.Module, name: str, train: bool, scale_init: Callable = nn.initializers.ones) -> nn.BatchNorm:
    """Makes the BatchNorm `name` inside `module`, which has a field `policy`; inside a whole network, in its backbone.

    A momentum of 0.9 is torch's 0.1. The running variance averages biased variances of batches, torch's unbiased ones.
    """
    policy = module.policy
    frozen = "/".join((*(module.path or ("backbone",)), name)) in policy.frozen_norms
    settings = {"momentum": policy.norm_momentum, "epsilon": policy.norm_eps, "axis_name": policy.axis_name}
    settings |= {"dtype": policy.dtype, "scale_init": scale_init, "use_scale": policy.norm_scale}
    return nn.BatchNorm(use_running_average=frozen or not train, name=name, **settings)


def conv_norm(
    module: nn.Module, conv: Conv, norm: nn.BatchNorm, x: jax.Array, shortcut: jax.Array | None = None, act: str = ""
) -> jax.Array:
    """act(norm(conv(x)) + shortcut) for two children of `module`, which has a field `policy`; act: of ACTIVATIONS.

    With `fold`, a norm that uses its running statistics goes into the kernel, or for few pixels scales the result, and
    one that uses the batch's becomes one operation with what follows where `convolve.by_hand`.
    """
    fold, by_batch = module.policy.fold and not module.is_initializing(), not norm.use_running_average
    if fold and by_batch and norm.axis_name is None and convolve.by_hand(norm.dtype):
        bias = norm.get_variable("params", "bias")
        scale = norm.get_variable("params", "scale") if norm.use_scale else jnp.ones_like(bias)
        y, *moments = convolve.norm(conv(x), scale, bias, shortcut, act == "relu", norm.epsilon)
        for name, new in zip(("mean", "var"), moments, strict=True):
            running = norm.get_variable("batch_stats", name)
            norm.put_variable("batch_stats", name, norm.momentum * running + (1 - norm.momentum) * new)
        return y if act == "relu" else ACTIVATIONS[act](y)
    if by_batch or not fold:
        y = norm(conv(x))
    else:
        params, stats = module.variables["params"], module.variables["batch_stats"][norm.name]
        scale = params[norm.name].get("scale", 1.0) * jax.lax.rsqrt(stats["var"] + norm.epsilon)
        kernel, channels = params[conv.name]["kernel"], functools.partial(jnp.expand_dims, axis=(0, 1, 2))
        mean = stats["mean"] - params[conv.name]["bias"] if conv.use_bias else stats["mean"]
        shift = channels(params[norm.name]["bias"] - mean * scale).astype(conv.dtype)
        # Of few pixels the result has fewer numbers to scale than the kernel.
        pixels = x.size // x.shape[-1] // conv.stride**2
        if isinstance(x.shape[0], int) and pixels * kernel.shape[-1] < kernel.size:
            y = conv.run(x, kernel) * channels(scale).astype(conv.dtype) + shift
        else:
            y = conv.run(x, kernel * channels(scale)) + shift
    return ACTIVATIONS[act](y if shortcut is None else shortcut + y)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm and activation: the stem, a shortcut, the layer behind the last block."""

    features: int
    size: int | tuple[int, int]
    stride: int
    policy: Policy
    act: str = ""
    groups: int = 1
    padding: str = ""  # "": that of the policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = make_conv(self, "conv", self.features, self.size, self.stride, self.groups, self.padding)
        return conv_norm(self, conv, batch_norm(self, "norm", train), x, act=self.act)


def make_conv(
    module: nn.Module, name: str, features: int, size: Any, stride: int = 1, groups: int = 1, padding: str = "", **more
) -> Conv:
    """Makes the convolution `name` inside `module`, which has a field `policy`; padding "": that of the policy."""
    policy = module.policy
    padding = padding or ("same" if policy.same else "half")
    return Conv(features, size, stride, groups, policy.dtype, padding, name=name, **more)


class SqueezeExcite(nn.Module):
    """x gate(W2 act(W1 mean(x))), the mean over all pixels (Hu et al. 2018, arXiv:1709.01507): [B, H, W, C]."""

    reduced: int
    dtype: Any
    act: str = "relu"
    gate: str = "sigmoid"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.mean(jax.lax.optimization_barrier(x), axis=(1, 2), keepdims=True)  # see `mean_of_pixels`
        y = ACTIVATIONS[self.act](Dense(self.reduced, dtype=self.dtype, name="reduce")(y))
        return x * ACTIVATIONS[self.gate](Dense(x.shape[-1], dtype=self.dtype, name="expand")(y))


class Stage(nn.Module):
    """The blocks of one resolution, called one by one; blocks: makers of a module from its name."""

    blocks: tuple[Callable[..., nn.Module], ...]

    @nn.compact
    def __call__(self, j: int, x: jax.Array, train: bool) -> jax.Array:
        return self.blocks[j](name=f"block{j}")(x, train)


def stage_cuts(depths: Sequence[int]) -> tuple[str, ...]:
    """stem, stage1/block0, ..., stage1 (its last block), stage2/block0, ..., pre_logits."""
    stages = ([*(f"stage{i}/block{j}" for j in range(depth - 1)), f"stage{i}"] for i, depth in enumerate(depths, 1))
    return ("stem", *(cut for stage in stages for cut in stage), "pre_logits")


def stage_parts(stages: Sequence[Sequence[Callable[..., nn.Module]]], train: bool) -> list[Callable]:
    """A function of x for each block of the stages, given as makers of modules from a name."""
    made = [Stage(tuple(blocks), name=f"stage{i}") for i, blocks in enumerate(stages, 1)]
    return [functools.partial(stage, j, train=train) for stage in made for j in range(len(stage.blocks))]


def mean_of_pixels(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, C], float32."""
    # XLA (jaxlib 0.11.2, CPU) returns NaN where it fuses a convolution in bfloat16 into this mean.
    return jnp.mean(jax.lax.optimization_barrier(x), axis=(1, 2), dtype=jnp.float32)


class DropPath(nn.Module):
    """Stochastic depth: drops one or several branches [B, ...] of an example together (Huang et al. 2016)."""

    rate: float

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        if not train or self.rate == 0.0:
            return x
        shape = jax.tree.leaves(x)[0].shape
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, shape[:1] + (1,) * (len(shape) - 1))
        return jax.tree.map(lambda x: jnp.where(keep, x / (1.0 - self.rate), 0.0).astype(x.dtype), x)


def kept(key: jax.Array, rate: float, shape: Sequence[int]) -> jax.Array:
    """bool of `shape`, false with probability `rate` to within 2^-17; one random number of 32 bits serves two."""
    bits = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(*shape[:-1], -1)[..., : shape[-1]]
    return bits >= min(round(rate * 2**16), 2**16 - 1)


def dropped(module: nn.Module, rate: float, x: jax.Array) -> jax.Array:
    """Dropout of single numbers (Srivastava et al. 2014), in less time than flax's; x itself where the rate is 0."""
    return jnp.where(kept(module.make_rng("dropout"), rate, x.shape), x / (1 - rate), 0) if rate else x


def drop_path_rates(drop_path: float, blocks: int) -> list[float]:
    """Rates that rise linearly from 0 at the first block to `drop_path` at the last."""
    return [drop_path * i / max(blocks - 1, 1) for i in range(blocks)]


def refuse_drop_path(model: nn.Module) -> None:
    """ValueError where a network without residual branches is asked for stochastic depth."""
    if model.drop_path:
        name = type(model).__name__
        raise ValueError(f"model.drop_path={model.drop_path}: {name} has no residual branches to drop; use dropout")


def max_pool(x: jax.Array, size: int = 3, stride: int = 2, pads: Any = "half") -> jax.Array:
    """The maximum of windows of [B, H, W, C] with borders of -inf; pads: a name of `pads_of`, or ((top, bottom), ...).

    A window begins within the padded image and ends there: what is left over at the bottom and right is not read.
    """
    if (size, stride, pads) == (3, 2, "half") and convolve.by_hand(x.dtype):
        return convolve.max_pool(x)
    # The gradient of reduce_window is four times slower on a CPU.
    return functools.reduce(jnp.maximum, _windows(x, size, stride, pads, -jnp.inf))


def mean_pool(x: jax.Array, size: int, stride: int, pads: Any = "half", count_zeros: bool = True) -> jax.Array:
    """The mean of windows of [B, H, W, C]; count_zeros: of the border too, as in torch, not of its pixels alone."""
    total = functools.reduce(jnp.add, _windows(x, size, stride, pads, 0))
    if count_zeros:
        return total / size**2
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / functools.reduce(jnp.add, _windows(ones, size, stride, pads, 0))


def _windows(x: jax.Array, size: int, stride: int, pads: Any, border: float) -> list[jax.Array]:
    """The pixel (i, j) of every window, for all i and j."""
    pads = pads_of(pads, (size, size), stride, x.shape[1:3]) if isinstance(pads, str) else pads
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=border)
    height, width = ((side - size) // stride * stride + 1 for side in x.shape[1:3])
    return [x[:, i : i + height : stride, j : j + width : stride] for i in range(size) for j in range(size)]


def recomputed(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """The class of a block, called with (x, train), whose backward pass recomputes a part of it.

    remat: "" for nothing; "block" for all, from its input; "dots" for all but outputs of convolutions and matmuls
    (attention scores are recomputed). Raises ValueError for another name.
    """
    policies = {"block": None, "dots": _is_product}
    if not remat:
        return block
    if remat not in policies:
        raise ValueError(f"remat={remat!r}: expected one of '', {', '.join(policies)}")
    # static_argnums counts the module itself: 2 is `train`.
    return nn.remat(block, static_argnums=(2,), policy=policies[remat])


def _is_product(primitive, *args, **parameters) -> bool:
    matmul = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **parameters)
    return matmul or primitive is jax.lax.conv_general_dilated_p


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function of x (Hendrycks & Gimpel 2016), computed in float32 as in torch."""
    y = x.astype(jnp.float32)  # the erfc of jax.nn.gelu takes 2.5 times as long on a CPU
    return (0.5 * y * (1.0 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def run_parts(
    parts: dict[str, Callable], x: jax.Array, start: str | None = None, stop: str | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the named parts behind `start` up to `stop`, in order: (the last output, all outputs by name)."""
    names = list(parts)
    for argument, name in {"start": start, "stop": stop}.items():
        if name is not None and name not in names:
            raise ValueError(f"{argument}={name!r} is no cut of this model; its cuts: {names}")
    first, last = 0 if start is None else names.index(start) + 1, len(names) if stop is None else names.index(stop) + 1
    out = {}
    for name in names[first:last]:
        x = out[name] = parts[name](x)
    return x, out
