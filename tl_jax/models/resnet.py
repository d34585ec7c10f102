"""ResNet (He et al. 2016, arXiv:1512.03385; v1.5, with the stride in the 3x3 convolution), its CIFAR form, Wide ResNet
(Zagoruyko and Komodakis 2016, arXiv:1605.07146) and ResNeXt (Xie et al. 2017, arXiv:1611.05431)."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import conversion, keras, layers
from tl_jax.models.variant import ConvNet, Variant, with_flavours


class Block(nn.Module):
    """Residual block, basic (3x3, 3x3) or bottleneck (1x1, grouped 3x3, 1x1 to four times the width)."""

    width: int
    stride: int
    drop_path: float
    bottleneck: bool
    groups: int
    base_width: int
    cifar: bool
    stride_first: bool
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        inner = self.width * self.base_width // 64 * self.groups
        strides = (self.stride, 1) if self.stride_first else (1, self.stride)
        convs = [(inner, 1, strides[0], 1), (inner, 3, strides[1], self.groups), (4 * self.width, 1, 1, 1)]
        if not self.bottleneck:
            convs = [(self.width, 3, self.stride, 1), (self.width, 3, 1, 1)]
        shortcut = self.shortcut_of(x, convs[-1][0], train)
        dropped = train and self.drop_path > 0  # then something stands between the last norm and the sum
        y = x
        for i, (features, size, stride, groups) in enumerate(convs, start=1):
            last = i == len(convs)
            conv = layers.make_conv(self, f"conv{i}", features, size, stride, groups)
            # The last scale starts at zero: every block starts as the identity (Goyal et al. 2017, section 5.1).
            norm = layers.batch_norm(self, f"norm{i}", train, nn.initializers.zeros if last else nn.initializers.ones)
            added = shortcut if last and not dropped else None
            y = layers.conv_norm(self, conv, norm, y, added, "" if last and dropped else "relu")
        return nn.relu(shortcut + layers.DropPath(self.drop_path)(y, train)) if dropped else y

    def shortcut_of(self, x: jax.Array, features: int, train: bool) -> jax.Array:
        if self.stride == 1 and x.shape[-1] == features:
            return x
        if self.cifar:  # option A: every second pixel, zero channels added on both sides
            more = features - x.shape[-1]
            return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0),) * 3 + ((more // 2, more - more // 2),))
        return layers.ConvNorm(features, 1, self.stride, self.policy, name="shortcut")(x, train)


class ResNet(ConvNet):
    """Residual network on images [B, H, W, 3] of any size; see `Model` for what all networks share.

    The cuts: stem, stage1/block0, ..., stage1 (its last block), stage2/block0, ... [B, h, w, C], pre_logits [B, D].
    depths, widths: blocks and base channels per stage. groups and base_width make ResNeXt and Wide ResNet. cifar: 3x3
    stem without pooling and parameter-free (option A) shortcuts, He et al. 2016, section 4.2. stride_first: bottlenecks
    have the stride in the first convolution, as in the paper, not in the second.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = False
    groups: int = 1
    base_width: int = 64
    cifar: bool = False
    stride_first: bool = False

    @property
    def cuts(self) -> tuple[str, ...]:
        return layers.stage_cuts(self.depths)

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        own = ("bottleneck", "groups", "base_width", "cifar", "stride_first", "policy")
        kind = {name: getattr(self, name) for name in own}
        block = functools.partial(layers.recomputed(Block, self.remat), **kind)
        rates = iter(layers.drop_path_rates(self.drop_path, sum(self.depths)))

        def stem(x):
            size, stride = (3, 1) if self.cifar else (7, 2)
            x = layers.ConvNorm(self.widths[0], size, stride, self.policy, name="stem")(x, train)
            return nn.relu(x if self.cifar else layers.max_pool(x))  # the maximum first leaves a quarter of the pixels

        stages = [
            [
                functools.partial(block, width=width, stride=2 if i and j == 0 else 1, drop_path=next(rates))
                for j in range(depth)
            ]
            for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=False))
        ]
        parts = [stem, *layers.stage_parts(stages, train), layers.mean_of_pixels]
        return layers.run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop)


