"""MobileNet v1 (Howard et al. 2017, arXiv:1704.04861), v2 (Sandler et al. 2018, arXiv:1801.04381) and v3 (Howard et al.
2019, arXiv:1905.02244): tables of variants, cards and conversions; the network is in mobile.py."""

import functools

from tl_jax.core.card import Card
from tl_jax.models import keras, mobile
from tl_jax.models.conversion import NATIVE
from tl_jax.models.mobile import HALF, TF, MobileNet, Row, Stages, divisible
from tl_jax.models.variant import Variant, with_flavours

V1 = (
    (Row("separable", 3, 1, 1, 64),),
    (Row("separable", 3, 2, 1, 128, 2),),
    (Row("separable", 3, 2, 1, 256, 2),),
    (Row("separable", 3, 2, 1, 512, 6),),
    (Row("separable", 3, 2, 1, 1024, 2),),
)
V2 = (  # table 2 of the paper
    (Row("inverted", 3, 1, 1, 16),),
    (Row("inverted", 3, 2, 6, 24, 2),),
    (Row("inverted", 3, 2, 6, 32, 3),),
    (Row("inverted", 3, 2, 6, 64, 4),),
    (Row("inverted", 3, 1, 6, 96, 3),),
    (Row("inverted", 3, 2, 6, 160, 3),),
    (Row("inverted", 3, 1, 6, 320),),
)
V3 = {  # tables 1 and 2 of the paper
    "large": (
        (Row("inverted", 3, 1, 1, 16, act="relu"),),
        (Row("inverted", 3, 2, 4, 24, act="relu"), Row("inverted", 3, 1, 3, 24, act="relu")),
        (Row("inverted", 5, 2, 3, 40, 3, True, "relu"),),
        (Row("inverted", 3, 2, 6, 80), Row("inverted", 3, 1, 2.5, 80), Row("inverted", 3, 1, 2.3, 80, 2)),
        (Row("inverted", 3, 1, 6, 112, 2, True),),
        (Row("inverted", 5, 2, 6, 160, 3, True),),
    ),
    "small": (
        (Row("inverted", 3, 2, 1, 16, 1, True, "relu"),),
        (Row("inverted", 3, 2, 4.5, 24, act="relu"), Row("inverted", 3, 1, 3.67, 24, act="relu")),
        (Row("inverted", 5, 2, 4, 40, 1, True), Row("inverted", 5, 1, 6, 40, 2, True)),
        (Row("inverted", 5, 1, 3, 48, 2, True),),
        (Row("inverted", 5, 2, 6, 96, 3, True),),
    ),
}
V3_LAST = {"large": (960, 1280), "small": (576, 1024)}  # channels of the last convolution, values of the dense layer


def _timm(stages: Stages, *final: str, dense: bool = True):
    others = mobile.stem_and_head(("conv_stem", "bn1"), "classifier", final)
    return mobile.make_layout(stages, others, mobile.timm_block, dense)


def _v2_block(row: Row, i: int, j: int, n: int) -> mobile.Names:
    """torchvision's v2 counts the blocks through; the projection and its norm stand alone in the sequence."""
    names, last = {}, len(row.convs) - 1
    for place, k in enumerate(row.convs):
        own = f"features.{n}.conv.{place}"
        end = (own, f"features.{n}.conv.{place + 1}") if place == last else (f"{own}.0", f"{own}.1")
        names |= mobile.both(f"{{}}{k}", *end)
    return names


def _torchvision(stages: Stages, v3: bool):
    last = 1 + sum(row.repeats for rows in stages for row in rows)
    final = (f"features.{last}.0", f"features.{last}.1", *(["classifier.0"] if v3 else []))
    others = mobile.stem_and_head(("features.0.0", "features.0.1"), "classifier.3" if v3 else "classifier.1", final)
    block = functools.partial(mobile.torchvision_block, prefix="features.{n}.block") if v3 else _v2_block
    return mobile.make_layout(stages, others, block)


