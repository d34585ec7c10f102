"""SqueezeNet 1.0 and 1.1 (Iandola et al. 2016, arXiv:1602.07360)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import conversion, layers
from tl_jax.models.variant import ConvNet, Variant

BY_PIXEL = (("by_pixel", {}),)  # the published head, see models/head.py


class Fire(nn.Module):
    """The maximum where `pool`, a 1x1 convolution, then half of `width` channels each by a 1x1 and a 3x3 one."""

    squeezed: int
    width: int
    pool: bool
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(layers.make_conv, self, use_bias=True)
        x = max_pool(x) if self.pool else x
        x = nn.relu(conv("squeeze", self.squeezed, 1)(x))
        halves = [conv(f"expand{size}", self.width // 2, size)(x) for size in (1, 3)]
        return nn.relu(jnp.concatenate(halves, axis=-1))


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2 whose last window may end a pixel outside, as torch's ceil_mode."""
    return layers.max_pool(x, 3, 2, tuple((0, 1 - side % 2) for side in x.shape[1:3]))


class Stem(nn.Module):
    """Convolution of stride 2 without padding, 3x3 maximum of stride 2, ReLU."""

    width: int
    size: int
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(
            max_pool(layers.make_conv(self, "conv", self.width, self.size, 2, padding="valid", use_bias=True)(x))
        )


class SqueezeNet(ConvNet):
    """SqueezeNet on images [B, H, W, 3] of 21 pixels or more; see `Model` for what all networks share.

    The cuts: stem, stage1/block0, ..., stage3 [B, h, w, 512], pre_logits, its mean over all pixels. A pool is in block0
    of the stage behind it. stem: (channels, size) of the first convolution. depths: fire modules per stage. drop_path
    must be 0.

    The published classifier is a 1x1 convolution, then ReLU, then the mean over all pixels, which is not the dense
    layer on pre_logits that a new head is: without the ReLU the two would be the same. So the card of the published
    weights says that their head is `by_pixel`; it reads stage3, and a new head takes its place as in every network.
    """

    stem: tuple[int, int]
    depths: tuple[int, int, int]

    @property
    def cuts(self) -> tuple[str, ...]:
        return layers.stage_cuts(self.depths)

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        layers.refuse_drop_path(self)
        block, fires, stages = layers.recomputed(Fire, self.remat), iter(FIRES), []
        for i, depth in enumerate(self.depths):
            sizes = [next(fires) for _ in range(depth)]
            stages.append(
                [functools.partial(block, *size, i > 0 and j == 0, self.policy) for j, size in enumerate(sizes)]
            )
        stem = Stem(*self.stem, self.policy, name="stem")
        parts = [stem, *layers.stage_parts(stages, train), layers.mean_of_pixels]
        return layers.run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop)


FIRES = ((16, 128), (16, 128), (32, 256), (32, 256), (48, 384), (48, 384), (64, 512), (64, 512))  # (squeezed, width)
_FIELDS = {
    "squeezenet1_0": {"stem": (96, 7), "depths": (3, 4, 1)},
    "squeezenet1_1": {"stem": (64, 3), "depths": (2, 2, 4)},
}


def _layout(depths: tuple[int, ...]) -> conversion.Layout:
    """torchvision's names. A head that torchvision would compute otherwise lies under this package's own."""
    rules, number = conversion.affine("backbone/stem/conv", "features.0", conversion.CONV), 2
    for i, depth in enumerate(depths, 1):
        number += 1  # the pool
        for j in range(depth):
            for ours, theirs in {"squeeze": "squeeze", "expand1": "expand1x1", "expand3": "expand3x3"}.items():
                source = f"features.{number}.{theirs}"
                rules += conversion.affine(f"backbone/stage{i}/block{j}/{ours}", source, conversion.CONV)
            number += 1
    rules += conversion.affine("head/out", "classifier.1", conversion.POINTWISE)
    return conversion.Layout(tuple(rules), r"classifier\..+", layers=("by_pixel",))


VARIANTS: dict[str, Variant] = {
    name: Variant(
        functools.partial(SqueezeNet, **fields),
        Card(name, 1000, interpolation="bilinear", head=BY_PIXEL),
        {"torchvision": _layout(fields["depths"]), "native": conversion.NATIVE},
        {},
    )
    for name, fields in _FIELDS.items()
}
