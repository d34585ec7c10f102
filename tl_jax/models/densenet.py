"""DenseNet with bottlenecks and compression (Huang et al. 2017, arXiv:1608.06993, table 1)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import conversion, keras, layers
from tl_jax.models.variant import ConvNet, Variant, with_flavours


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution to half of the channels, 2x2 mean: [B, H, W, C] -> [B, H/2, W/2, C/2]."""

    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(layers.batch_norm(self, "norm", train)(x))
        # The mean first, which gives the same and leaves the convolution a quarter of the pixels.
        return layers.make_conv(self, "conv", x.shape[-1] // 2, 1)(layers.mean_pool(x, 2, 2, "valid"))


class Block(nn.Module):
    """One dense layer, with the transition before it where `transition`: `growth` new channels behind those of x."""

    growth: int
    transition: bool
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.transition:
            x = Transition(self.policy, name="transition")(x, train)
        y = nn.relu(layers.batch_norm(self, "norm1", train)(x))
        conv = layers.make_conv(self, "conv1", 4 * self.growth, 1)
        y = layers.conv_norm(self, conv, layers.batch_norm(self, "norm2", train), y, act="relu")
        return jnp.concatenate([x, layers.make_conv(self, "conv2", self.growth, 3)(y)], axis=-1)


class DenseNet(ConvNet):
    """DenseNet on images [B, H, W, 3] of any size; see `Model` for what all networks share.

    The cuts: stem, stage1/block0, ..., stage1 (its last dense layer), ..., stage4, norm, the last BatchNorm with its
    ReLU, which is the map that a head of flatten or pool reads, and pre_logits. A transition is in block0 of the stage
    behind it. depths: dense layers per stage. growth: new channels of each; the stem has twice as many. drop_path must
    be 0.
    """

    depths: tuple[int, ...]
    growth: int = 32

    @property
    def cuts(self) -> tuple[str, ...]:
        *cuts, last = layers.stage_cuts(self.depths)
        return (*cuts, "norm", last)

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        layers.refuse_drop_path(self)
        block = functools.partial(layers.recomputed(Block, self.remat), growth=self.growth, policy=self.policy)

        def stem(x):
            x = layers.ConvNorm(2 * self.growth, 7, 2, self.policy, name="stem")(x, train)
            return nn.relu(layers.max_pool(x))  # the maximum first, as in resnet.py

        stages = [
            [functools.partial(block, transition=i > 0 and j == 0) for j in range(depth)]
            for i, depth in enumerate(self.depths)
        ]
        parts = [
            stem,
            *layers.stage_parts(stages, train),
            lambda x: nn.relu(layers.batch_norm(self, "norm", train)(x)),
            layers.mean_of_pixels,
        ]
        return layers.run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop)


def _layout() -> conversion.Layout:
    """torchvision's names, which are timm's; torchvision's published files have the old ones, norm.1 for norm1."""
    names = {
        "backbone/stem/conv": "features.conv0",
        "backbone/stem/norm": "features.norm0",
        "backbone/norm": "features.norm5",
        "head": "classifier",
    }
    for i in range(1, 5):  # a transition lies behind the dense layers of stage i
        for leaf in ("conv", "norm"):
            names[f"backbone/stage{i + 1}/block0/transition/{leaf}"] = f"features.transition{i}.{leaf}"
    for j in range(48):  # dense layers count from 1 there
        for leaf in ("conv", "norm"):
            source = rf"features.denseblock\1.denselayer{j + 1}.{leaf}\2"
            names[rf"backbone/stage(\d)/block{j}/{leaf}(\d)"] = source
    old = (r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.")
    return conversion.Layout(tuple(conversion.rules_of(names)), r"classifier\..+", r".*\.num_batches_tracked", (old,))


LAYOUTS = {"timm": _layout(), "native": conversion.NATIVE}
DEPTHS = {"densenet121": (6, 12, 24, 16), "densenet169": (6, 12, 32, 32), "densenet201": (6, 12, 48, 32)}


def _all_variants() -> dict[str, Variant]:
    """With torchvision's card; timm's own weights are resized bicubically."""
    variants = {}
    for name, depths in DEPTHS.items():
        card, own = Card(name, 1000, interpolation="bilinear"), {"norm_eps": 1.001e-5, "norm_momentum": 0.99}
        layouts = {**LAYOUTS, "keras": keras.densenet(depths)}
        module = functools.partial(DenseNet, depths=depths)
        variants |= with_flavours(module, card, layouts, {"keras": ("keras", own, card)})
    return variants


VARIANTS: dict[str, Variant] = _all_variants()
