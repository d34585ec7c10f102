"""Inception-v3 (Szegedy et al. 2016, arXiv:1512.00567)."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import conversion, keras, layers
from tl_jax.models.variant import ConvNet, Variant

AUX_SIDE = 17  # pixels of the smallest map that the auxiliary head can read; 299 pixels give it


class Layer(NamedTuple):
    """One ConvNorm of a branch, under torchvision's name; stride 2 goes without padding."""

    name: str
    features: int
    size: int | tuple[int, int]
    stride: int = 1


def _chain(name: str, *sizes: tuple) -> tuple[Layer, ...]:
    """Layers in a row, each (features, size) or (features, size, stride); several are numbered from 1."""
    return tuple(Layer(f"{name}_{i}" if len(sizes) > 1 else name, *size) for i, size in enumerate(sizes, 1))


def _fork(name: str) -> tuple[Layer, Layer]:
    """Two layers that read the same input, one along rows and one along columns."""
    return Layer(f"{name}a", 384, (1, 3)), Layer(f"{name}b", 384, (3, 1))


# A branch: what comes first, "mean" or "max" for a pool; layers in a row; those of the fork at the end.
Branch = tuple[str, tuple[Layer, ...], tuple[Layer, ...]]


def _branch(*chain: Layer, pool: str = "", fork: tuple[Layer, ...] = ()) -> Branch:
    return pool, chain, fork


def _five(pool: int) -> tuple[Branch, ...]:
    """The blocks of 35x35 pixels."""
    return (
        _branch(*_chain("branch1x1", (64, 1))),
        _branch(*_chain("branch5x5", (48, 1), (64, 5))),
        _branch(*_chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))),
        _branch(*_chain("branch_pool", (pool, 1)), pool="mean"),
    )


def _seven(width: int) -> tuple[Branch, ...]:
    """The blocks of 17x17 pixels, with 7x7 convolutions in two parts."""
    row, column = (width, (1, 7)), (width, (7, 1))
    return (
        _branch(*_chain("branch1x1", (192, 1))),
        _branch(*_chain("branch7x7", (width, 1), row, (192, (7, 1)))),
        _branch(*_chain("branch7x7dbl", (width, 1), column, row, column, (192, (1, 7)))),
        _branch(*_chain("branch_pool", (192, 1)), pool="mean"),
    )


_EIGHT = (  # the blocks of 8x8 pixels
    _branch(*_chain("branch1x1", (320, 1))),
    _branch(Layer("branch3x3_1", 384, 1), fork=_fork("branch3x3_2")),
    _branch(Layer("branch3x3dbl_1", 448, 1), Layer("branch3x3dbl_2", 384, 3), fork=_fork("branch3x3dbl_3")),
    _branch(*_chain("branch_pool", (192, 1)), pool="mean"),
)
_TO_17 = (
    _branch(*_chain("branch3x3", (384, 3, 2))),
    _branch(*_chain("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2))),
    _branch(pool="max"),
)
_TO_8 = (
    _branch(*_chain("branch3x3", (192, 1), (320, 3, 2))),
    _branch(*_chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2))),
    _branch(pool="max"),
)
STAGES = (
    {"Mixed_5b": _five(32), "Mixed_5c": _five(64), "Mixed_5d": _five(64)},
    {
        "Mixed_6a": _TO_17,
        "Mixed_6b": _seven(128),
        "Mixed_6c": _seven(160),
        "Mixed_6d": _seven(160),
        "Mixed_6e": _seven(192),
    },
    {"Mixed_7a": _TO_8, "Mixed_7b": _EIGHT, "Mixed_7c": _EIGHT},
)


class Block(nn.Module):
    """Branches side by side: [B, H, W, C] -> [B, H', W', the sum of their channels]."""

    branches: tuple[Branch, ...]
    count_zeros: bool
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        pools = {
            "": lambda x: x,
            "mean": lambda x: layers.mean_pool(x, 3, 1, count_zeros=self.count_zeros),
            "max": lambda x: layers.max_pool(x, 3, 2, "valid"),
        }
        out = []
        for pool, chain, fork in self.branches:
            y = pools[pool](x)
            for layer in chain:
                y = self.run(layer, y, train)
            out += [self.run(layer, y, train) for layer in fork] or [y]
        return jnp.concatenate(out, axis=-1)

    def run(self, layer: Layer, x: jax.Array, train: bool) -> jax.Array:
        name, features, size, stride = layer
        padding = "valid" if stride == 2 else "half"
        return layers.ConvNorm(features, size, stride, self.policy, "relu", padding=padding, name=name)(x, train)


class Stem(nn.Module):
    """Five convolutions and two maxima: [B, 299, 299, 3] -> [B, 35, 35, 192]."""

    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = layers.make_conv(self, "conv", 32, 3, 2, padding="valid")
        x = layers.conv_norm(self, conv, layers.batch_norm(self, "norm", train), x, act="relu")
        make = functools.partial(layers.ConvNorm, stride=1, policy=self.policy, act="relu")
        x = make(32, 3, padding="valid", name="layer2")(x, train)
        x = layers.max_pool(make(64, 3, padding="half", name="layer3")(x, train), 3, 2, "valid")
        x = make(80, 1, name="layer4")(x, train)
        return layers.max_pool(make(192, 3, padding="valid", name="layer5")(x, train), 3, 2, "valid")


