"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545); atto to nano are timm's."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import conversion, layers
from tl_jax.models.conversion import POINTWISE, Transform
from tl_jax.models.kernels import convolve
from tl_jax.models.variant import Model, Variant, with_flavours


class Downsample(nn.Module):
    """LayerNorm and a 2x2 convolution of stride 2 without padding: [B, H, W, C] -> [B, H // 2, W // 2, F]."""

    features: int
    eps: float
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm(epsilon=self.eps, dtype=self.policy.dtype, name="norm")(x)
        return layers.make_conv(self, "conv", self.features, 2, 2, padding="valid", use_bias=True)(x)


class Stem(nn.Module):
    """A 4x4 convolution of stride 4 without padding and LayerNorm: [B, H, W, 3] -> [B, H // 4, W // 4, F]."""

    features: int
    eps: float
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = layers.make_conv(self, "conv", self.features, 4, 4, padding="valid", use_bias=True)(x)
        return nn.LayerNorm(epsilon=self.eps, dtype=self.policy.dtype, name="norm")(x)


class Block(nn.Module):
    """x + gamma mlp(norm(conv(x))), conv depthwise 7x7; x: downsampled before where the stage begins so."""

    width: int
    downsample: bool
    drop_path: float
    eps: float
    scale_init: float
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dense = functools.partial(layers.Dense, dtype=self.policy.dtype)
        if self.downsample:
            x = Downsample(self.width, self.eps, self.policy, name="downsample")(x)
        y = convolve.apart(layers.make_conv(self, "conv", self.width, 7, groups=self.width, use_bias=True)(x))
        y = nn.LayerNorm(epsilon=self.eps, dtype=self.policy.dtype, name="norm")(y)
        y = dense(self.width, name="fc2")(layers.gelu(dense(4 * self.width, name="fc1")(y)))
        gamma = self.param("gamma", nn.initializers.constant(self.scale_init), (self.width,), jnp.float32)
        y = y * jnp.expand_dims(gamma.astype(y.dtype), (0, 1, 2))
        return x + layers.DropPath(self.drop_path)(y, train)


