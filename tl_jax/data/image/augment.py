"""From a decoded image to the network's input pixels: checked augmentations, then the card's resize and crop."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from tl_jax.core import checks
from tl_jax.core.card import Card
from tl_jax.data.image import ops

SIZING = ("random_resized_crop", "random_crop")


class Preprocess(NamedTuple):
    """`preprocess(image, rng)` makes uint8 [input_size, input_size, 3] of uint8 RGB [H, W, 3] or a Pillow image.

    The augmentations `ops`, (name, parameters) pairs, come first. The card's resize and centre crop follow, unless
    one of the `SIZING` ops has already cut the image to the input size. Normalisation is left to the device.
    """

    ops: tuple[tuple[str, dict], ...]
    input_size: int
    resize_size: int
    interpolation: str

    def __call__(self, image: np.ndarray | Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
        for name, parameters in self.ops:
            image = ops.OPS[name](image if name in ops.PILLOW else np.asarray(image), rng, **parameters)
        if ops.shape_of(image) == (self.input_size, self.input_size) and any(name in SIZING for name, _ in self.ops):
            return image
        image = ops.resize(image, size=self.resize_size, interpolation=self.interpolation)
        return ops.centre_crop(image, self.input_size)


def make_preprocess(card: Card, augment: Sequence[tuple[str, Mapping]] = ()) -> Preprocess:
    """The preprocessing of a card, with augmentations, whose `size` and `interpolation` default to the card's.

    Raises one ValueError that lists every unknown op, unknown parameter and value out of range.
    """
    if card.interpolation not in ops.RESAMPLE:
        raise ValueError(f"the card's interpolation {card.interpolation!r} is none of {', '.join(ops.RESAMPLE)}")
    problems = [checks.pairs_problems("augmentation", [pair], ops.OPS) for pair in augment]
    checks.refuse("invalid augmentations", itertools.chain(*problems))
    if not isinstance(card.input_size, int):
        raise ValueError(
            f"the card's input_size {card.input_size} is no square, and files are prepared as squares alone"
        )
    resize_size = math.floor(card.input_size / card.crop)
    filled = []
    for name, parameters in augment:
        size = resize_size if name == "resize" else card.input_size
        given = {"size": size, "interpolation": card.interpolation, **parameters}
        filled.append((name, {key: given[key] for key in given if key in checks.parameters(ops.OPS[name])}))
    return Preprocess(tuple(filled), card.input_size, resize_size, card.interpolation)