def _v1_variants() -> dict[str, Variant]:
    variants = {}
    for percent in (25, 50, 75, 100, 125):
        stages = mobile.scaled(V1, percent / 100)
        module = functools.partial(MobileNet, stages=stages, stem=divisible(32 * percent / 100))
        card = Card(f"mobilenetv1_{percent:03}", 1000, crop=0.9 if percent == 125 else 0.875, **HALF)
        layouts, flavours = {"timm": _timm(stages), "native": NATIVE}, {}
        if percent <= 100:
            layouts["keras"] = keras.mobilenet_v1(list(mobile.blocks_of(stages)))
            flavours["keras"] = ("keras", {**TF, "even": True, "norm_momentum": 0.99}, card)
        variants |= with_flavours(module, card, layouts, flavours)
    return variants


def _v2_variants() -> dict[str, Variant]:
    variants = {}
    for name, depth in {"035": 1, "050": 1, "075": 1, "100": 1, "110d": 1.2, "120d": 1.4, "140": 1}.items():
        deep, width = name.endswith("d"), int(name[:3]) / 100
        stages = mobile.scaled(V2, width, depth, ends=False)
        stem, final = (32, 1280) if deep else (divisible(32 * width), max(1280, divisible(1280 * width)))
        module = functools.partial(MobileNet, stages=stages, stem=stem, final=final)
        card = Card(f"mobilenetv2_{name}", 1000)
        layouts, flavours = {"timm": _timm(stages, "conv_head", "bn2"), "native": NATIVE}, {}
        if name == "100":
            layouts["torchvision"] = _torchvision(stages, v3=False)
            flavours["torchvision"] = ("tv", {}, card.replace(interpolation="bilinear"))
        if not deep:
            layouts["keras"] = keras.mobilenet_v2({path: row for path, (*_, row) in mobile.blocks_of(stages).items()})
            flavours["keras"] = ("keras", {**TF, "norm_momentum": 0.999}, card.replace(**HALF))
        variants |= with_flavours(module, card, layouts, flavours)
    return variants


def _v3_variants() -> dict[str, Variant]:
    """timm's own networks have torch's epsilon, those of torchvision and TensorFlow the paper's 1e-3."""
    variants = {}
    for kind, percent in (("large", 75), ("large", 100), ("small", 50), ("small", 75), ("small", 100)):
        width, (final, dense) = percent / 100, V3_LAST[kind]
        stages = mobile.scaled(V3[kind], width)
        fields = {"final": divisible(final * width), "dense": dense, "act": "hard_swish", "hard": True}
        stem = divisible(16 * width) if percent >= 75 else 16
        module = functools.partial(MobileNet, stages=stages, stem=stem, **fields)
        name, last = f"mobilenetv3_{kind}_{percent:03}", f"blocks.{len(stages)}.0"
        timm = {"timm": _timm(stages, f"{last}.conv", f"{last}.bn1", "conv_head", dense=False), "native": NATIVE}
        card = Card(name, 1000, interpolation="bilinear" if (kind, percent) == ("large", 75) else "bicubic")
        layouts, flavours = dict(timm), {}
        if percent == 100:
            layouts["torchvision"] = _torchvision(stages, v3=True)
            own = {"norm_eps": 1e-3, "norm_momentum": 0.99}
            flavours["torchvision"] = ("tv", own, card.replace(interpolation="bilinear"))
        variants |= with_flavours(module, card, layouts, flavours)
        if percent >= 75:
            tf = functools.partial(module, **TF)
            card = Card(f"tf_{name}", 1000, interpolation="bilinear", **HALF)
            rows = {path: row for path, (*_, row) in mobile.blocks_of(stages).items()}
            variants[card.model] = Variant(tf, card, {**timm, "keras": keras.mobilenet_v3(rows)}, {})
    return variants


VARIANTS: dict[str, Variant] = {**_v1_variants(), **_v2_variants(), **_v3_variants()}