class ConvNeXt(Model):
    """ConvNeXt on images [B, H, W, 3] of at least 32 x 32 pixels; see `Model` for what all networks share.

    The cuts: stem, stage1/block0, ..., stage1 (its last block), ... [B, h, w, C], pre_logits [B, D] (the mean of all
    pixels, normalised). depths, widths: blocks and channels per stage. norm_eps: of every LayerNorm but the last;
    last_eps: of the last. scale_init: the initial value of gamma, by which each block starts near the identity.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    norm_eps: float = 1e-6
    last_eps: float = 1e-6
    scale_init: float = 1e-6

    @property
    def cuts(self) -> tuple[str, ...]:
        return layers.stage_cuts(self.depths)

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        rates = iter(layers.drop_path_rates(self.drop_path, sum(self.depths)))
        kind = {"eps": self.norm_eps, "scale_init": self.scale_init, "policy": self.policy}
        block = functools.partial(layers.recomputed(Block, self.remat), **kind)

        def pre_logits(x):
            return nn.LayerNorm(epsilon=self.last_eps, dtype=jnp.float32, name="norm")(layers.mean_of_pixels(x))

        stages = [
            [
                functools.partial(block, width=width, downsample=i > 0 and j == 0, drop_path=next(rates))
                for j in range(depth)
            ]
            for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True))
        ]
        stem = Stem(self.widths[0], self.norm_eps, self.policy, name="stem")
        parts = [stem, *layers.stage_parts(stages, train), pre_logits]
        return layers.run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop)


_PIXELS = Transform(lambda w: w.reshape(-1), lambda w: (w[:, None, None],))  # [D, 1, 1] <-> [D]
# Our path: the keys of timm, Facebook, torchvision and transformers. {s}: the stage from 0; {k}: 2 s, which is the
# place in torchvision's list of the layers before that stage; \1: the block.
_BLOCK = "backbone/stage{n}/block"
_KEYS = {
    "backbone/stem/conv": ("stem.0", "downsample_layers.0.0", "features.0.0", "convnext.embeddings.patch_embeddings"),
    "backbone/stem/norm": ("stem.1", "downsample_layers.0.1", "features.0.1", "convnext.embeddings.layernorm"),
    _BLOCK + "0/downsample/norm": (
        "stages.{s}.downsample.0", "downsample_layers.{s}.0", "features.{k}.0",
        "convnext.encoder.stages.{s}.downsampling_layer.0",
    ),
    _BLOCK + "0/downsample/conv": (
        "stages.{s}.downsample.1", "downsample_layers.{s}.1", "features.{k}.1",
        "convnext.encoder.stages.{s}.downsampling_layer.1",
    ),
    _BLOCK + r"(\d+)/conv": ("{b}.conv_dw", "{b}.dwconv", "{b}.block.0", "{b}.dwconv"),
    _BLOCK + r"(\d+)/norm": ("{b}.norm", "{b}.norm", "{b}.block.2", "{b}.layernorm"),
    _BLOCK + r"(\d+)/fc1": ("{b}.mlp.fc1", "{b}.pwconv1", "{b}.block.3", "{b}.pwconv1"),
    _BLOCK + r"(\d+)/fc2": ("{b}.mlp.fc2", "{b}.pwconv2", "{b}.block.5", "{b}.pwconv2"),
    _BLOCK + r"(\d+)/gamma": ("{b}.gamma", "{b}.gamma", "{b}.layer_scale", "{b}.layer_scale_parameter"),
    "backbone/norm": ("head.norm", "norm", "classifier.0", "convnext.layernorm"),
    "head": ("head.fc", "head", "classifier.2", "classifier"),
}  # fmt: skip
_BLOCKS = (r"stages.{s}.blocks.\1", r"stages.{s}.\1", r"features.{after}.\1", r"convnext.encoder.stages.{s}.layers.\1")


def _layout(column: int, head: str, conv_mlp: bool = False, **more) -> conversion.Layout:
    """The table of a column of _KEYS; conv_mlp: its dense layers are 1x1 convolutions."""
    names = {}
    for pattern, keys in _KEYS.items():
        for s in range(4) if "{n}" in pattern else [0]:
            block = _BLOCKS[column].format(s=s, after=2 * s + 1)
            names[pattern.replace("{n}", str(s + 1))] = keys[column].format(s=s, k=2 * s, b=block)
    if column == 2:
        names |= {path: ((name,), _PIXELS) for path, name in names.items() if path.endswith("gamma")}
    rules = conversion.rules_of(names)
    dense = [rule._replace(transform=POINTWISE) if re.search(r"/fc\d/kernel", rule.target) else rule for rule in rules]
    return conversion.Layout(tuple(dense if conv_mlp else rules), head, **more)


LAYOUTS = {
    "timm": _layout(0, r"head\.fc\..+"),
    "facebook": _layout(1, r"head\..+"),
    "torchvision": _layout(2, r"classifier\.2\..+"),
    "hf": _layout(3, r"classifier\..+", aliases=((r"^(embeddings|encoder|layernorm)\.", r"convnext.\1."),)),
    "native": conversion.NATIVE,
}
CONV_LAYOUTS = {"timm": _layout(0, r"head\.fc\..+", conv_mlp=True), "native": conversion.NATIVE}

# name: depths, widths, timm's crop, torchvision's short side before its crop of 224 (0: it has no such network)
_FIELDS = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320), 0.875, 0),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384), 0.875, 0),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512), 0.875, 0),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640), 0.95, 0),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768), 0.95, 236),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768), 0.95, 230),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024), 0.875, 232),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536), 0.875, 232),
}


def convnext_variants(name: str, module, crop: float, resize: int) -> dict[str, Variant]:
    """A ConvNeXt as timm has it, and from tiny on its flavours: .fb and .hf (crop 0.875), .tv (bilinear)."""
    card = Card(name, 1000, crop=crop)
    if not resize:
        return with_flavours(module, card, CONV_LAYOUTS, {})
    flavours = {
        "facebook": ("fb", {}, card.replace(crop=0.875)),
        "torchvision": ("tv", {}, card.replace(interpolation="bilinear", crop=224 / resize)),
        "hf": ("hf", {"last_eps": 1e-12}, card.replace(crop=0.875)),
    }
    return with_flavours(module, card, LAYOUTS, flavours)


def _all_variants() -> dict[str, Variant]:
    variants = {}
    for size, (depths, widths, crop, resize) in _FIELDS.items():
        module = functools.partial(ConvNeXt, depths=depths, widths=widths)
        variants |= convnext_variants(f"convnext_{size}", module, crop, resize)
    return variants


VARIANTS: dict[str, Variant] = _all_variants()
