"""Decoding, the card's resize and crop, and the augmentations: pure functions on uint8 images [H, W, 3]."""

import contextlib
import io
import math
import os
import threading
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tl_jax.core import checks
from tl_jax.data.image import rand_augment as ra

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")  # MPO is read as JPEG; Pillow has no reader by that name
MAX_PIXELS = 2**26  # 64 megapixels are 192 MiB as RGB; a larger image is refused before it is decoded
JPEG_PIXELS = 1024  # of one byte: a JPEG takes at least a bit for each 8 x 8 pixels, so twice what is possible
RESAMPLE = {kind.name.lower(): kind for kind in Image.Resampling}


def _interval(high: float = math.inf) -> checks.Check:
    expected = f"a pair (low, high) with 0 < low <= high{f' <= {high:g}' if high < math.inf else ''}"
    pair = checks.sequence(checks.number(0, high, above=True), expected, 2)
    return pair._replace(fits=lambda value: pair.fits(value) and value[0] <= value[1])


_budget = threading.Condition()
_free = MAX_PIXELS  # of the pixels that the threads of this process may read at one time

# The kinds of parameters of the augmentations.
Interpolation = Annotated[str, checks.one_of(*RESAMPLE)]
Size = Annotated[int, checks.integer(1, 16_384)]
Fill = Annotated[int, checks.integer(0, 255)]
Probability = Annotated[float, checks.number(0, 1)]
Amount = Annotated[float, checks.number(0, 100)]
Areas = Annotated[tuple[float, float], _interval(1)]
Ratios = Annotated[tuple[float, float], _interval()]


def open_image(data: bytes | str) -> Image.Image:
    """Reads the header of encoded bytes, or of the file at a path; ValueError says why it is no image.

    The format is told from the content, never from the file name; only `FORMATS` up to `MAX_PIXELS` are read.
    """
    if not data:
        raise ValueError("not a readable image (it is empty)")
    try:
        image = Image.open(data if isinstance(data, str) else io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # on damaged headers Pillow raises almost any type
        raise ValueError(f"not a readable image ({_reason(error)}; formats read: {', '.join(FORMATS)})") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"image of {image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
    size = os.path.getsize(data) if isinstance(data, str) else len(data)
    if image.format in ("JPEG", "MPO") and image.width * image.height > JPEG_PIXELS * size:
        image.close()
        raise ValueError(f"damaged JPEG ({size:,} bytes cannot hold {image.width} x {image.height} pixels)")
    return image


def decode(data: bytes) -> np.ndarray:
    """Decodes an encoded image into uint8 RGB [H, W, 3]; see `decode_image`."""
    return np.asarray(decode_image(data))


def decode_image(data: bytes) -> Image.Image:
    """Decodes an encoded image into a Pillow image in mode RGB; ValueError says how it is damaged.

    EXIF orientation is applied; of several frames the first is taken; 16-bit grey is scaled to 8 bits; transparent
    pixels are laid on white; CMYK, grey and palette images become RGB.
    """
    return _load(open_image(data))


def _load(image: Image.Image) -> Image.Image:
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except Exception as error:  # see open_image
        raise ValueError(f"damaged {image.format or 'image'} ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """The error's text without the repr of a memory stream, which names an address and no file."""
    return str(error).split(" <_io.")[0].strip() or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)  # Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode} has no defined white; save it with 8 or 16 bits per channel")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def as_rgb(image: np.ndarray | bytes) -> np.ndarray | Image.Image:
    """Encoded bytes as a Pillow image, uint8 [H, W], [H, W, 1] or [H, W, 3] as [H, W, 3]; ValueError on others."""
    if isinstance(image, bytes):
        return decode_image(image)
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))
    if image.dtype != np.uint8 or not (fits and image.size):
        raise ValueError(f"an image must be uint8 [H, W], [H, W, 1] or [H, W, 3], found {image.dtype} {image.shape}")
    image = image[..., None] if image.ndim == 2 else image
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


@contextlib.contextmanager
def reading(image: np.ndarray | bytes) -> Iterator[np.ndarray | Image.Image]:
    """`as_rgb` of an image that is kept within the block; raises as it does.

    By their headers, the images that the threads of a process read at one time have at most `MAX_PIXELS`; others wait.
    """
    global _free
    if not isinstance(image, bytes):
        yield as_rgb(image)
        return
    pixels = math.prod((header := open_image(image)).size)
    with _budget:
        _budget.wait_for(lambda: _free >= pixels)
        _free -= pixels
    try:
        yield _load(header)
    finally:
        with _budget:
            _free += pixels
            _budget.notify_all()


