"""VGG with 11, 13, 16 or 19 layers (Simonyan and Zisserman 2014, arXiv:1409.1556, table 1), also with BatchNorm."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core.card import Card
from tl_jax.models import conversion, keras, layers
from tl_jax.models.variant import ConvNet, Variant, with_flavours

GRID = 7  # rows and columns of the map that the first dense layer reads: 224 / 2^5


class Block(nn.Module):
    """3x3 convolution (none for width 0), BatchNorm where `norm`, ReLU, 2x2 maximum where `pool`."""

    width: int
    pool: bool
    norm: bool
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.width:
            conv = layers.make_conv(self, "conv", self.width, 3, use_bias=True)
            x = layers.conv_norm(self, conv, layers.batch_norm(self, "norm", train), x) if self.norm else conv(x)
        return nn.relu(layers.max_pool(x, 2, 2, "valid") if self.pool else x)  # the maximum first, as in resnet.py


class Final(nn.Module):
    """The mean on a 7x7 grid and two dense layers with ReLU: [B, H, W, C] -> [B, features], float32."""

    features: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dense = functools.partial(
            layers.Dense, self.features, dtype=self.dtype, kernel_init=nn.initializers.normal(0.01)
        )
        x = mean_on_grid(x, GRID)
        x = nn.relu(dense(name="fc1")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x
        return nn.relu(dense(name="fc2")(x)).astype(jnp.float32)


def mean_on_grid(x: jax.Array, size: int) -> jax.Array:
    """The means over size x size overlapping rectangles, [B, H, W, C] -> [B, size, size, C], as torch's adaptive pool.

    Rectangle i of an axis of n pixels is from floor(i n / size) to ceil((i + 1) n / size), so that a small map is
    enlarged and one of `size` pixels stays as it is.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        if n != size:
            mean = np.zeros((size, n), np.float32)
            for i in range(size):
                first, end = i * n // size, -(-(i + 1) * n // size)
                mean[i, first:end] = 1 / (end - first)
            x = jnp.moveaxis(jnp.tensordot(jnp.asarray(mean, x.dtype), x, (1, axis)), 0, axis)
    return x


class VGG(ConvNet):
    """VGG on images [B, H, W, 3] of 32 pixels or more; see `Model` for what all networks share.

    The cuts: stem, the first convolution; stage1/block0, ..., stage5, each stage behind its pool; pre_logits, the ReLU
    of the second dense layer. stage5 is the map that a head of flatten or pool reads, 7x7x512 for 224 pixels. stage1 of
    VGG-11 is its pool alone. depths, widths: convolutions per stage (the stem is one of the first stage's) and their
    channels. features: of the dense layers; 0 for none, then pre_logits are the mean of the last map. norm: BatchNorm
    behind every convolution. `dropout` acts behind both dense layers (0.5 in the paper). drop_path must be 0. A map
    larger than 7x7 is averaged to 7x7, as in torchvision; timm lets the dense layers slide over it instead.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    features: int = 4096
    norm: bool = False

    @property
    def cuts(self) -> tuple[str, ...]:
        return layers.stage_cuts(_blocks(self.depths))

    @property
    def deterministic_cuts(self) -> tuple[str, ...]:
        return self.cuts[:-1] if self.dropout else self.cuts

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        layers.refuse_drop_path(self)
        block = functools.partial(layers.recomputed(Block, self.remat), norm=self.norm, policy=self.policy)
        stages = [
            [functools.partial(block, width, pool=j == depth - 1) for j in range(depth)]
            for depth, width in zip(_blocks(self.depths), self.widths, strict=True)
        ]
        if self.depths[0] == 1:
            stages[0] = [functools.partial(block, 0, pool=True)]
        final = Final(self.features, self.dropout, self.dtype, name="final")
        parts = [
            lambda x: block(self.widths[0], pool=False, name="stem")(x, train),
            *layers.stage_parts(stages, train),
            lambda x: final(x, train) if self.features else layers.mean_of_pixels(x),
        ]
        return layers.run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop)


def _blocks(depths: Sequence[int]) -> tuple[int, ...]:
    """The blocks of each stage, one less in the first, whose first convolution is the stem."""
    return (max(depths[0] - 1, 1), *depths[1:])


def _places(depths: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """The path of every convolution in order, its stage and its place there, both from 1."""
    for i, depth in enumerate(depths, 1):
        for j in range(1, depth + 1):
            yield ("stem" if i == j == 1 else f"stage{i}/block{j - 1 - (i == 1)}"), i, j


# Our dense kernel [7 * 7 * C, F] reads rows, columns, channels; torch's [F, C * 7 * 7] channels first, timm's is a
# convolution [F, C, 7, 7].
_GRID_CONV = conversion.Transform(
    lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),
    lambda w: (w.reshape(GRID, GRID, -1, w.shape[-1]).transpose(3, 2, 0, 1),),
)
_GRID_DENSE = conversion.Transform(
    lambda w: _GRID_CONV.load(w.reshape(w.shape[0], -1, GRID, GRID)),
    lambda w: (_GRID_CONV.export(w)[0].reshape(w.shape[-1], -1),),
)


def torch_layout(depths: Sequence[int], norm: bool, timm: bool) -> conversion.Layout:
    """torchvision's names, or timm's, whose dense layers are convolutions."""
    rules, number = [], 0
    for path, i, j in _places(depths):
        rules += conversion.conv(f"backbone/{path}/conv", f"features.{number}")
        rules += conversion.norm(f"backbone/{path}/norm", f"features.{number + 1}") if norm else []
        number += (3 if norm else 2) + (j == depths[i - 1])  # the ReLU too, and the pool
    fc1, fc2, head = ("pre_logits.fc1", "pre_logits.fc2", "head.fc") if timm else (f"classifier.{i}" for i in (0, 3, 6))
    rules += conversion.affine("backbone/final/fc1", fc1, _GRID_CONV if timm else _GRID_DENSE)
    rules += conversion.affine("backbone/final/fc2", fc2, conversion.POINTWISE if timm else conversion.DENSE)
    rules += conversion.dense("head", head)
    return conversion.Layout(tuple(rules), rf"{re.escape(head)}\..+", r".*\.num_batches_tracked")


_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
KERAS = (16, 19)  # of which Keras publishes weights


def vgg_variants(name: str, fields: Mapping[str, Any], published: bool) -> dict[str, Variant]:
    """The variant with the card of torchvision and timm, and Keras' flavours where `published`.

    For resizing, Keras' card has the others' 256 pixels. Its files that end in notop lack the dense layers too.
    """
    depths, card = fields["depths"], Card(name, 1000, interpolation="bilinear")
    kinds, flavours = {"timm": True, "torchvision": False}, {}
    layouts = {kind: torch_layout(depths, fields.get("norm", False), timm) for kind, timm in kinds.items()}
    if published:
        places, caffe = tuple(_places(depths)), card.replace(**keras.CAFFE)
        layouts |= {"keras_notop": keras.vgg(places, dense=False), "keras": keras.vgg(places, dense=True)}
        flavours = {"keras_notop": ("keras_notop", {"features": 0}, caffe), "keras": ("keras", {}, caffe)}
    return with_flavours(functools.partial(VGG, **fields), card, {**layouts, "native": conversion.NATIVE}, flavours)


VARIANTS: dict[str, Variant] = {
    key: variant
    for number, depths in _DEPTHS.items()
    for norm in (False, True)
    for key, variant in vgg_variants(
        f"vgg{number}{'_bn' * norm}", {"depths": depths, "norm": norm}, number in KERAS and not norm
    ).items()
}
