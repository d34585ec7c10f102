"""The card's resize and crop, and the augmentations: pure functions on images [H, W, C], uint8 or float32."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageEnhance

from tl_jax.core import checks
from tl_jax.core.card import CROP_MODES, sides
from tl_jax.data.image import rand_augment as ra
from tl_jax.data.image.decode import MAX_PIXELS, shape_of

RESAMPLE = {kind.name.lower(): kind for kind in Image.Resampling}


def _interval(high: float = math.inf) -> checks.Check:
    expected = f"a pair (low, high) with 0 < low <= high{f' <= {high:g}' if high < math.inf else ''}"
    pair = checks.sequence(checks.number(0, high, above=True), expected, 2)
    return pair._replace(fits=lambda value: pair.fits(value) and value[0] <= value[1])


_SIDE = checks.integer(1, 16_384)
_SIDES = checks.sequence(_SIDE, "a pair (height, width) of such", 2)
# The kinds of parameters of the augmentations.
Interpolation = Annotated[str, checks.one_of(*RESAMPLE)]
Size = Annotated[int | tuple[int, int], checks.either(_SIDE, _SIDES)]
CropMode = Annotated[str, checks.one_of(*CROP_MODES)]
Fill = Annotated[int, checks.integer(0, 255)]
Probability = Annotated[float, checks.number(0, 1)]
Amount = Annotated[float, checks.number(0, 100)]
Areas = Annotated[tuple[float, float], _interval(1)]
Ratios = Annotated[tuple[float, float], _interval()]


def resized(height: int, width: int, size: int | tuple[int, int], crop_mode: str = "center") -> tuple[int, int]:
    """Height and width after `resize`."""
    wanted = sides(size)
    if crop_mode == "squash":
        return wanted
    if crop_mode == "center" and wanted[0] == wanted[1]:  # the short side is this, the long one cut off, not rounded
        short = min(height, width)
        return int(wanted[0] * height / short), int(wanted[0] * width / short)
    ratios = height / wanted[0], width / wanted[1]
    ratio = max(ratios) if crop_mode == "border" else min(ratios)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def resize(
    image: np.ndarray | Image.Image,
    rng=None,
    *,
    size: Size,
    interpolation: Interpolation,
    crop_mode: CropMode = "center",
) -> np.ndarray:
    """Resizes as timm does, and torchvision where both sides of `size` are equal.

    The image covers `size` ("center"), lies within it ("border"), or takes exactly that size ("squash"). ValueError
    for an image so narrow that it would have more than MAX_PIXELS.
    """
    (height, width), found = resized(*shape_of(image), size, crop_mode), shape_of(image)
    if height * width > max(MAX_PIXELS, math.prod(found), 16 * math.prod(sides(size))):
        raise ValueError(f"an image of {found[1]} x {found[0]} pixels, which would be resized to {width} x {height}")
    return _scale(image, height, width, interpolation)


def _scale(image: np.ndarray | Image.Image, height: int, width: int, interpolation: str) -> np.ndarray:
    if shape_of(image) == (height, width):
        return np.asarray(image)
    return _with_pillow(image, lambda pil, _: pil.resize((width, height), RESAMPLE[interpolation]))


def _with_pillow(image: np.ndarray | Image.Image, change: Callable[[Image.Image, Any], Image.Image], fill=0):
    """`change(Pillow image, fill)`: of 8-bit RGB at once, else of channel after channel, floats in Pillow's mode F."""
    if isinstance(image, Image.Image) or (image.dtype == np.uint8 and image.shape[2] == 3):
        return np.asarray(change(image if isinstance(image, Image.Image) else Image.fromarray(image), (fill,) * 3))
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, 2, 0)]
    return np.stack([np.asarray(change(plane, fill)) for plane in planes], axis=2)


def _padded(image: np.ndarray, offset: Sequence[int], shape: Sequence[int], fill: Any = 0) -> np.ndarray:
    """The image in a larger one of height and width `shape`, `offset` rows and columns from its corner."""
    padded = np.empty((*shape, image.shape[2]), image.dtype)
    padded[:] = fill
    padded[offset[0] : offset[0] + image.shape[0], offset[1] : offset[1] + image.shape[1]] = image
    return padded


