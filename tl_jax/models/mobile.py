"""Networks of inverted residuals (Sandler et al. 2018, arXiv:1801.04381): MobileNets and EfficientNets."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax

from tl_jax.models import conversion, keras, layers
from tl_jax.models.variant import ConvNet


class Row(NamedTuple):
    """Some blocks of a stage, alike but for the stride, which the first one has.

    kind: "inverted", a 1x1 expansion, a depthwise convolution and a 1x1 projection; "separable", the last two, without
    a sum (MobileNetV1); "fused", a full convolution in place of the first two (EfficientNetV2). An expansion of 1
    leaves its convolution out, or of "fused" the projection. squeeze: squeeze and excite. act: "" for the network's.
    """

    kind: str
    size: int
    stride: int
    expansion: float
    features: int
    repeats: int = 1
    squeeze: bool = False
    act: str = ""

    @property
    def convs(self) -> tuple[int, ...]:
        """Which of conv1 (expand), conv2 (depthwise) and conv3 (project) a block has."""
        expands = self.expansion != 1
        if self.kind == "fused":
            return (1, 3) if expands else (1,)
        return (1, 2, 3) if expands else (2, 3)


Stages = tuple[tuple[Row, ...], ...]


def divisible(channels: float) -> int:
    """The nearest multiple of 8 that is not more than a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def scaled(stages: Stages, width: float = 1.0, depth: float = 1.0, ends: bool = True) -> Stages:
    """The stages with other numbers of channels and blocks (of one row a stage); ends: blocks of the outer two too."""
    depths = [depth if ends or 0 < i < len(stages) - 1 else 1.0 for i in range(len(stages))]
    return tuple(
        tuple(r._replace(features=divisible(r.features * width), repeats=math.ceil(r.repeats * own)) for r in rows)
        for rows, own in zip(stages, depths, strict=True)
    )


class Block(nn.Module):
    """One block of a `Row`: [B, H, W, C] -> [B, H', W', features], plus its input where the shapes are the same."""

    row: Row
    stride: int
    drop_path: float
    act: str
    hard: bool  # squeeze and excite as in MobileNetV3
    even: bool
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        row, act = self.row, self.row.act or self.act
        inner = row.features if row.convs == (1,) else divisible(x.shape[-1] * row.expansion)
        fused, separable = row.kind == "fused", row.kind == "separable"
        convs = {
            1: (inner, row.size if fused else 1, self.stride if fused else 1, 1),
            2: (inner, row.size, self.stride, inner),
            3: (row.features, 1, 1, 1),
        }
        acts = {1: act, 2: act, 3: act if separable else ""}
        summed = not separable and self.stride == 1 and x.shape[-1] == row.features
        # Where nothing stands between the last norm and the sum, the two are one operation.
        at_once = summed and not acts[row.convs[-1]] and not (train and self.drop_path)
        y = x
        for i in row.convs:
            if i == 3 and row.squeeze:
                y = self.squeeze(y, x.shape[-1])
            conv = layers.make_conv(self, f"conv{i}", *convs[i], padding="even" if self.even and i == 2 else "")
            norm = layers.batch_norm(self, f"norm{i}", train)
            y = layers.conv_norm(self, conv, norm, y, x if at_once and i == row.convs[-1] else None, acts[i])
        return x + layers.DropPath(self.drop_path)(y, train) if summed and not at_once else y

    def squeeze(self, y: jax.Array, inputs: int) -> jax.Array:
        reduced = divisible(y.shape[-1] / 4) if self.hard else max(1, inputs // 4)
        act, gate = ("relu", "hard_sigmoid") if self.hard else (self.act, "sigmoid")
        return layers.SqueezeExcite(reduced, self.policy.dtype, act, gate, name="se")(y)


class Final(nn.Module):
    """What lies behind the last block: with `pooled`, the mean of the pixels and a dense layer, [B, H, W, C] -> [B, D]
    in float32; otherwise a 1x1 convolution, [B, H, W, C] -> [B, H, W, features]."""

    features: int
    dense: int
    act: str
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, pooled: bool) -> jax.Array:
        if not pooled:
            conv = layers.make_conv(self, "conv", self.features, 1)
            return layers.conv_norm(self, conv, layers.batch_norm(self, "norm", train), x, act=self.act)
        x = layers.mean_of_pixels(x)
        return layers.ACTIVATIONS[self.act](layers.Dense(self.dense, name="dense")(x)) if self.dense else x