def shape_of(image: np.ndarray | Image.Image) -> tuple[int, int]:
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after `resize`: the short side is `size`, the long one `floor(size * long / short)`."""
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def resize(image: np.ndarray | Image.Image, rng=None, *, size: Size, interpolation: Interpolation) -> np.ndarray:
    """Resizes to `resized`, as torchvision does."""
    return _scale(image, *resized(*shape_of(image), size), interpolation)


def _scale(image: np.ndarray | Image.Image, height: int, width: int, interpolation: str) -> np.ndarray:
    if shape_of(image) == (height, width):
        return np.asarray(image)
    pil = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return np.asarray(pil.resize((width, height), RESAMPLE[interpolation]))


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the central `size` square; the margins are halved with Python's round, as in torchvision.

    A side shorter than `size` (a card with crop > 1) is padded with black to it first.
    """
    missing = [max(size - side, 0) for side in image.shape[:2]]
    if any(missing):
        image = np.pad(image, [(m // 2, m - m // 2) for m in missing] + [(0, 0)])
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


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
    """Cuts a box of random area and aspect ratio and resizes it to `size` x `size` (Szegedy et al. 2015, section 6).

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
        return _scale(np.ascontiguousarray(image[top : top + h, left : left + w]), size, size, interpolation)
    return _scale(image.crop((left, top, left + w, top + h)), size, size, interpolation)


def random_crop(
    image: np.ndarray, rng, *, size: Size, padding: Annotated[int, checks.integer(0, 16_384)] = 0
) -> np.ndarray:
    """Adds `padding` black pixels on every side, then cuts a `size` square at a random place (He et al. 2016, 4.2)."""
    height, width = (side + 2 * padding for side in image.shape[:2])
    if min(height, width) < size:
        what = f"random_crop of {size} pixels from an image of {height} x {width} (padding included)"
        raise ValueError(what + "; put ('resize', {}) before it or raise padding")
    if padding:
        padded = np.zeros((height, width, 3), np.uint8)
        padded[padding : height - padding, padding : width - padding] = image
        image = padded
    top, left = _place(rng, height - size, width - size)
    return image[top : top + size, left : left + size]


def rotation(
    image: np.ndarray, rng, *, degrees: Annotated[float, checks.number(0, 180)] = 15.0, fill: Fill = 0
) -> np.ndarray:
    """Rotates about the centre by a uniform angle within +-degrees; bilinear, size kept, corners filled with `fill`."""
    angle = rng.uniform(-degrees, degrees)
    return np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR, fillcolor=(fill,) * 3))


def zoom(image: np.ndarray, rng, *, factor: Ratios = (0.8, 1.2), fill: Fill = 0) -> np.ndarray:
    """Enlarges (factor > 1) or shrinks about the centre by a uniform factor; bilinear, size kept, borders `fill`."""
    (height, width), s = image.shape[:2], 1 / rng.uniform(*factor)
    matrix = (s, 0, (1 - s) * width / 2, 0, s, (1 - s) * height / 2)  # Pillow maps output to input, pixel centres at .5
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    image = Image.fromarray(image).transform((width, height), affine, matrix, bilinear, fillcolor=(fill,) * 3)
    return np.asarray(image)


def translation(image: np.ndarray, rng, *, fraction: Probability = 0.1, fill: Fill = 0) -> np.ndarray:
    """Shifts by whole pixels, uniform within +-fraction of the width and of the height; uncovered pixels are `fill`."""
    shift = tuple(round(rng.uniform(-fraction, fraction) * side) for side in image.shape[1::-1])
    return np.asarray(Image.fromarray(image).rotate(0, translate=shift, fillcolor=(fill,) * 3))


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
            image[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, 3), np.uint8)
            break
    return image


GEOMETRIC = (flip, resize, random_resized_crop, random_crop, rotation, zoom, translation)
OPS = {op.__name__: op for op in (*GEOMETRIC, colour_jitter, rand_augment, random_erasing)}
PILLOW = {"resize", "random_resized_crop"}  # what takes an image of Pillow's as well; all give arrays


def put(row: np.ndarray, image: np.ndarray) -> None:
    """Writes an image [S, S, 3] into its row of a batch; a mirrored one by channels, six times as fast as at once."""
    if image.strides[1] > 0:
        row[...] = image
    else:
        for channel in range(3):
            row[..., channel] = image[..., channel]