def centre_crop(image: np.ndarray, size: int | tuple[int, int], fill: Any = 0) -> np.ndarray:
    """Cuts the centre of `size`; the margins are halved with Python's round, as in torchvision.

    A side shorter than that (a card with crop > 1, or the crop_mode "border") is padded with `fill` to it first.
    """
    wanted = sides(size)
    missing = [max(want - side, 0) for want, side in zip(wanted, image.shape[:2], strict=True)]
    if any(missing):
        shape = [side + more for side, more in zip(image.shape[:2], missing, strict=True)]
        image = _padded(image, [more // 2 for more in missing], shape, fill)
    top, left = (round((side - want) / 2) for side, want in zip(image.shape[:2], wanted, strict=True))
    return image[top : top + wanted[0], left : left + wanted[1]]


def flip(image: np.ndarray, rng: np.random.Generator, *, probability: Probability = 0.5) -> np.ndarray:
    """Mirrors left and right with the given probability."""
    return image[:, ::-1] if rng.random() < probability else image


def _sides(rng: np.random.Generator, area: int, scale: Areas, ratio: Ratios) -> tuple[int, int]:
    """The sides of a random box: its share of the area is uniform in scale, first / second log-uniform in ratio."""
    area = area * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def _place(rng: np.random.Generator, *room: int) -> list[int]:
    return [int(rng.integers(side + 1)) for side in room]


def random_resized_crop(
    image: np.ndarray | Image.Image,
    rng,
    *,
    size: Size,
    interpolation: Interpolation,
    scale: Areas = (0.08, 1.0),
    ratio: Ratios = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Cuts a box of random area and aspect ratio and resizes it to `size` (Szegedy et al. 2015, section 6).

    `scale` bounds the box's share of the area, `ratio` its width / height. After ten boxes that do not fit, the largest
    central box within `ratio` is taken.
    """
    height, width = shape_of(image)
    for _ in range(10):
        w, h = _sides(rng, height * width, scale, ratio)
        if 0 < w <= width and 0 < h <= height:
            top, left = _place(rng, height - h, width - w)
            break
    else:
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        top, left = (height - h) // 2, (width - w) // 2
    # Cut, then resized: with a `box`, Pillow's resize would blend in pixels from outside of it.
    if isinstance(image, np.ndarray):
        return _scale(np.ascontiguousarray(image[top : top + h, left : left + w]), *sides(size), interpolation)
    return _scale(image.crop((left, top, left + w, top + h)), *sides(size), interpolation)


def random_crop(
    image: np.ndarray, rng, *, size: Size, padding: Annotated[int, checks.integer(0, 16_384)] = 0
) -> np.ndarray:
    """Adds `padding` black pixels on every side, then cuts `size` at a random place (He et al. 2016, section 4.2)."""
    (height, width), (rows, columns) = (side + 2 * padding for side in image.shape[:2]), sides(size)
    if height < rows or width < columns:
        what = f"random_crop of {size} pixels from an image of {height} x {width} (padding included)"
        raise ValueError(what + "; put ('resize', {}) before it or raise padding")
    if padding:
        image = _padded(image, (padding, padding), (height, width))
    top, left = _place(rng, height - rows, width - columns)
    return image[top : top + rows, left : left + columns]


def rotation(
    image: np.ndarray, rng, *, degrees: Annotated[float, checks.number(0, 180)] = 15.0, fill: Fill = 0
) -> np.ndarray:
    """Rotates about the centre by a uniform angle within +-degrees; bilinear, size kept, corners filled with `fill`."""
    angle = rng.uniform(-degrees, degrees)
    return _with_pillow(image, lambda pil, f: pil.rotate(angle, Image.Resampling.BILINEAR, fillcolor=f), fill)


def zoom(image: np.ndarray, rng, *, factor: Ratios = (0.8, 1.2), fill: Fill = 0) -> np.ndarray:
    """Enlarges (factor > 1) or shrinks about the centre by a uniform factor; bilinear, size kept, borders `fill`."""
    (height, width), s = image.shape[:2], 1 / rng.uniform(*factor)
    matrix = (s, 0, (1 - s) * width / 2, 0, s, (1 - s) * height / 2)  # Pillow maps output to input, pixel centres at .5
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    size = width, height
    return _with_pillow(image, lambda pil, f: pil.transform(size, affine, matrix, bilinear, fillcolor=f), fill)


def translation(image: np.ndarray, rng, *, fraction: Probability = 0.1, fill: Fill = 0) -> np.ndarray:
    """Shifts by whole pixels, uniform within +-fraction of the width and of the height; uncovered pixels are `fill`."""
    shift = tuple(round(rng.uniform(-fraction, fraction) * side) for side in image.shape[1::-1])
    return _with_pillow(image, lambda pil, f: pil.rotate(0, translate=shift, fillcolor=f), fill)


def colour_jitter(
    image: np.ndarray,
    rng,
    *,
    brightness: Amount = 0.0,
    contrast: Amount = 0.0,
    saturation: Amount = 0.0,
    hue: Annotated[float, checks.number(0, 0.5)] = 0.0,
) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, in random order (Krizhevsky et al. 2012; torchvision's form).

    The first three multiply by a factor uniform in [max(0, 1 - x), 1 + x]; hue shifts the colour circle by a uniform
    share of it within +-hue. An amount of 0 leaves its property alone.
    """
    image, amounts = Image.fromarray(image), (brightness, contrast, saturation)
    factors = [rng.uniform(max(0.0, 1 - amount), 1 + amount) for amount in amounts]
    shift = rng.uniform(-hue, hue)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for k in rng.permutation(4):
        if k == 3:
            image = _shift_hue(image, shift) if hue else image
        elif amounts[k]:
            image = enhancers[k](image).enhance(factors[k])
    return np.asarray(image)


def _shift_hue(image: Image.Image, share: float) -> Image.Image:
    """Turns the hue of an RGB image by `share` of the colour circle, in steps of 1/256."""
    h, s, v = image.convert("HSV").split()
    turned = (np.asarray(h).astype(np.int32) + int(share * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), s, v)).convert("RGB")


def rand_augment(
    image: np.ndarray,
    rng,
    *,
    layers: Annotated[int, checks.integer(0, 100)] = 2,
    magnitude: Annotated[int, checks.integer(0, 30)] = 9,
) -> np.ndarray:
    """Applies `layers` operations drawn uniformly from a list of 14, all at one magnitude 0 .. 30 (Cubuk et al. 2020).

    The list and the strength of each step are torchvision's; shifts, shears, rotations and colour go either way.
    """
    pil = Image.fromarray(image)
    for _ in range(layers):
        name = ra.NAMES[rng.integers(len(ra.NAMES))]
        sign = 1 if rng.random() < 0.5 else -1
        pil = ra.apply(pil, name, ra.strength(name, magnitude, pil.size) * (sign if name in ra.SIGNED else 1))
    return np.asarray(pil)


def random_erasing(
    image: np.ndarray, rng, *, probability: Probability = 0.25, scale: Areas = (0.02, 0.33), ratio: Ratios = (0.3, 3.3)
) -> np.ndarray:
    """Overwrites a random box with uniform noise, with the given probability (Zhong et al. 2020, algorithm 1, RE-R).

    `scale` bounds the box's share of the area, `ratio` its height / width. After ten boxes that do not fit, the
    image is left as it is.
    """
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        h, w = _sides(rng, height * width, scale, ratio)
        if 0 < h < height and 0 < w < width:
            top, left = _place(rng, height - h, width - w)
            image = image.copy()
            image[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, image.shape[2]), np.uint8)
            break
    return image


GEOMETRIC = (flip, resize, random_resized_crop, random_crop, rotation, zoom, translation)
OPS = {op.__name__: op for op in (*GEOMETRIC, colour_jitter, rand_augment, random_erasing)}
COLOURS = {"colour_jitter", "rand_augment"}  # what is defined for 8-bit RGB alone
BYTES = {*COLOURS, "random_erasing"}  # what is defined for 8 bits alone
PILLOW = {"resize", "random_resized_crop"}  # what takes an image of Pillow's as well; all give arrays


def put(row: np.ndarray, image: np.ndarray) -> None:
    """Writes an image [H, W, C] into its row of a batch; a mirrored one by channels, six times as fast as at once."""
    if image.strides[1] > 0:
        row[...] = image
    else:
        for channel in range(image.shape[2]):
            row[..., channel] = image[..., channel]
