"""From a decoded image to the network's input pixels: checked augmentations, then the card's resize and crop."""

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
from PIL import Image

from tl_jax.core.card import Card
from tl_jax.data.image import ops


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
            image = image if name in ops.PILLOW else np.asarray(image)
            image = ops.OPS[name](image, rng, **parameters)
        cut = ops.shape_of(image) == (self.input_size, self.input_size) and any(name in SIZING for name, _ in self.ops)
        if cut:
            return image
        image = ops.resize(image, size=self.resize_size, interpolation=self.interpolation)
        return ops.centre_crop(image, self.input_size)


SIZING = ("random_resized_crop", "random_crop")


def make_preprocess(card: Card, augment: Sequence[tuple[str, Mapping]] = ()) -> Preprocess:
    """Builds the preprocessing of a card, with augmentations for training.

    `size` and `interpolation` of an augmentation default to the card's. Raises ValueError that lists every unknown op,
    unknown parameter and value out of range at once.
    """
    if card.interpolation not in ops.RESAMPLE:
        raise ValueError(f"the card's interpolation {card.interpolation!r} is none of {', '.join(ops.RESAMPLE)}")
    if problems := [problem for pair in augment for problem in _problems(pair)]:
        raise ValueError("augmentations that cannot be used:\n  " + "\n  ".join(problems))
    resize_size = math.floor(card.input_size / card.crop)
    filled = []
    for name, parameters in augment:
        defaults = {
            "size": resize_size if name == "resize" else card.input_size,
            "interpolation": card.interpolation,
        }
        wanted = {key: value for key, value in defaults.items() if key in parameters_of(name)}
        filled.append((name, wanted | dict(parameters)))
    return Preprocess(tuple(filled), card.input_size, resize_size, card.interpolation)


def parameters_of(name: str) -> list[str]:
    """The parameters an op takes."""
    return [p for p in inspect.signature(ops.OPS[name]).parameters if p not in ("image", "rng")]


def _problems(pair: Sequence) -> list[str]:
    """What is wrong with one (name, parameters) pair."""
    if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[1], Mapping):
        return [f"{pair!r}: expected a pair of name and parameters, such as ('flip', {{}})"]
    name, parameters = pair
    if name not in ops.OPS:
        near = difflib.get_close_matches(str(name), ops.OPS, n=1)
        return [f"{name!r} is no augmentation{_mean(near)}; there are {', '.join(ops.OPS)}"]
    problems, known = [], parameters_of(name)
    for key, value in parameters.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(f"{name} has no parameter {key!r}{_mean(near)}; it has {', '.join(known) or 'none'}")
        elif expected := _expected(key, value):
            problems.append(f"{name}.{key} is {value!r}; expected {expected}")
    return problems


def _mean(near: list[str]) -> str:
    return f", did you mean {near[0]!r}?" if near else ""


def _expected(key: str, value: object) -> str:
    """What a parameter must be, if the value is not that; "" for a good value."""
    if key == "interpolation":
        return "" if value in ops.RESAMPLE else f"one of {', '.join(ops.RESAMPLE)}"
    if key in INTEGERS:
        low, high = INTEGERS[key]
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return "" if good else f"an integer from {low} to {high:,}"
    if key in PAIRS:
        high = 1 if key == "scale" else math.inf
        good = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, Real) for v in value)
        good = good and 0 < value[0] <= value[1] <= high
        return "" if good else f"a pair (low, high) with 0 < low <= high{' <= 1' if key == 'scale' else ''}"
    low, high = NUMBERS[key]
    good = isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high
    return "" if good else f"a number from {low} to {high}"


INTEGERS = {"size": (1, 16_384), "padding": (0, 16_384), "fill": (0, 255), "layers": (0, 100), "magnitude": (0, 30)}
PAIRS = ("scale", "ratio", "factor")
NUMBERS = {
    "probability": (0, 1),
    "degrees": (0, 180),
    "fraction": (0, 1),
    "brightness": (0, 100),
    "contrast": (0, 100),
    "saturation": (0, 100),
    "hue": (0, 0.5),
}
