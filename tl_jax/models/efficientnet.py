"""EfficientNet (Tan and Le 2019, arXiv:1905.11946), its lite form and v2 (Tan and Le 2021, arXiv:2104.00298): tables of
variants, cards and conversions; the network is in mobile.py."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tl_jax.core.card import Card
from tl_jax.models import keras, mobile
from tl_jax.models.conversion import NATIVE, Layout
from tl_jax.models.mobile import HALF, TF, MobileNet, Row, Stages, divisible
from tl_jax.models.variant import Variant, with_flavours

B0 = (  # table 1 of the paper
    (Row("inverted", 3, 1, 1, 16, 1, True),),
    (Row("inverted", 3, 2, 6, 24, 2, True),),
    (Row("inverted", 5, 2, 6, 40, 2, True),),
    (Row("inverted", 3, 2, 6, 80, 3, True),),
    (Row("inverted", 5, 1, 6, 112, 3, True),),
    (Row("inverted", 5, 2, 6, 192, 4, True),),
    (Row("inverted", 3, 1, 6, 320, 1, True),),
)
# Factors of channels and blocks; input size and crop of TensorFlow's files and of timm's own; input size and short side
# of torchvision's.
B = {
    "b0": (1.0, 1.0, (224, 0.875), (224, 0.875), (224, 256)),
    "b1": (1.0, 1.1, (240, 0.882), (240, 0.9), (240, 256)),
    "b2": (1.1, 1.2, (260, 0.89), (256, 0.875), (288, 288)),
    "b3": (1.2, 1.4, (300, 0.904), (288, 0.875), (300, 320)),
    "b4": (1.4, 1.8, (380, 0.922), (320, 0.875), (380, 384)),
    "b5": (1.6, 2.2, (456, 0.934), (448, 1.0), (456, 456)),
    "b6": (1.8, 2.6, (528, 0.942), (528, 0.942), (528, 528)),
    "b7": (2.0, 3.1, (600, 0.949), (600, 0.949), (600, 600)),
}
SQUASH = {"crop_mode": "squash"}
TIMM = {"b1": HALF, "b5": SQUASH}  # what else is timm's own
KINDS = [("fused", 1, 1), ("fused", 2, 4), ("fused", 2, 4)]  # kind, stride and expansion of the stages of v2
KINDS += [("inverted", 2, 4), ("inverted", 1, 6), ("inverted", 2, 6), ("inverted", 1, 6)]
V2 = {  # channels and blocks of the stages; the input sizes of TensorFlow, timm and torchvision
    "s": (((24, 2), (48, 4), (64, 4), (128, 6), (160, 9), (256, 15)), 300, 288, 384),
    "m": (((24, 3), (48, 5), (80, 5), (160, 7), (176, 14), (304, 18), (512, 5)), 384, 320, 480),
    "l": (((32, 4), (64, 7), (96, 7), (192, 10), (224, 19), (384, 25), (640, 7)), 384, 384, 480),
}


def _layouts(stages: Stages) -> dict[str, Layout]:
    last = len(stages) + 1
    timm = mobile.stem_and_head(("conv_stem", "bn1"), "classifier", ("conv_head", "bn2"))
    final = (f"features.{last}.0", f"features.{last}.1")
    torchvision = mobile.stem_and_head(("features.0.0", "features.0.1"), "classifier.1", final)
    return {
        "timm": mobile.make_layout(stages, timm, mobile.timm_block),
        "torchvision": mobile.make_layout(stages, torchvision, mobile.torchvision_block),
        "native": NATIVE,
    }


def _variants(module: Callable[..., MobileNet], cards: Sequence[Card], own: Mapping[str, Any]) -> dict[str, Variant]:
    """timm's own network, its torchvision flavour with the fields `own`, and TensorFlow's; the cards in this order."""
    timm, torchvision, tf = cards
    stages = module.keywords["stages"]
    layouts = _layouts(stages)
    variants = with_flavours(module, timm, layouts, {"torchvision": ("tv", own, torchvision)})
    tf_layouts = {key: layouts[key] for key in ("timm", "native")}
    if timm.model.startswith("efficientnet_b"):
        tf_layouts["keras"] = keras.efficientnet(mobile.blocks_of(stages))
    return variants | {tf.model: Variant(functools.partial(module, **TF), tf, tf_layouts, {})}


def _b_variants() -> dict[str, Variant]:
    variants = {}
    for name, (width, depth, tf, timm, (size, short)) in B.items():
        stages = mobile.scaled(B0, width, depth)
        fields = {"stem": divisible(32 * width), "final": divisible(1280 * width), "act": "silu"}
        card, big = Card(f"efficientnet_{name}", 1000), name in ("b5", "b6", "b7")
        cards = [
            card.replace(input_size=timm[0], crop=timm[1], **TIMM.get(name, {})),
            card.replace(input_size=size, crop=size / short),
            card.replace(model=f"tf_{card.model}", input_size=tf[0], crop=tf[1]),
        ]
        own = {"norm_eps": 1e-3, "norm_momentum": 0.99} if big else {}
        variants |= _variants(functools.partial(MobileNet, stages=stages, **fields), cards, own)
    return variants


def _v2_variants() -> dict[str, Variant]:
    """Squeeze and excite stands in the blocks that are not fused."""
    variants = {}
    for name, (shape, tf, timm, torchvision) in V2.items():
        rows = [
            (Row(*kind[:1], 3, *kind[1:], *size, kind[0] != "fused"),) for kind, size in zip(KINDS, shape, strict=False)
        ]
        fields = {"stages": tuple(rows), "stem": shape[0][0], "final": 1280, "act": "silu"}
        card, other = Card(f"efficientnetv2_{name}", 1000, crop=1.0), "bicubic" if name == "l" else "bilinear"
        cards = [
            card.replace(input_size=timm),
            card.replace(input_size=torchvision, interpolation=other, **(HALF if name == "l" else {})),
            card.replace(model=f"tf_{card.model}", input_size=tf, **HALF, **({} if name == "s" else SQUASH)),
        ]
        variants |= _variants(functools.partial(MobileNet, **fields), cards, {"norm_eps": 1e-3})
    return variants


_PORT = {1: ("_expand_conv", "_bn0"), 2: ("_depthwise_conv", "_bn1"), 3: ("_project_conv", "_bn2")}


def _port_block(row: Row, i: int, j: int, n: int) -> mobile.Names:
    """EfficientNet-PyTorch's names; it counts the blocks through."""
    names = {}
    for k in row.convs:
        names |= mobile.both(f"{{}}{k}", *(f"_blocks.{n - 1}.{name}" for name in _PORT[k]))
    return names


def _lite_variants() -> dict[str, Variant]:
    """Without squeeze and excite, with ReLU6; the port of the first release has its own names and scale of pixels."""
    stages = tuple(tuple(row._replace(squeeze=False) for row in rows) for rows in B0)
    module = functools.partial(MobileNet, stages=stages, final=1280)
    card = Card("efficientnet_lite0", 1000)
    names = mobile.stem_and_head(("_conv_stem", "_bn0"), "_fc", ("_conv_head", "_bn1"))
    layouts = {key: table for key, table in _layouts(stages).items() if key != "torchvision"}
    variants = {card.model: Variant(module, card, layouts, {})}
    port = card.replace(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    layouts = {**layouts, "port": mobile.make_layout(stages, names, _port_block)}
    tf = card.replace(model=f"tf_{card.model}", **HALF)
    return variants | with_flavours(functools.partial(module, **TF), tf, layouts, {"port": ("port", {}, port)})


VARIANTS: dict[str, Variant] = {**_b_variants(), **_v2_variants(), **_lite_variants()}
