"""From a decoded image to the network's input pixels: checked augmentations, then the card's resize and crop."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from tl_jax.core import checks
from tl_jax.core.card import Card, Form, sides
from tl_jax.data.image import decode, ops

SIZING = ("random_resized_crop", "random_crop")


class Preprocess(NamedTuple):
    """`preprocess(image, rng)` makes [*input_size, C] of an image [H, W, C] or a Pillow image, of the type of `form`.

    The augmentations `ops`, (name, parameters) pairs, come first. The card's resize and centre crop follow, unless
    one of the `SIZING` ops has already cut the image to the input size. Normalisation is left to the device.
    """

    ops: tuple[tuple[str, dict], ...]
    input_size: tuple[int, int]
    resize_size: tuple[int, int]
    interpolation: str
    crop_mode: str
    fill: tuple[float, ...]
    form: Form

    def __call__(self, image: np.ndarray | Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
        for name, parameters in self.ops:
            image = ops.OPS[name](image if name in ops.PILLOW else np.asarray(image), rng, **parameters)
        if decode.shape_of(image) == self.input_size and any(name in SIZING for name, _ in self.ops):
            return image
        how = {"interpolation": self.interpolation, "crop_mode": self.crop_mode}
        return ops.centre_crop(ops.resize(image, size=self.resize_size, **how), self.input_size, self.fill)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.input_size, self.form.channels)

    def keeps(self, height: int, width: int) -> bool:
        """Whether images of this size stay as they are."""
        same = ops.resized(height, width, self.resize_size, self.crop_mode) == (height, width) == self.input_size
        return same and not self.ops

    @property
    def short_side(self) -> int:
        """The short side below which every image is enlarged."""
        return min(self.resize_size) if self.crop_mode != "border" else 1


def make_preprocess(card: Card, augment: Sequence[tuple[str, Mapping]] = ()) -> Preprocess:
    """The preprocessing of a card, with augmentations, whose sizes and interpolation default to the card's.

    Raises one ValueError that lists every unknown op, unknown parameter, value out of range, and op that is not defined
    for the card's pixels.
    """
    if card.interpolation not in ops.RESAMPLE:
        raise ValueError(f"the card's interpolation {card.interpolation!r} is none of {', '.join(ops.RESAMPLE)}")
    problems = [checks.pairs_problems("augmentation", [pair], ops.OPS) for pair in augment]
    checks.refuse("invalid augmentations", itertools.chain(*problems))
    alien = ops.BYTES if card.pixels != "uint8" else ops.COLOURS if card.form.channels != 3 else ()
    wrong = [f"{name}: defined for 8 bits{' of RGB' * (name in ops.COLOURS)}" for name, _ in augment if name in alien]
    checks.refuse(f"augmentations that do not exist for {card.form}; leave them out", wrong)
    resize_size = tuple(math.floor(side / card.crop) for side in sides(card.input_size))
    filled = []
    own = {"interpolation": card.interpolation} | ({"crop_mode": card.crop_mode} if card.crop_mode != "center" else {})
    for name, parameters in augment:
        size = resize_size if name == "resize" else sides(card.input_size)
        given = {"size": size[0] if size[0] == size[1] else size, **own, **parameters}
        filled.append((name, {key: given[key] for key in given if key in checks.parameters(ops.OPS[name])}))
    levels = [mean * card.divisor for mean in card.mean]
    fill = tuple(round(level) if card.pixels == "uint8" else level for level in levels)
    how = card.interpolation, card.crop_mode, fill if card.crop_mode == "border" else (0,), card.form
    return Preprocess(tuple(filled), sides(card.input_size), resize_size, *how)