class MobileNet(ConvNet):
    """A network of inverted residuals on images [B, H, W, 3] of any size; see `Model` for what all networks share.

    The cuts: stem, stage1/block0, ..., stage1 (its last block), ..., final (the 1x1 convolution behind the last block,
    where there is one) [B, h, w, C], pre_logits [B, D]. stem, final: channels of the first and the last convolution.
    dense: values of the layer behind the mean, 0 for none. hard: squeeze and excite as in MobileNetV3 (a quarter of the
    expanded channels, ReLU, a hard sigmoid), not as in EfficientNet (a quarter of the block's input, the network's
    activation, a sigmoid). even: depthwise convolutions are padded as "even" in layers.pads_of.
    """

    stages: Stages
    stem: int = 32
    final: int = 0
    dense: int = 0
    act: str = "relu6"
    hard: bool = False
    even: bool = False

    @property
    def cuts(self) -> tuple[str, ...]:
        *cuts, last = layers.stage_cuts([sum(row.repeats for row in rows) for rows in self.stages])
        return (*cuts, *(["final"] if self.final else []), last)

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        kind = {"act": self.act, "hard": self.hard, "even": self.even, "policy": self.policy}
        block = functools.partial(layers.recomputed(Block, self.remat), **kind)
        rates = iter(layers.drop_path_rates(self.drop_path, sum(row.repeats for rows in self.stages for row in rows)))
        stages = [
            [
                functools.partial(block, row=row, stride=1 if j else row.stride, drop_path=next(rates))
                for row in rows
                for j in range(row.repeats)
            ]
            for rows in self.stages
        ]
        stem = layers.ConvNorm(self.stem, 3, 2, self.policy, self.act, name="stem")
        final = Final(self.final, self.dense, self.act, self.policy, name="final")
        behind = [functools.partial(final, train=train, pooled=pooled) for pooled in (False, True)]
        behind = behind if self.final else behind[1:]
        parts = [functools.partial(stem, train=train), *layers.stage_parts(stages, train), *behind]
        return layers.run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop)


HALF = keras.HALF  # of a card: pixels from -1 to 1
TF = {"same": True, "norm_eps": 1e-3}  # of a network: as TensorFlow computes

Names = dict[str, str]  # {path of a module: its name in the file}
_TIMM = {
    (1, 2, 3): ("conv_pw", "conv_dw", "conv_pwl"),
    (2, 3): ("conv_dw", "conv_pw"),
    (1, 3): ("conv_exp", "conv_pwl"),
}


def timm_block(row: Row, i: int, j: int, n: int) -> Names:
    """timm's names of what is in block j of stage i."""
    prefix, names = f"blocks.{i - 1}.{j}", {}
    for m, (k, conv) in enumerate(zip(row.convs, _TIMM.get(row.convs, ("conv",)), strict=True), 1):
        names |= both(f"{{}}{k}", f"{prefix}.{conv}", f"{prefix}.bn{m}")
    return names | (squeeze(f"{prefix}.se.conv_{{}}", ("reduce", "expand")) if row.squeeze else {})


def torchvision_block(row: Row, i: int, j: int, n: int, prefix: str = "features.{i}.{j}.block") -> Names:
    """torchvision's, which counts the layers of a block; prefix: of EfficientNet, or without stages."""
    prefix, names = prefix.format(i=i, j=j, n=n), {}
    order = [k for k in (1, 2, "se", 3) if k in row.convs or (k == "se" and row.squeeze)]
    for place, k in enumerate(order):
        own = f"{prefix}.{place}"
        names |= squeeze(f"{own}.fc{{}}", (1, 2)) if k == "se" else both(f"{{}}{k}", f"{own}.0", f"{own}.1")
    return names


def both(path: str, conv: str, norm: str) -> Names:
    """The names of a convolution and its norm; path: where they lie, with {} for "conv" and "norm"."""
    return {path.format("conv"): conv, path.format("norm"): norm}


def squeeze(template: str, names: Sequence[str | int]) -> Names:
    return {f"se/{ours}": template.format(name) for ours, name in zip(("reduce", "expand"), names, strict=True)}


def stem_and_head(stem: tuple[str, str], head: str, final: tuple[str, ...] = ()) -> Names:
    """The names outside of the blocks; final: of the last convolution, its norm and the dense layer, if any."""
    behind = zip(("conv", "norm", "dense"), final, strict=False)
    own = {f"backbone/final/{ours}": name for ours, name in behind}
    return both("backbone/stem/{}", *stem) | own | {"head": head}


def blocks_of(stages: Stages) -> dict[str, tuple[int, int, Row]]:
    """{path: (stage from 1, block from 0, row)} of all blocks, in order."""
    found = {}
    for i, rows in enumerate(stages, 1):
        for j, row in enumerate(own for own in rows for _ in range(own.repeats)):
            found[f"backbone/stage{i}/block{j}"] = i, j, row
    return found


def make_layout(stages: Stages, others: Names, block: Callable[[Row, int, int, int], Names], dense: bool = True):
    """A table from the names outside of the blocks and those of block j of stage i, the n-th of all (i and n from 1).

    dense: the layer behind the mean of the pixels is stored as one, not as a 1x1 convolution.
    """
    names = dict(others)
    for n, (place, (i, j, row)) in enumerate(blocks_of(stages).items(), 1):
        names |= {f"{place}/{path}": name for path, name in block(row, i, j, n).items()}
    pointwise = r".+/se/\w+" if dense else r".+/se/\w+|.+/final/dense"
    return conversion.by_names(names, re.escape(others["head"]) + r"\..+", r".*\.num_batches_tracked", pointwise)