_BLOCK, _COUNTERS = r"backbone/stage(\d)/block(\d+)", r".*\.num_batches_tracked"
_TIMM = {  # torchvision uses the same names
    "backbone/stem/conv": "conv1",
    "backbone/stem/norm": "bn1",
    rf"{_BLOCK}/conv(\d)": r"layer\1.\2.conv\3",
    rf"{_BLOCK}/norm(\d)": r"layer\1.\2.bn\3",
    rf"{_BLOCK}/shortcut/conv": r"layer\1.\2.downsample.0",
    rf"{_BLOCK}/shortcut/norm": r"layer\1.\2.downsample.1",
}
TIMM = conversion.Layout(tuple(conversion.rules_of({**_TIMM, "head": "fc"})), r"fc\..+", _COUNTERS)
# The names of akamaster's pytorch_resnet_cifar10; option A leaves no shortcut to convert.
CIFAR = conversion.Layout(tuple(conversion.rules_of({**_TIMM, "head": "linear"})), r"linear\..+", _COUNTERS)


def _hf_layout() -> conversion.Layout:
    """ResNetForImageClassification counts stages and convolutions from 0; a bare ResNetModel has no prefix."""
    places = {"backbone/stem/{}": "resnet.embedder.embedder"}
    for stage in range(4):
        block, source = rf"backbone/stage{stage + 1}/block(\d+)", rf"resnet.encoder.stages.{stage}.layers.\1"
        places |= {f"{block}/shortcut/{{}}": f"{source}.shortcut"}
        places |= {f"{block}/{{}}{i + 1}": f"{source}.layer.{i}" for i in range(3)}
    names = {path.format("conv"): f"{source}.convolution" for path, source in places.items()} | {"head": "classifier.1"}
    names |= {path.format("norm"): f"{source}.normalization" for path, source in places.items()}
    aliases = ((r"^(embedder|encoder)\.", r"resnet.\1."),)
    return conversion.Layout(tuple(conversion.rules_of(names)), r"classifier\..+", _COUNTERS, aliases)


LAYOUTS = {"timm": TIMM, "hf": _hf_layout(), "native": conversion.NATIVE}
TO_STAGE3 = {"timm": TIMM._replace(ignore=rf"layer4\..+|{_COUNTERS}"), "native": conversion.NATIVE}
CIFAR_LAYOUTS = {"cifar": CIFAR, "native": conversion.NATIVE}

_FIELDS = {
    "resnet18": {"depths": (2, 2, 2, 2)},
    "resnet34": {"depths": (3, 4, 6, 3)},
    "resnet50": {"depths": (3, 4, 6, 3), "bottleneck": True},
    "resnet101": {"depths": (3, 4, 23, 3), "bottleneck": True},
    "resnet152": {"depths": (3, 8, 36, 3), "bottleneck": True},
    "wide_resnet50_2": {"depths": (3, 4, 6, 3), "bottleneck": True, "base_width": 128},
    "resnext50_32x4d": {"depths": (3, 4, 6, 3), "bottleneck": True, "groups": 32, "base_width": 4},
}


def _all_variants() -> dict[str, Variant]:
    """All with torchvision's first preprocessing; transformers has the plain ones, with bicubic resizing.

    NAME.stage3 ends there, with a head on the mean of 256 or 1024 channels; what a file has of layer4 is not read.
    """
    variants = {}
    for name, fields in _FIELDS.items():
        plain, card = re.fullmatch(r"resnet\d+", name), Card(name, 1000, interpolation="bilinear")
        layouts = LAYOUTS if plain else {key: LAYOUTS[key] for key in ("timm", "native")}
        flavours = {"hf": ("hf", {}, card.replace(interpolation="bicubic"))} if plain else {}
        if plain and "bottleneck" in fields:
            layouts = {**layouts, "keras": keras.resnet(fields["depths"])}
            own = {"stride_first": True, "norm_eps": 1.001e-5, "norm_momentum": 0.99}
            flavours["keras"] = ("keras", own, card.replace(**keras.CAFFE))
        variants |= with_flavours(functools.partial(ResNet, **fields), card, layouts, flavours)
        if name in ("resnet18", "resnet34", "resnet50"):
            short = functools.partial(ResNet, **{**fields, "depths": fields["depths"][:3]})
            variants[f"{name}.stage3"] = Variant(short, card.replace(model=f"{name}.stage3"), TO_STAGE3, {})
    for n in (1, 2, 3, 5, 7, 9):
        card = Card(f"resnet{6 * n + 2}_cifar", 10, input_size=32, crop=1.0)
        module = functools.partial(ResNet, depths=(n, n, n), widths=(16, 32, 64), cifar=True)
        variants[card.model] = Variant(module, card, CIFAR_LAYOUTS, {})
    return variants


VARIANTS: dict[str, Variant] = _all_variants()
