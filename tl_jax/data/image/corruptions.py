"""Corruptions of images in five severities (Hendrycks & Dietterich 2019, arXiv:1903.12261, appendix A).

The constants are those of the paper's code: of CIFAR-10-C for images whose short side has at most SMALL pixels, else
of ImageNet-C. Three things differ. Values are rounded where theirs are cut off. The border of a defocused image is
mirrored as theirs, but the disk is antialiased in float64. An image is corrupted as it is, without their centre crop;
one whose short side has more than LARGE pixels is made smaller first, as theirs were.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from tl_jax.data.image import decode, ops

SMALL, LARGE = 64, 256


def _gaussian_noise(x: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
    return x + rng.normal(0, deviation, x.shape)


def _shot_noise(x: np.ndarray, rng: np.random.Generator, photons: float) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Half of the share becomes black, half white, each channel by itself."""
    place = rng.random(x.shape)
    return np.where(place < share / 2, 0.0, np.where(place < share, 1.0, x))


def _gaussian_blur(x: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
    """Cut off at four standard deviations; beyond the border is the nearest pixel."""
    bell = _bell(int(4 * deviation + 0.5), deviation)
    return _filter(_filter(x, bell[:, None], "edge"), bell[None], "edge")


def _defocus_blur(x: np.ndarray, rng: np.random.Generator, radius: float, deviation: float) -> np.ndarray:
    """The mean over a disk of pixels, itself blurred; beyond the border the image is mirrored."""
    side = np.arange(-max(8, radius), max(8, radius) + 1)
    disk = (side**2 + side[:, None] ** 2 <= radius**2).astype(float)
    bell = _bell(1 if radius <= 8 else 2, deviation)
    kernel = _filter((disk / disk.sum())[..., None], bell[:, None] * bell, "reflect")[..., 0]
    inner = np.flatnonzero(kernel.any(axis=0))
    return _filter(x, kernel[inner[0] : inner[-1] + 1, inner[0] : inner[-1] + 1], "reflect")


def _contrast(x: np.ndarray, rng: np.random.Generator, factor: float) -> np.ndarray:
    mean = x.mean(axis=(0, 1))
    return (x - mean) * factor + mean


def _brightness(x: np.ndarray, rng: np.random.Generator, added: float) -> np.ndarray:
    """Adds to the V of HSV: colours are multiplied by new / old V, and black becomes grey."""
    old = x.max(axis=2, keepdims=True)
    new = np.minimum(old + added, 1)
    return np.where(old > 0, x * new / np.where(old > 0, old, 1), new)


def _jpeg(x: np.ndarray, rng: np.random.Generator, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(_as_bytes(x)).save(stream, "JPEG", quality=quality)
    return decode.decode(stream.getvalue()) / 255


def _pixelate(x: np.ndarray, rng: np.random.Generator, factor: float) -> np.ndarray:
    image, box = Image.fromarray(_as_bytes(x)), Image.Resampling.BOX
    coarse = image.resize([max(1, int(side * factor)) for side in image.size], box)
    return np.asarray(coarse.resize(image.size, box)) / 255


# By name: the function of (x float64 [H, W, 3] from 0 to 1, draws, constants), its constants by severity of CIFAR-10-C,
# and of ImageNet-C.
CORRUPTIONS: dict[str, tuple[Callable[..., np.ndarray], tuple, tuple]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    "defocus_blur": (
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
}


def corrupt(image: np.ndarray | Image.Image, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] of a decoded image; severity 1 to 5; a corruption without chance draws nothing from `rng`."""
    if min(decode.shape_of(image)) > LARGE:
        image = ops.resize(image, size=LARGE, interpolation="bilinear")
    function, small, large = CORRUPTIONS[name]
    constants = (small if min(decode.shape_of(image)) <= SMALL else large)[severity - 1]
    x = np.asarray(image) / 255
    return _as_bytes(function(x, rng, *(constants if isinstance(constants, tuple) else (constants,))))


def _as_bytes(x: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)


def _bell(radius: int, deviation: float) -> np.ndarray:
    """The normal density at -radius .. radius, of sum 1."""
    bell = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * deviation**2))
    return bell / bell.sum()


def _filter(x: np.ndarray, kernel: np.ndarray, border: str) -> np.ndarray:
    """The correlation of x [H, W, C] with a kernel of odd sides; border: a mode of np.pad."""
    (height, width), (rows, columns) = x.shape[:2], kernel.shape
    padded = np.pad(x, ((rows // 2,) * 2, (columns // 2,) * 2, (0, 0)), border)
    places = np.argwhere(kernel).tolist()
    return sum(kernel[i, j] * padded[i : i + height, j : j + width] for i, j in places)