class Aux(nn.Module):
    """The auxiliary head on the last map of stage2: [B, H, W, 768] -> logits [B, classes], float32."""

    classes: int
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        make = functools.partial(layers.ConvNorm, stride=1, policy=self.policy, act="relu", padding="valid")
        x = make(128, 1, name="layer1")(layers.mean_pool(x, 5, 3, "valid"), train)
        x = layers.mean_of_pixels(make(768, 5, name="layer2")(x, train))
        return nn.Dense(self.classes, name="dense")(x)


class Inception(ConvNet):
    """Inception-v3 on images [B, H, W, 3] of 75 pixels or more; see `Model` for what all networks share.

    The cuts: stem, stage1/block0, ..., stage1, stage2/block0, ..., stage3 [B, h, w, 2048], pre_logits; a stage begins
    with the block that halves the resolution. count_zeros: the means of 3x3 pixels count the zeros of the border, as in
    torch, not in TensorFlow. drop_path must be 0.

    aux: the classes of the auxiliary head, 0 for none. It is kept as it was published, backbone/final, so that
    files go in and out whole: its logits are out["aux_logits"] where stage2 was run or given and has 17x17 pixels or
    more, no loss reads them, and a new head does not replace it.
    """

    norm_eps: float = 1e-3
    aux: int = 0
    count_zeros: bool = True

    @property
    def cuts(self) -> tuple[str, ...]:
        return layers.stage_cuts([len(stage) for stage in STAGES])

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        layers.refuse_drop_path(self)
        block, policy = layers.recomputed(Block, self.remat), self.policy
        block = functools.partial(block, count_zeros=self.count_zeros, policy=policy)
        stages = [[functools.partial(block, branches) for branches in stage.values()] for stage in STAGES]
        parts = [
            lambda x: Stem(policy, name="stem")(x, train),
            *layers.stage_parts(stages, train),
            layers.mean_of_pixels,
        ]
        y, out = layers.run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop)
        read = x if start == "stage2" else out.get("stage2")
        if self.is_initializing():  # of any size
            read = jnp.zeros((1, AUX_SIDE, AUX_SIDE, 768))
        if self.aux and read is not None and min(read.shape[1:3]) >= AUX_SIDE:
            out = {**out, "aux_logits": Aux(self.aux, policy, name="final")(read, train)}
        return y, out


def _layout() -> conversion.Layout:
    """torchvision's names, which are timm's; a network without the auxiliary head drops its keys, which are named."""
    names = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
    places = [(f"backbone/stem{f'/layer{i}' if i > 1 else ''}", f"Conv2d_{name}") for i, name in enumerate(names, 1)]
    for i, stage in enumerate(STAGES, 1):
        places += [(rf"backbone/stage{i}/block{j}/(branch\w+)", rf"{name}.\1") for j, name in enumerate(stage)]
    places += [(rf"backbone/final/layer{i + 1}", f"AuxLogits.conv{i}") for i in range(2)]
    names = {f"{path}/conv": f"{source}.conv" for path, source in places}
    names |= {f"{path}/norm": f"{source}.bn" for path, source in places}
    names |= {"head": "fc", "backbone/final/dense": "AuxLogits.fc"}
    return conversion.Layout(tuple(conversion.rules_of(names)), r"fc\..+", r"AuxLogits\..+|.*\.num_batches_tracked")


def _keras_layout() -> conversion.Layout:
    blocks = [[(f"backbone/stem{f'/layer{i}' if i > 1 else ''}", 0)] for i in range(1, 6)]
    for i, stage in enumerate(STAGES, 1):
        for j, branches in enumerate(stage.values()):
            path, block = f"backbone/stage{i}/block{j}", []
            for _, chain, fork in branches:  # a fork ends in a layer that joins its two
                rest = range(3 * (len(chain) - 1) + (4 if fork else 0), -1, -3)
                block += [(f"{path}/{layer.name}", behind) for layer, behind in zip(chain, rest, strict=False)]
                block += [(f"{path}/{layer.name}", 1) for layer in fork]
            blocks.append(block)
    return keras.inception(blocks)


LAYOUTS = {"timm": _layout(), "native": conversion.NATIVE}


def _all_variants() -> dict[str, Variant]:
    """inception_v3, and by other names the same with the auxiliary head, and with means and deviations of ImageNet.

    torchvision's weights expect ((x / 255) - 0.5) / 0.5: its transform_input makes that of an input with means and
    deviations of ImageNet, and the card says it at once. So do the weights of TensorFlow, those of Gluon do not.
    """
    card = Card("inception_v3", 1000, 299, (0.5,) * 3, (0.5,) * 3, "bilinear", 299 / 342)
    imagenet = Card("inception_v3.gluon", 1000, 299, interpolation="bicubic")
    cards = {card: {}, card.replace(model="inception_v3.aux"): {"aux": 1000}, imagenet: {}}
    variants = {
        its.model: Variant(functools.partial(Inception, **fields), its, LAYOUTS, {}) for its, fields in cards.items()
    }
    # timm's names would lack the scales, which Keras' network has not.
    layouts, own = {"native": conversion.NATIVE, "keras": _keras_layout()}, {"norm_scale": False, "count_zeros": False}
    module, its = functools.partial(Inception, norm_momentum=0.99, **own), card.replace(model="inception_v3.keras")
    plain = variants[card.model]
    plain = plain._replace(layouts={**LAYOUTS, "keras": layouts["keras"]}, flavours={"keras": its.model})
    return {**variants, card.model: plain, its.model: Variant(module, its, layouts, {})}


VARIANTS: dict[str, Variant] = _all_variants()
